// SPDX-License-Identifier: Apache-2.0

// The guards: tracing programs that are attached while a pod takes part.

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/podshunt/podshunt/bpf"
)

// Guards are programs that see a call which does not work on a shortcut socket
// before the kernel serves it. They need a kernel that allows trampolines.
const (
	// GuardSplice puts a direction on TCP when its receiver calls splice, and lets that call fail with EINVAL while
	// redirected bytes are unread. It runs for every read and write of a file on the node.
	GuardSplice = "splice"
	// GuardULP makes TCP_ULP (kTLS) on a socket of a flow fail with ENOENT.
	GuardULP = "ulp"
	// GuardFIONREAD puts a direction on TCP when its receiver calls FIONREAD.
	GuardFIONREAD = "fionread"
	// GuardFlags puts a direction on TCP when its receiver begins a recv with
	// MSG_WAITALL or another unsupported flag, or when its sender uses MSG_OOB.
	GuardFlags = "flags"
)

// guardPrograms returns the programs of each guard, in the order in which they
// are attached.
func guardPrograms() map[string][]string {
	return map[string][]string{
		GuardSplice:   {bpf.GuardProgSpliceRefused, bpf.GuardProgSpliceEnds, bpf.GuardProgSpliceBegins, bpf.GuardProgSpliceSeen},
		GuardULP:      {bpf.GuardProgUlpRefused, bpf.GuardProgUlpBegins},
		GuardFIONREAD: {bpf.GuardProgFionreadSeen},
		GuardFlags:    {bpf.GuardProgFlagsOfRecv, bpf.GuardProgFlagsOfSend},
	}
}

// GuardNames returns the names of all guards, sorted.
func GuardNames() []string { return slices.Sorted(maps.Keys(guardPrograms())) }

// guard is an attached guard.
type guard struct {
	pins  []string // empty if it lasts no longer than the process
	links []link.Link
}

// AttachGuard attaches a guard until detach is called or the process ends. shared
// has the maps of the shortcut by name, whose sockets the guard looks at.
func AttachGuard(name string, shared map[string]*ebpf.Map, cache *btf.Cache) (detach func() error, err error) {
	g, err := attachGuard(name, shared, "", cache)
	if err != nil {
		return nil, err
	}
	return g.close, nil
}

// attachGuard attaches a guard that uses the maps of shared. If dir is not empty its
// links are pinned there, and links that are pinned there already are kept if all of
// them run the same programs.
func attachGuard(name string, shared map[string]*ebpf.Map, dir string, cache *btf.Cache) (*guard, error) {
	objects, err := loadGuard(name, shared, cache)
	if err != nil {
		return nil, fmt.Errorf("load guard %s: %w", name, err)
	}
	defer objects.Close() // links hold their programs
	g, err := openGuard(name, objects, dir)
	if g != nil || err != nil {
		return g, err
	}
	g = &guard{}
	for _, program := range guardPrograms()[name] {
		l, err := link.AttachTracing(link.TracingOptions{Program: objects.Programs[program]})
		if err == nil {
			g.links = append(g.links, l)
			if dir != "" {
				pin := guardPin(dir, program)
				err = l.Pin(pin)
				g.pins = append(g.pins, pin)
			}
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("attach guard %s: %w", program, err), g.detach())
		}
	}
	return g, nil
}

func guardPin(dir, program string) string { return filepath.Join(dir, "link_guard_"+program) }

// loadGuard loads the programs of one guard, with a new map of marks: nobody has
// cleared the marks of tasks while the guard was not attached.
func loadGuard(name string, shared map[string]*ebpf.Map, cache *btf.Cache) (*ebpf.Collection, error) {
	spec, err := bpf.LoadGuard()
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(spec.Programs, func(program string, _ *ebpf.ProgramSpec) bool {
		return !slices.Contains(guardPrograms()[name], program)
	})
	replacements := map[string]*ebpf.Map{}
	for _, m := range []string{bpf.GuardMapControl, bpf.GuardMapSkFlows, bpf.GuardMapFlows, bpf.GuardMapLearned, bpf.GuardMapShares} {
		replacements[m] = shared[m]
		spec.Maps[m].MaxEntries = shared[m].MaxEntries()
	}
	return ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements, Cache: cache})
}

// openGuard takes over the pinned links of a guard. If some are missing or run other
// programs, it deletes them all and returns nil, as if there were none.
func openGuard(name string, objects *ebpf.Collection, dir string) (*guard, error) {
	if dir == "" {
		return nil, nil
	}
	g := &guard{}
	current := true
	for _, program := range guardPrograms()[name] {
		pin := guardPin(dir, program)
		l, same, err := openLink(pin, objects.Programs[program])
		if err != nil {
			return nil, errors.Join(err, g.close())
		}
		current = current && same
		if l != nil {
			g.pins = append(g.pins, pin)
			g.links = append(g.links, l)
		}
	}
	if current {
		return g, nil
	}
	return nil, g.detach()
}

// detach detaches in reverse order, so that no program sets a mark which no other
// reads.
func (g *guard) detach() error {
	var errs []error
	for _, pin := range slices.Backward(g.pins) {
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("unpin guard: %w", err))
		}
	}
	return errors.Join(append(errs, g.close())...)
}

// close closes this process's handles; pinned links stay attached.
func (g *guard) close() error {
	var errs []error
	for _, l := range slices.Backward(g.links) {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// updateGuards attaches the configured guards if a pod takes part or a flow is left,
// and detaches them otherwise. It detaches guards that are not configured. The
// caller holds mu.
func (d *Datapath) updateGuards() error {
	busy, err := d.anyEntries(bpf.ShortcutMapPods, bpf.ShortcutMapFlows)
	if err != nil {
		return err
	}
	cache := cmp.Or(d.types, btf.NewCache())
	for _, name := range GuardNames() {
		g := d.guards[name]
		switch wanted := busy && slices.Contains(d.cfg.Guards, name); {
		case wanted && g == nil:
			g, err = attachGuard(name, d.objects.Maps, d.cfg.PinDir, cache)
			if err != nil {
				return err
			}
			d.guards[name] = g
			d.log.Info("guard attached", "guard", name)
		case !wanted:
			delete(d.guards, name)
			if err := dropGuard(name, g, d.cfg.PinDir); err != nil {
				return fmt.Errorf("detach guard %s: %w", name, err)
			}
		}
	}
	return nil
}

// dropGuard detaches a guard, also one that an earlier process has pinned (g is nil then).
func dropGuard(name string, g *guard, dir string) error {
	if g != nil {
		return g.detach()
	}
	pinned := &guard{}
	for _, program := range guardPrograms()[name] {
		pinned.pins = append(pinned.pins, guardPin(dir, program))
	}
	return pinned.detach()
}

// anyEntries reports whether one of the maps has an entry.
func (d *Datapath) anyEntries(names ...string) (bool, error) {
	for _, name := range names {
		key, err := d.objects.Maps[name].NextKeyBytes(nil)
		if err != nil {
			return false, fmt.Errorf("read map %s: %w", name, err)
		}
		if key != nil {
			return true, nil
		}
	}
	return false, nil
}

// Guards returns the names of the attached guards, sorted.
func (d *Datapath) Guards() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.guards))
}

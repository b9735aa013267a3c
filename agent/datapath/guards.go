// SPDX-License-Identifier: Apache-2.0

package datapath

import (
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

// Guards see a call that the kernel does not serve on a shortcut socket before
// it is served. They need a kernel that allows trampolines.
const (
	// GuardSplice puts a direction on TCP when its receiver uses splice, which fails
	// with EINVAL while redirected bytes are unread. It costs every read and write of a file on the node a few nanoseconds.
	GuardSplice = "splice"
	// GuardULP lets TCP_ULP (kTLS) on a socket of a flow fail with ENOENT.
	GuardULP = "ulp"
	// GuardFIONREAD puts a direction on TCP when its receiver calls FIONREAD.
	GuardFIONREAD = "fionread"
	// GuardFlags puts a direction on TCP when its receiver begins a recv with
	// MSG_WAITALL or another flag that is not served, or its sender uses MSG_OOB.
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

// guard is one that is attached.
type guard struct {
	pins  []string // empty if it lasts no longer than the process
	links []link.Link
}

// AttachGuard attaches a guard that looks at the sockets of these maps, those of the
// shortcut by name, until detach is called or the process ends.
func AttachGuard(name string, shared map[string]*ebpf.Map, cache *btf.Cache) (detach func() error, err error) {
	g, err := attachGuard(name, shared, "", cache)
	if err != nil {
		return nil, err
	}
	return g.close, nil
}

// attachGuard attaches a guard that looks at the sockets of these maps. With a
// directory its links are pinned there, and those that are pinned already are
// kept if all of them run the same programs.
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

// loadGuard loads the programs of one guard. What they know of tasks begins
// anew, since nobody has cleared it while they were not attached.
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

// openGuard takes over the pinned links of a guard. It returns nil if there are
// none; if some are missing or run other programs, it deletes them all.
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

// detach detaches in reverse order, so that no mark is made that is not looked at.
func (g *guard) detach() error {
	var errs []error
	for _, pin := range slices.Backward(g.pins) {
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("unpin guard: %w", err))
		}
	}
	return errors.Join(append(errs, g.close())...)
}

// close gives up this process's hold; pinned links stay attached.
func (g *guard) close() error {
	var errs []error
	for _, l := range slices.Backward(g.links) {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// updateGuards attaches the configured guards while a pod takes part or a flow
// is left, and detaches them after that, with all that are not configured any
// more. The caller holds mu.
func (d *Datapath) updateGuards() error {
	busy, err := d.anyEntries(bpf.ShortcutMapPods, bpf.ShortcutMapFlows)
	if err != nil {
		return err
	}
	cache := btf.NewCache()
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

// anyEntries tells whether one of the maps has an entry.
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

// Guards returns the guards that are attached, sorted.
func (d *Datapath) Guards() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.guards))
}

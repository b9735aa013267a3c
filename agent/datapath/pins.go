// SPDX-License-Identifier: Apache-2.0

// Pins while they are made or taken down, so that an agent that is killed at any step leaves nothing behind.

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/podshunt/podshunt/bpf"
)

// Suffixes of directories beside the pin directory. bpffs does not allow names with
// a dot.
const (
	// suffixLock is an empty directory. Whoever holds its lock works on the pins:
	// it is there before them, and stays while they are renamed.
	suffixLock = "_lock"
	// suffixNew is a bring-up that is not complete: no pod has ever taken part
	// in it.
	suffixNew = "_new"
	// suffixOld is a removal that is not complete. Before the pins got this
	// name, redirecting was turned off, and all redirected bytes that an unload
	// waits for had been read.
	suffixOld = "_old"
)

// anyPins reports whether there are pins, also of a bring-up or removal that is not
// complete.
func anyPins(dir string) (bool, error) {
	for _, suffix := range []string{"", suffixNew, suffixOld} {
		if there, err := exists(dir + suffix); err != nil || there {
			return there, err
		}
	}
	return false, nil
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for pins: %w", err)
	}
	return true, nil
}

// finish completes what a crash has interrupted. The caller owns the pins.
func (d *Datapath) finish() error {
	if err := d.removePins(d.cfg.PinDir + suffixNew); err != nil {
		return fmt.Errorf("remove unfinished pins: %w", err)
	}
	there, err := exists(d.cfg.PinDir + suffixOld)
	if err != nil || !there {
		return err
	}
	d.log.Warn("an unload was interrupted: finishing it")
	spec, err := bpf.LoadShortcut()
	if err != nil {
		return err
	}
	// If one of these is missing, or of another build, the sockets stay where they are.
	held := map[string]*ebpf.Map{}
	defer closeMaps(held)
	for _, name := range []string{bpf.ShortcutMapSockets, bpf.ShortcutMapFlows} {
		m, err := openMap(d.cfg.PinDir+suffixOld, name, spec.Maps[name])
		if err == nil {
			held[name] = m
		} else if !errors.Is(err, errNoMap) && !errors.Is(err, ErrOtherBuild) {
			return err
		}
	}
	if err := d.takeDown(held); err != nil {
		return fmt.Errorf("finish an interrupted unload: %w", err)
	}
	return nil
}

// takeDown takes the renamed pins, and what they hold, out of the kernel. It may be
// interrupted between any two steps, and called again.
func (d *Datapath) takeDown(maps map[string]*ebpf.Map) error {
	dir := d.cfg.PinDir + suffixOld
	// Pairing ends first, so that no socket joins meanwhile.
	if err := d.detachTrack(filepath.Join(dir, pinTrack)); err != nil {
		return err
	}
	if err := d.at("track detached"); err != nil {
		return err
	}
	left, err := d.evictAll(maps[bpf.ShortcutMapSockets], maps[bpf.ShortcutMapFlows])
	if err != nil {
		return err
	}
	d.left = left
	return d.removePins(dir)
}

// detachTrack detaches track, by its pin and by this process's own handle, since
// somebody may have deleted the pin.
func (d *Datapath) detachTrack(pin string) error {
	var errs []error
	for _, l := range d.links {
		info, err := l.Info()
		if err == nil && info.Type == link.CgroupType {
			err = l.Detach()
		}
		errs = append(errs, err)
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		errs = append(errs, l.Detach(), l.Close())
	} else if !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end pairing: %w", err)
	}
	waitForPrograms()
	return nil
}

// evictAll deletes from the SOCKHASH the sockets that have no redirected bytes to
// read, and returns how many stay. A socket stays if it has some, or if its flow is
// gone, so that nobody knows: its connection was reset or has ended, but its program
// has not closed it. If it were deleted, its unread bytes would be lost, and the
// program would read on behind the gap. It leaves when its program closes it; until
// then it keeps the sk_msg program, and that keeps all maps.
func (d *Datapath) evictAll(sockets, flows *ebpf.Map) (left int, err error) {
	if sockets == nil {
		return 0, nil // taken out before an interruption, or out of reach
	}
	if flows == nil {
		cookies, err := socketCookies(sockets)
		return len(cookies), err
	}
	for {
		drained, err := drainedSockets(flows)
		if err != nil {
			return 0, err
		}
		cookies, err := socketCookies(sockets)
		if err != nil {
			return 0, err
		}
		deleted := 0
		for cookie := range cookies {
			if !drained[cookie] {
				continue
			}
			if err := d.at("take out a socket"); err != nil {
				return 0, err
			}
			if err := sockets.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return 0, fmt.Errorf("take a socket out of the SOCKHASH: %w", err)
			}
			deleted++
		}
		// A socket that is closed while the keys are read may hide others.
		if deleted == 0 {
			return len(cookies), nil
		}
	}
}

// drainedSockets returns the sockets of flows that have read all that was redirected to them.
func drainedSockets(flows *ebpf.Map) (map[uint64]bool, error) {
	all, err := entries[uint64, bpf.ShortcutFlow](flows)
	if err != nil {
		return nil, fmt.Errorf("read the flows map: %w", err)
	}
	drained := map[uint64]bool{}
	for _, p := range all {
		for side, cookie := range p.Cookie {
			if !unread(&p, bpf.ShortcutSideIndex(side)) {
				drained[cookie] = true
			}
		}
	}
	return drained, nil
}

// unread reports whether the socket of a side has redirected bytes to read.
func unread(p *bpf.ShortcutFlow, side bpf.ShortcutSideIndex) bool {
	toward := p.Side[1-side].Sending
	return toward.RedirectEnd > p.Side[side].Receiving.ReadBytes+uint64(toward.Missed)
}

// socketCookies returns the keys of the SOCKHASH.
func socketCookies(sockets *ebpf.Map) (map[uint64]bool, error) {
	cookies := map[uint64]bool{}
	var last any
	for {
		key, err := sockets.NextKeyBytes(last)
		if err != nil {
			return nil, fmt.Errorf("read the SOCKHASH: %w", err)
		}
		if key == nil {
			return cookies, nil
		}
		cookies[binary.NativeEndian.Uint64(key)] = true
		last = key
	}
}

// removePins deletes a directory of pins; one that is not there is no error.
func (d *Datapath) removePins(dir string) error {
	pins, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	names := make([]string, len(pins))
	for i, pin := range pins {
		names[i] = pin.Name()
	}
	// The pins that finish needs are deleted last.
	slices.SortStableFunc(names, func(a, b string) int { return removalRank(a) - removalRank(b) })
	for _, name := range names {
		if err := d.at("delete a pin"); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := d.at("delete the directory"); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func removalRank(name string) int {
	switch {
	case strings.HasPrefix(name, "link_"):
		return 0
	case name == bpf.ShortcutMapSockets:
		return 2
	case name == bpf.ShortcutMapFlows, name == bpf.ShortcutMapControl:
		return 3
	default:
		return 1
	}
}

// openMaps opens the pinned maps, and gives the specs their sizes. If it returns
// errNoMap, it also returns the maps that are there.
func openMaps(dir string, specs map[string]*ebpf.MapSpec) (map[string]*ebpf.Map, error) {
	pinned := map[string]*ebpf.Map{}
	var missing error
	for name, want := range specs {
		m, err := openMap(dir, name, want)
		switch {
		case err == nil:
			pinned[name] = m
		case errors.Is(err, errNoMap):
			missing = errors.Join(missing, err)
		default:
			closeMaps(pinned)
			return nil, err
		}
	}
	return pinned, missing
}

func closeMaps(all map[string]*ebpf.Map) {
	for _, m := range all {
		m.Close()
	}
}

// sharedMaps returns the maps that all processes and programs must share: all but the
// constants (.rodata), and the one of the joiner.
func sharedMaps(spec *ebpf.CollectionSpec) map[string]*ebpf.MapSpec {
	shared := maps.Clone(spec.Maps)
	maps.DeleteFunc(shared, func(name string, _ *ebpf.MapSpec) bool {
		return strings.HasPrefix(name, ".") || name == bpf.ShortcutMapJoining
	})
	return shared
}

// errNoMap says that somebody has deleted the pin of a map, and that no program
// of the other pins has the map.
var errNoMap = errors.New("its pin is gone, and no pinned program has it")

// openMap opens a pinned map, and sets the size of its spec to the map's. If the pin
// was deleted, it finds the map by the programs that use it and pins it again; it
// returns errNoMap if no program does.
func openMap(dir, name string, want *ebpf.MapSpec) (*ebpf.Map, error) {
	path := filepath.Join(dir, name)
	m, err := ebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		if m, err = findMap(dir, name); err == nil {
			if err = m.Pin(path); err != nil {
				m.Close()
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", name, err)
	}
	want.MaxEntries = m.MaxEntries()
	if err := want.Compatible(m); err != nil {
		m.Close()
		return nil, fmt.Errorf("open map %s: %w: %w", name, err, ErrOtherBuild)
	}
	return m, nil
}

// findMap looks for a map by the programs of the links that are pinned in dir.
func findMap(dir, name string) (*ebpf.Map, error) {
	pins, err := filepath.Glob(filepath.Join(dir, "link_*"))
	if err != nil {
		return nil, err
	}
	for _, pin := range pins {
		m, err := mapOfLink(pin, name)
		if m != nil || err != nil {
			return m, err
		}
	}
	return nil, errNoMap
}

// mapOfLink returns the map with a name that the program of a pinned link uses, or
// nil.
func mapOfLink(pin, name string) (*ebpf.Map, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, fmt.Errorf("open link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, fmt.Errorf("inspect link %s: %w", pin, err)
	}
	program, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil, fmt.Errorf("open the program of link %s: %w", pin, err)
	}
	defer program.Close()
	of, err := program.Info()
	if err != nil {
		return nil, fmt.Errorf("inspect the program of link %s: %w", pin, err)
	}
	ids, _ := of.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, fmt.Errorf("open a map of link %s: %w", pin, err)
		}
		have, err := m.Info()
		if err == nil && have.Name == name {
			return m, nil
		}
		if err := errors.Join(err, m.Close()); err != nil {
			return nil, fmt.Errorf("inspect a map of link %s: %w", pin, err)
		}
	}
	return nil, nil
}

// at runs between the steps of a bring-up and a removal, so that tests can interrupt
// them.
func (d *Datapath) at(step string) error {
	if d.step == nil {
		return nil
	}
	return d.step(step)
}

// SPDX-License-Identifier: Apache-2.0

// Opening pinned maps, also those whose pin somebody has deleted.

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/podshunt/podshunt/bpf"
)

// openOwn opens the pinned maps if they have this build's layout, and gives those of spec
// their sizes. If it returns errNoMap, it also returns the maps that are there. It returns
// ErrOtherBuild if they have another layout.
func openOwn(dir string, spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	control, err := openPin(dir, bpf.ShortcutMapControl)
	if err == nil {
		var number uint32
		number, err = layoutOf(control)
		if err == nil && number != layout {
			err = fmt.Errorf("layout %d, and this build has layout %d: %w", number, layout, ErrOtherBuild)
		}
		if errors.Is(err, errUnreadable) {
			err = fmt.Errorf("map %s: %w: %w", bpf.ShortcutMapControl, err, ErrOtherBuild)
		}
		err = errors.Join(err, control.Close())
	}
	if err != nil && !errors.Is(err, errNoMap) {
		return nil, err
	}
	return openMaps(dir, sharedMaps(spec))
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

// openMap opens a pinned map as openPin does, and sets the size of its spec to the map's.
func openMap(dir, name string, want *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := openPin(dir, name)
	if err != nil {
		return nil, err
	}
	want.MaxEntries = m.MaxEntries()
	if err := want.Compatible(m); err != nil {
		m.Close()
		return nil, fmt.Errorf("open map %s: %w: %w", name, err, ErrOtherBuild)
	}
	return m, nil
}

// openPin opens a pinned map. If the pin was deleted, it finds the map by the programs
// that use it and pins it again; it returns errNoMap if no program does.
func openPin(dir, name string) (*ebpf.Map, error) {
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

// SPDX-License-Identifier: Apache-2.0

// The life of a datapath: made anew or taken over, and closed.

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"

	"github.com/podshunt/podshunt/bpf"
)

// Datapath is the open set of kernel objects. Its methods may be called from several
// goroutines, except Close, which must be the last call.
type Datapath struct {
	cfg             Config
	log             *slog.Logger
	observer        string
	objects         *ebpf.Collection
	links           []link.Link
	lock, pins      *os.File // of own, and of ownPins
	joiner          *joiner  // nil for the reason in noJoin
	watcher         *watcher
	noJoin, noWatch error              // see NoWatch
	noCallbacks     bool               // open connections join, and get no callbacks
	joinDue         chan struct{}      // of JoinDue
	step            func(string) error // see at; nil but in tests
	types           *btf.Cache         // as in Config, or only while it opens

	mu     sync.Mutex          // guards what follows, and writes to the policy map
	policy map[podPair][]entry // what the policy map has, once it was read
	// duePairs are the pairs of pods whose open connections have not been looked at since
	// something new was allowed.
	duePairs map[podPair]bool
	// generationDue is set from a change of the policy map until the generation is
	// raised, which makes the programs look it up again.
	generationDue bool
	drift         map[uint64]bpf.ShortcutShare // of shares, as the last sweep found it
	guards        map[string]*guard            // attached, by name
	givenUp       map[uint64]bool              // ids of flows that Unload does not wait for
	renamed       bool                         // the pins have suffixOld
	other         bool                         // objects has only what openAny finds
	unloaded      bool                         // nothing can be changed or asked: the removal has begun, or has to come first
	removing      bool                         // the removal has begun: it is completed without waiting
	gone          bool                         // and it is complete
	left          int                          // sockets that the removal has left in the SOCKHASH
}

var (
	// ErrOtherBuild is returned by Open if another build has pinned maps with
	// another layout, and Config.OnIncompatible is OnIncompatibleFail.
	ErrOtherBuild = errors.New("the pins are of a build with another layout")
	// ErrInUse is returned by Open and OpenPins while another process owns the pins.
	ErrInUse = errors.New("another process owns the pins: is an agent running?")
	// ErrUnloaded is returned, once an unload has begun to delete and while
	// Replacing, by Enrol, SetPolicy, UpdatePolicy, Forget, SetLease and Lease.
	// Release and Sweep then have nothing to do and succeed, and what lists
	// something returns nothing.
	ErrUnloaded = errors.New("not loaded into the kernel: `podshunt-agent status` says why")
)

// Open loads and attaches the programs, or takes over what an earlier process has
// pinned; programs of another build are then replaced. Maps of another layout or size
// are drained and made anew, as Config.OnIncompatible says; if that takes long, what Open
// returns is Replacing. It returns ErrInUse while another process owns the pins, and
// ErrOtherBuild for another layout that is not to be drained: in both cases the pins stay
// as they are. The caller has to Close what Open returns.
func Open(cfg Config, log *slog.Logger) (*Datapath, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := rlimit.RemoveMemlock(); err != nil { // kernels before 5.11 count maps against it
		return nil, fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	var err error
	if cfg.Cgroup, err = findCgroup(cfg.Cgroup); err != nil {
		return nil, err
	}
	if err := cfg.prepareBPFFS(); err != nil {
		return nil, err
	}
	return open(cfg, log, nil)
}

func open(cfg Config, log *slog.Logger, step func(string) error) (*Datapath, error) {
	var noWatch error
	if cfg.JoinAfter > 0 && !cfg.WatchOnly {
		if noWatch = CheckWatch(); noWatch != nil {
			cfg.JoinAfter = 0
		}
	}
	d := &Datapath{
		cfg: cfg, log: log, noWatch: noWatch, guards: map[string]*guard{}, step: step, types: cmp.Or(cfg.Types, btf.NewCache()),
		duePairs: map[podPair]bool{}, joinDue: make(chan struct{}, 1), noCallbacks: cfg.joinWithoutCallbacks(),
	}
	defer func() { d.types = cfg.Types }()
	if err := d.open(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if d.other {
		return d, nil
	}
	d.joiner, d.noJoin = newJoiner(d.objects.Maps, d.types)
	if d.cfg.JoinAfter == 0 || d.cfg.WatchOnly {
		return d, nil
	}
	var err error
	if d.watcher, err = newWatcher(d.objects.Maps, d.types); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Datapath) open() error {
	if err := d.own(); err != nil {
		return err
	}
	if err := d.finish(); err != nil {
		return err
	}
	there, err := exists(d.cfg.PinDir)
	if err != nil {
		return err
	}
	if there {
		if replaced, err := d.inherit(); err != nil || !replaced {
			return err
		}
	}
	fresh := d.cfg.PinDir + suffixNew
	if err := d.create(fresh); err != nil {
		return errors.Join(err, d.removePins(fresh))
	}
	return nil
}

func (c Config) prepareBPFFS() error {
	dir := filepath.Dir(c.PinDir)
	if c.MountBPFFS {
		_, err := ensureBPFFS(dir)
		return err
	}
	there, err := isBPFFS(dir)
	if err == nil && !there {
		err = fmt.Errorf("pin directory %s: %s is not in a bpffs, and the agent may not mount one: "+
			"run `podshunt-agent mount-bpffs` on the node first", c.PinDir, dir)
	}
	return err
}

// create makes all objects, pins them in the directory fresh, and publishes it by a
// rename.
func (d *Datapath) create(fresh string) error {
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	if err := d.ownPins(fresh); err != nil {
		return err
	}
	if err := d.at("directory made"); err != nil {
		return err
	}
	spec, err := bpf.LoadShortcut()
	if err != nil {
		return err
	}
	for name, size := range d.cfg.sizes() {
		spec.Maps[name].MaxEntries = size
	}
	if err := d.load(spec, nil, fresh); err != nil {
		return err
	}
	for name := range sharedMaps(spec) {
		if err := d.objects.Maps[name].Pin(filepath.Join(fresh, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
		if err := d.at("map pinned"); err != nil {
			return err
		}
	}
	if err := d.attach(fresh); err != nil {
		return err
	}
	if err := d.at("all attached"); err != nil {
		return err
	}
	if err := os.Rename(fresh, d.cfg.PinDir); err != nil {
		return fmt.Errorf("publish the pins: %w", err)
	}
	return d.at("published")
}

// takeOver goes on with the pinned maps. Sockets keep the sk_msg program that they
// joined with, which reads the new settings from the maps.
func (d *Datapath) takeOver() error {
	if err := d.ownPins(d.cfg.PinDir); err != nil {
		return err
	}
	spec, err := bpf.LoadShortcut()
	if err != nil {
		return err
	}
	pinned, err := openOwn(d.cfg.PinDir, spec)
	defer closeMaps(pinned)
	if err != nil {
		return err
	}
	for name, size := range d.cfg.sizes() {
		have := pinned[name].MaxEntries()
		if have == size {
			continue
		}
		if d.cfg.OnIncompatible == OnIncompatibleDrain {
			return fmt.Errorf("map %s has %d entries, and %d are wanted: %w", name, have, size, errSize)
		}
		d.log.Warn("a map keeps its size until the next unload", "map", name, "size", have, "wanted", size)
	}
	if err := d.load(spec, pinned, d.cfg.PinDir); err != nil {
		return err
	}
	if err := d.updateGuards(); err != nil {
		return err
	}
	if err := d.attach(d.cfg.PinDir); err != nil {
		return err
	}
	// The process before may have been killed after it changed the policy map, and
	// before it raised the generation.
	d.generationDue = true
	return d.raiseGeneration()
}

// OpenPins opens what an earlier process has pinned in dir, complete or not, to look
// at it or to unload it. It attaches nothing. It returns fs.ErrNotExist if there are
// no pins, and ErrInUse while another process owns them.
func OpenPins(dir string, log *slog.Logger) (*Datapath, error) { return openPins(dir, log, nil) }

func openPins(dir string, log *slog.Logger, step func(string) error) (*Datapath, error) {
	if there, err := anyPins(dir); err != nil || !there {
		return nil, errors.Join(err, fmt.Errorf("look for pins in %s: %w", dir, fs.ErrNotExist))
	}
	d := &Datapath{cfg: Config{PinDir: dir}, log: log, step: step}
	if err := d.openPins(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Datapath) openPins() error {
	if err := d.own(); err != nil {
		return err
	}
	spec, err := bpf.LoadShortcut()
	if err != nil {
		return err
	}
	d.objects = &ebpf.Collection{}
	there, err := exists(d.cfg.PinDir)
	if err != nil || !there {
		return err
	}
	if err := d.ownPins(d.cfg.PinDir); err != nil {
		return err
	}
	d.objects.Maps, err = openOwn(d.cfg.PinDir, spec)
	switch {
	case errors.Is(err, errNoMap): // Unload does what it can with the others
		d.log.Warn("a map is not pinned any more", "err", err)
		return nil
	case errors.Is(err, ErrOtherBuild):
		return d.openOther()
	}
	return err
}

// load loads the maps and programs, with the first observer that the kernel
// takes, and attaches that observer.
func (d *Datapath) load(spec *ebpf.CollectionSpec, pinned map[string]*ebpf.Map, dir string) error {
	candidates := []string{ObserverFexit, ObserverTracepoint}
	if d.cfg.Observer != ObserverAuto {
		candidates = []string{d.cfg.Observer}
	}
	var errs []error
	for _, observer := range candidates {
		objects, err := loadWith(observer, spec, pinned, d.types)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := d.attachObserver(dir, observer, objects.Programs[observerPrograms()[observer]]); err != nil {
			objects.Close()
			errs = append(errs, err)
			continue
		}
		d.objects, d.observer = objects, observer
		return nil
	}
	return errors.Join(errs...)
}

func observerPrograms() map[string]string {
	return map[string]string{ObserverFexit: bpf.ShortcutProgObserveFexit, ObserverTracepoint: bpf.ShortcutProgObserveTracepoint}
}

// loadWith loads everything with one observer.
func loadWith(observer string, spec *ebpf.CollectionSpec, pinned map[string]*ebpf.Map, types *btf.Cache) (*ebpf.Collection, error) {
	one := spec.Copy()
	for name, program := range observerPrograms() {
		if name != observer {
			delete(one.Programs, program)
		}
	}
	for _, program := range append(joinPrograms(), bpf.ShortcutProgInsertCandidates) {
		delete(one.Programs, program)
	}
	delete(one.Maps, bpf.ShortcutMapJoining)
	objects, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{MapReplacements: pinned, Cache: types})
	if err != nil {
		return nil, fmt.Errorf("load with observer %s: %w", observer, err)
	}
	return objects, nil
}

// attach writes the settings and attaches the programs but the observer, which load
// has attached. track comes last: a connection that it pairs needs deliver to decide
// and the observer to count.
func (d *Datapath) attach(dir string) error {
	if err := d.setControl(func(s *bpf.ShortcutSettings) {
		s.Layout = layout
		s.Redirect = 1
		s.Budget = d.cfg.Budget
		s.PodBudget = d.cfg.PodBudget
		s.RefreshNs = uint64(d.cfg.RefreshInterval)
		s.TrialReads, s.TrialBytes, s.TrialDrains = d.cfg.TrialReads, d.cfg.TrialBytes, d.cfg.TrialDrains
		s.FlowShare = half(d.objects.Maps[bpf.ShortcutMapFlows].MaxEntries())
		s.LearnedShare = half(d.objects.Maps[bpf.ShortcutMapLearned].MaxEntries())
		s.SpliceSeen = number(slices.Contains(d.cfg.Guards, GuardSplice))
		s.AllowBlocking = number(d.cfg.AllowBlocking)
		s.NoMptcpListeners = number(d.mptcpListenersKeptOut())
		s.NoCallbacks = number(d.noCallbacks)
		s.JoinAfter, s.JoinHalvesNs, s.LeaveRatio = d.cfg.JoinAfter, uint64(d.cfg.joinHalves), d.cfg.LeaveRatio
		if s.LeaveRatio > 0 {
			s.Compare, s.BusyNs = d.cfg.compare, uint32(d.cfg.busy)
		}
	}); err != nil {
		return err
	}
	for _, attach := range []func(string) error{d.attachDeliver, d.attachKeepMPTCPOut, d.attachEndLate, d.attachTrack} {
		if err := d.at("next attachment"); err != nil {
			return err
		}
		if err := attach(dir); err != nil {
			return err
		}
	}
	return nil
}

func (d *Datapath) mptcpListenersKeptOut() bool { return d.cfg.noMPTCPListeners || mptcpUnsafe() }

// Close closes this process's handles of the objects. The pins stay: flows and
// pairing go on.
func (d *Datapath) Close() error {
	var errs []error
	for _, l := range d.links {
		errs = append(errs, l.Close())
	}
	d.links = nil
	for _, g := range d.guards {
		errs = append(errs, g.close())
	}
	clear(d.guards)
	errs = append(errs, d.joiner.close(), d.watcher.close())
	d.joiner, d.watcher = nil, nil
	if d.objects != nil {
		d.objects.Close()
		d.objects = nil
	}
	return errors.Join(append(errs, d.disown())...)
}

// Observer returns the observer that is attached: ObserverFexit or
// ObserverTracepoint.
func (d *Datapath) Observer() string { return d.observer }

// Cgroup returns the cgroup whose connections are seen.
func (d *Datapath) Cgroup() string { return d.cfg.Cgroup }

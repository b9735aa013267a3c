// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// Observers: the two programs that can count what applications read.
const (
	ObserverAuto       = "auto"
	ObserverFexit      = "fexit"
	ObserverTracepoint = "tracepoint"
)

// Config says where the kernel objects live, how large they are and how they behave.
// Sizes (the fields whose names begin with Max) take effect when the objects are
// created: pins that are taken over keep theirs. DefaultConfig has the defaults; a
// zero value means something only where its field says so.
type Config struct {
	// Cgroup is a directory of a cgroup2: the programs see connections of the
	// processes below it. Empty means the root of the first cgroup2 mount.
	Cgroup string
	// PinDir is a directory in a bpffs.
	PinDir string
	// MountBPFFS lets Open mount a bpffs on the parent of PinDir if there is none, and
	// if that is /sys/fs/bpf or an empty directory below it. In a container that mount,
	// and all pins with it, would end with the container.
	MountBPFFS bool
	// Budget limits, in bytes, what the receiver of one direction may leave unread
	// before the direction spills to TCP. Each message counts 1024 bytes more. A
	// direction begins with 128 KiB, or with what its receiver has read by TCP, and
	// grows with what the receiver reads, up to this.
	Budget uint32
	// PodBudget limits the same for all receivers of a pod together.
	PodBudget uint64
	// RefreshInterval sends one message of a direction by TCP when none has gone
	// that way for so long, so that conntrack and the like see that the connection
	// is in use. 0 never does.
	RefreshInterval time.Duration
	// TrialReads and TrialBytes set what a receiver must take by recv from TCP before
	// anything is redirected to it: so many recv calls, and before bursts above 4 KiB
	// are, so many bytes of such bursts. A burst that is larger than any before also
	// goes by TCP, up to 64 KiB, unless TrialBytes is 0.
	TrialReads, TrialBytes uint32
	// TrialDrains sets how often a receiver that waits for edges of epoll must be seen
	// to call recv after one that did not fill its buffer, and to find nothing.
	TrialDrains uint32
	// MaxPolicies and MaxFlows set the sizes, in entries, of the maps of policies and
	// of flows.
	MaxPolicies, MaxFlows uint32
	// Tests alone set maxPods, maxHandshakes and maxSockets, the sizes of the maps of
	// pods, of unfinished handshakes and of sockets. 0 derives them from the sizes above: one
	// pod for 128 policies and one handshake for two flows, at least 1024 of each, and
	// two sockets for each flow.
	maxPods, maxHandshakes, maxSockets uint32
	// AllowBlocking lets blocking sockets take part, although a recv that sleeps can
	// then return EAGAIN, such as after a signal or a reset (hazard "blocking-recv").
	// Without it, only sockets in non-blocking mode take part.
	AllowBlocking bool
	// Observer is ObserverAuto, ObserverFexit or ObserverTracepoint.
	Observer string
	// Guards names the guards to attach while a pod takes part or a flow is
	// left. A guard that the kernel refuses makes Enrol fail.
	Guards []string
	// Tests alone set noMPTCPListeners, which keeps out sockets that an MPTCP listener
	// has accepted. Open does so in any case on kernels that they would harm.
	noMPTCPListeners bool
}

// DefaultConfig returns what the agent runs with unless told otherwise.
func DefaultConfig() Config {
	return Config{
		PinDir:     api.PinDir,
		MountBPFFS: true,
		Budget:     8 << 20, // a stream with both ends on one core needs as much (docs/measurements.md)
		PodBudget:  16 << 20,

		RefreshInterval: 30 * time.Second,
		TrialReads:      32,
		TrialBytes:      256 << 10,
		TrialDrains:     4,

		MaxPolicies: 131072,
		MaxFlows:    32768,
		Observer:    ObserverAuto,
	}
}

// Validate returns an error that says which values are accepted.
func (c Config) Validate() error {
	switch c.Observer {
	case ObserverAuto, ObserverFexit, ObserverTracepoint:
	default:
		return fmt.Errorf("observer %q: accepted are %q, %q and %q", c.Observer, ObserverAuto, ObserverFexit, ObserverTracepoint)
	}
	for _, name := range c.Guards {
		if names := GuardNames(); !slices.Contains(names, name) {
			return fmt.Errorf("guard %q: accepted are %s", name, strings.Join(names, ", "))
		}
	}
	if !filepath.IsAbs(c.PinDir) {
		return fmt.Errorf("pin directory %q: accepted is an absolute path in a bpffs such as %s", c.PinDir, api.PinDir)
	}
	if c.Budget < 4096 || c.Budget > 1<<30 {
		return fmt.Errorf("budget of %d bytes: accepted are 4096 to %d", c.Budget, 1<<30)
	}
	if c.PodBudget < uint64(c.Budget) || c.PodBudget > 1<<40 {
		return fmt.Errorf("pod budget of %d bytes: accepted are the budget of a direction, %d, to %d", c.PodBudget, c.Budget, 1<<40)
	}
	if c.RefreshInterval < 0 || c.RefreshInterval > 0 && c.RefreshInterval < 100*time.Millisecond {
		return fmt.Errorf("refresh interval %v: accepted are 0, which is never, and 100ms and above", c.RefreshInterval)
	}
	if c.TrialBytes > 1<<30 {
		return fmt.Errorf("trial of %d bytes: accepted are 0 to %d", c.TrialBytes, 1<<30)
	}
	if c.MaxPolicies == 0 || c.MaxFlows == 0 {
		return errors.New("size of a map is 0: accepted are 1 and above")
	}
	return nil
}

// Datapath is the open set of kernel objects. Its methods may be called from several
// goroutines, except Close, which must be the last call.
type Datapath struct {
	cfg      Config
	log      *slog.Logger
	observer string
	objects  *ebpf.Collection
	links    []link.Link
	lock     *os.File           // of own
	pins     *os.File           // of ownPins
	step     func(string) error // see at; nil but in tests

	mu     sync.Mutex          // guards what follows, and writes to the policy map
	policy map[podPair][]entry // what the policy map has, once it was read
	// generationDue is set from a change of the policy map until the generation is
	// raised, which makes the programs look it up again.
	generationDue bool
	drift         map[uint64]bpf.ShortcutShare // of shares, as the last sweep found it
	guards        map[string]*guard            // attached, by name
	givenUp       map[uint64]bool              // ids of flows that Unload does not wait for
	renamed       bool                         // the pins have suffixOld
	unloaded      bool                         // the removal has begun: nothing can be changed or asked
	gone          bool                         // and it is complete
	left          int                          // sockets that the removal has left in the SOCKHASH
}

var (
	// ErrOtherBuild is returned by Open if another build has pinned maps with
	// another layout.
	ErrOtherBuild = errors.New("the pins are of another build: run that build's `podshunt-agent unload` first")
	// ErrInUse is returned by Open and OpenPins while another process owns the pins.
	ErrInUse = errors.New("another process owns the pins: is an agent running?")
	// ErrUnloaded is returned, once an unload has begun to delete, by Enrol,
	// SetPolicy, UpdatePolicy, Forget, SetLease and Lease. Release and Sweep
	// then have nothing to do and succeed, and what lists something returns
	// nothing.
	ErrUnloaded = errors.New("unloaded: restart the agent to load again")
)

// Open loads and attaches the programs, or takes over what an earlier process has
// pinned; programs of another build are then replaced. It returns ErrInUse while
// another process owns the pins, and ErrOtherBuild if the pinned maps have another
// layout: in both cases the pins stay as they are. The caller has to Close what Open
// returns.
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
	d := &Datapath{cfg: cfg, log: log, guards: map[string]*guard{}, step: step}
	if err := d.open(); err != nil {
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
		err := d.takeOver()
		if !errors.Is(err, errNoMap) {
			if err != nil {
				err = fmt.Errorf("take over the pins in %s: %w", d.cfg.PinDir, err)
			}
			return err
		}
		if err := d.abandon(err); err != nil {
			return fmt.Errorf("replace the pins in %s: %w", d.cfg.PinDir, err)
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
	pinned, err := openMaps(d.cfg.PinDir, sharedMaps(spec))
	defer closeMaps(pinned)
	if err != nil {
		return err
	}
	for name, size := range d.cfg.sizes() {
		if have := pinned[name].MaxEntries(); have != size {
			d.log.Warn("a map keeps its size until the next unload", "map", name, "size", have, "wanted", size)
		}
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
	// Unload needs no other maps than these; if one is missing it does what it can.
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
	d.objects.Maps, err = openMaps(d.cfg.PinDir, sharedMaps(spec))
	if errors.Is(err, errNoMap) {
		d.log.Warn("a map is not pinned any more", "err", err)
		err = nil
	}
	return err
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

// sizes returns the configured sizes by map name.
func (c Config) sizes() map[string]uint32 {
	pods := cmp.Or(c.maxPods, max(c.MaxPolicies/128, 1024))
	handshakes := cmp.Or(c.maxHandshakes, max(c.MaxFlows/2, 1024))
	return map[string]uint32{
		bpf.ShortcutMapPods:     pods,
		bpf.ShortcutMapPolicies: c.MaxPolicies,
		bpf.ShortcutMapFlows:    c.MaxFlows,
		bpf.ShortcutMapSockets:  cmp.Or(c.maxSockets, 2*c.MaxFlows),
		bpf.ShortcutMapSyns:     handshakes,
		bpf.ShortcutMapPending:  handshakes,
		// The entry of a pod that has gone stays until its last flow has
		// ended: hence twice.
		bpf.ShortcutMapCharges: 2 * pods,
		bpf.ShortcutMapShares:  2 * pods,
	}
}

// sharedMaps returns the maps that all processes and programs must share: all but the constants (.rodata).
func sharedMaps(spec *ebpf.CollectionSpec) map[string]*ebpf.MapSpec {
	shared := maps.Clone(spec.Maps)
	maps.DeleteFunc(shared, func(name string, _ *ebpf.MapSpec) bool { return strings.HasPrefix(name, ".") })
	return shared
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
		objects, err := loadWith(observer, spec, pinned)
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
func loadWith(observer string, spec *ebpf.CollectionSpec, pinned map[string]*ebpf.Map) (*ebpf.Collection, error) {
	one := spec.Copy()
	for name, program := range observerPrograms() {
		if name != observer {
			delete(one.Programs, program)
		}
	}
	objects, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{MapReplacements: pinned})
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
	}); err != nil {
		return err
	}
	for _, attach := range []func(string) error{d.attachDeliver, d.attachKeepMPTCPOut, d.attachTrack} {
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

// half returns how many entries one pod may have in a map that connections fill.
func half(entries uint32) uint32 { return max(1, entries/2) }

func number(yes bool) uint32 {
	if yes {
		return 1
	}
	return 0
}

func (d *Datapath) setControl(change func(*bpf.ShortcutSettings)) error {
	var s bpf.ShortcutSettings
	control := d.objects.Maps[bpf.ShortcutMapControl]
	if err := control.Lookup(uint32(0), &s); err != nil {
		return fmt.Errorf("read the controls: %w", err)
	}
	change(&s)
	if err := control.Put(uint32(0), s); err != nil {
		return fmt.Errorf("write the controls: %w", err)
	}
	return nil
}

// SetLease lets the programs trust the policy for so long from now on; 0 is for
// ever. After that every message goes by TCP and no connection is paired, until the
// next call. It returns ErrUnloaded after an unload.
func (d *Datapath) SetLease(lease time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return ErrUnloaded
	}
	return d.setControl(func(s *bpf.ShortcutSettings) {
		s.LeaseNs = 0
		if lease > 0 {
			s.LeaseNs = uint64(monotonic() + lease)
		}
	})
}

// Lease returns when the trust ends that SetLease has set in this process or in an
// earlier one; the zero time means never. It returns ErrUnloaded after an unload.
func (d *Datapath) Lease() (time.Time, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return time.Time{}, ErrUnloaded
	}
	var s bpf.ShortcutSettings
	if err := d.objects.Maps[bpf.ShortcutMapControl].Lookup(uint32(0), &s); err != nil {
		return time.Time{}, fmt.Errorf("read the controls: %w", err)
	}
	if s.LeaseNs == 0 {
		return time.Time{}, nil
	}
	return time.Now().Add(time.Duration(s.LeaseNs) - monotonic()), nil
}

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

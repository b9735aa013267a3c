// SPDX-License-Identifier: Apache-2.0

// What a datapath is opened with.

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf/btf"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// Observers: the two programs that can count what applications read.
const (
	ObserverAuto       = "auto"
	ObserverFexit      = "fexit"
	ObserverTracepoint = "tracepoint"
)

// What Open does with pins of another layout.
const (
	// OnIncompatibleDrain turns redirecting off, waits until all redirected bytes are
	// read, takes the pins down and makes new ones. It does so for maps of another size, too.
	OnIncompatibleDrain = "drain"
	// OnIncompatibleFail returns ErrOtherBuild. Maps keep their size.
	OnIncompatibleFail = "fail"
)

// Config says where the kernel objects live, how large they are and how they behave.
// Sizes are the fields whose names begin with Max: see OnIncompatible. DefaultConfig has the defaults; a
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
	// JoinAfter sets how many segments of data a connection must have sent and received
	// before it joins: until then it is watched, and costs next to nothing. With 0 all
	// connections join at their handshake.
	JoinAfter uint32
	// Tests alone set joinHalves. Connections to a port of those that have ended soon after
	// they have joined must exchange more than JoinAfter; each time after this, half of it.
	joinHalves time.Duration
	// WatchOnly has connections watched, and none joins: a measurement of that, also where
	// the kernel refuses what would let them join (CheckWatch).
	WatchOnly bool
	// LeaveRatio sets when a connection leaves: when so many times as many of its messages
	// are no faster by the shortcut as are. With 0 none leaves.
	LeaveRatio uint32
	// Tests alone set compare: eighths of TCP's speed that the shortcut must reach for a
	// stream, or the connection leaves. With 0, or if none leaves, they are not compared. A
	// program that lets more time pass between two messages than busy, and 8 ns for each of
	// their bytes, sets the pace itself, and stays.
	compare uint32
	busy    time.Duration
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
	// OnIncompatible is OnIncompatibleDrain or OnIncompatibleFail.
	OnIncompatible string
	// Observer is ObserverAuto, ObserverFexit or ObserverTracepoint.
	Observer string
	// Guards names the guards to attach while a pod takes part or a flow is
	// left. A guard that the kernel refuses makes Enrol fail.
	Guards []string
	// Types keeps the kernel's types, for those who open one Datapath after the other. If it is
	// nil, they are read whenever programs are loaded, and not kept.
	Types *btf.Cache
	// Tests alone set noMPTCPListeners, which keeps out sockets that an MPTCP listener
	// has accepted. Open does so in any case on kernels that they would harm.
	noMPTCPListeners bool
	// Tests alone set noLateCallbacks, which treats every kernel as one where sockets that
	// join late get no callbacks.
	noLateCallbacks bool
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
		JoinAfter:       32,
		joinHalves:      10 * time.Second,
		LeaveRatio:      3,
		compare:         9, // as in the SOCKHASH TCP is slower than outside
		busy:            50 * time.Microsecond,

		MaxPolicies: 131072,
		MaxFlows:    32768,
		Observer:    ObserverAuto,

		OnIncompatible: OnIncompatibleDrain,
	}
}

// Validate returns an error that says which values are accepted.
func (c Config) Validate() error {
	switch c.Observer {
	case ObserverAuto, ObserverFexit, ObserverTracepoint:
	default:
		return fmt.Errorf("observer %q: accepted are %q, %q and %q", c.Observer, ObserverAuto, ObserverFexit, ObserverTracepoint)
	}
	if c.OnIncompatible != OnIncompatibleDrain && c.OnIncompatible != OnIncompatibleFail {
		return fmt.Errorf("on incompatible %q: accepted are %q and %q", c.OnIncompatible, OnIncompatibleDrain, OnIncompatibleFail)
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
	if c.JoinAfter > 1<<20 {
		return fmt.Errorf("join after %d segments: accepted are 0, which is at the handshake, to %d", c.JoinAfter, 1<<20)
	}
	if c.LeaveRatio > 1<<16 {
		return fmt.Errorf("leave ratio of %d: accepted are 0, which is never, to %d", c.LeaveRatio, 1<<16)
	}
	if c.MaxPolicies == 0 || c.MaxFlows == 0 {
		return errors.New("size of a map is 0: accepted are 1 and above")
	}
	return nil
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
		bpf.ShortcutMapOffers:   handshakes,
		// The entry of a pod that has gone stays until its last flow has
		// ended: hence twice.
		bpf.ShortcutMapCharges: 2 * pods,
		bpf.ShortcutMapShares:  2 * pods,
	}
}

// half returns how many entries one pod may have in a map that connections fill.
func half(entries uint32) uint32 { return max(1, entries/2) }

// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/bpf"
)

// For tests: as Open and OpenPins, with a function that is called between the
// steps of making the pins and of taking them down. Its error ends what is done.
var (
	OpenInSteps     = open
	OpenPinsInSteps = openPins
)

// SetSizes sets sizes of maps that the agent derives from others; 0 derives it here, too.
func (c *Config) SetSizes(pods, handshakes, sockets uint32) {
	c.maxPods, c.maxHandshakes, c.maxSockets = pods, handshakes, sockets
}

// SetNoMPTCPListeners keeps sockets of MPTCP listeners out whatever the kernel.
func (c *Config) SetNoMPTCPListeners(yes bool) { c.noMPTCPListeners = yes }

// SetNoLateCallbacks gives sockets that join late no callbacks, whatever the kernel.
func (c *Config) SetNoLateCallbacks(yes bool) { c.noLateCallbacks = yes }

// SetCompare sets how many eighths of TCP's speed the shortcut must reach for a stream, and how
// much time may pass between the messages of one that does not set the pace itself.
func (c *Config) SetCompare(eighths uint32, busy time.Duration) { c.compare, c.busy = eighths, busy }

// SetJoinHalves sets how long it takes until half of what connections to a port must have exchanged
// is enough.
func (c *Config) SetJoinHalves(after time.Duration) { c.joinHalves = after }

// MakeControlsReadOnly makes writes of the controls fail until restore.
func (d *Datapath) MakeControlsReadOnly(tb testing.TB) (restore func()) {
	tb.Helper()
	readOnly, err := ebpf.LoadPinnedMap(filepath.Join(d.cfg.PinDir, bpf.ShortcutMapControl), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		tb.Fatal(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	writable := d.objects.Maps[bpf.ShortcutMapControl]
	d.objects.Maps[bpf.ShortcutMapControl] = readOnly
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.objects.Maps[bpf.ShortcutMapControl] = writable
		readOnly.Close()
	}
}

// KillJoin ends the next Join after some rounds, as if the agent was killed: Join then
// returns killed.
func (d *Datapath) KillJoin(rounds int, killed error) {
	d.joiner.killed = func() error {
		rounds--
		if rounds < 0 {
			return killed
		}
		return nil
	}
}

// MissReads calls do while no read is observed, as if the kernel did not run the
// observer.
func (d *Datapath) MissReads(tb testing.TB, do func()) {
	tb.Helper()
	pin := filepath.Join(d.cfg.PinDir, pinObserve+d.observer)
	if err := errors.Join(os.Remove(pin), d.links[0].Close()); err != nil { // load attaches it before all others
		tb.Fatal(err)
	}
	others := d.links[1:]
	defer func() {
		d.links = nil
		if err := d.attachObserver(d.cfg.PinDir, d.observer, d.objects.Programs[observerPrograms()[d.observer]]); err != nil {
			tb.Error(err)
		}
		d.links = append(d.links, others...)
	}()
	do()
}

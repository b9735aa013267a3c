// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustMarkLayout makes the pins those of a build with another layout.
func (n *node) mustMarkLayout(tb testing.TB, number uint32) {
	tb.Helper()
	control, err := ebpf.LoadPinnedMap(filepath.Join(n.Config.PinDir, "control"), nil)
	if err != nil {
		tb.Fatal(err)
	}
	var s bpf.ShortcutSettings
	err = control.Lookup(uint32(0), &s)
	s.Layout = number
	if err = errors.Join(err, control.Put(uint32(0), s), control.Close()); err != nil {
		tb.Fatal(err)
	}
}

// incompatible are the changes from one process to the next after which maps are made anew.
func incompatible() map[string]func(testing.TB, *node) {
	return map[string]func(testing.TB, *node){
		"no layout":    func(tb testing.TB, n *node) { n.mustMarkLayout(tb, 0) },
		"newer layout": func(tb testing.TB, n *node) { n.mustMarkLayout(tb, 1<<31) },
		"other sizes":  func(_ testing.TB, n *node) { n.Config.MaxFlows++ },
	}
}

// TestDrain: maps of another layout or size are drained and made anew under load: no byte is
// lost, and new connections take the shortcut.
func TestDrain(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustListenOn(t, pods[1])
	for name, change := range incompatible() {
		t.Run(name, func(t *testing.T) {
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			endTalk := mustTalk(t, pods[0], l, address, 3, 2)
			before := n.counts(t)["message_shortcut"]
			waitUntil(t, "messages by shortcut", func() bool { return n.counts(t)["message_shortcut"] > before+100 })
			old := mustObjects(t, n.Config.PinDir)
			n.mustClose(t)
			change(t, n)
			n.MustOpen(t)
			if n.Replacing() {
				t.Fatal("got it replacing, want it drained: all programs read")
			}
			old.waitGone(t)
			if enrolled, err := n.Enrolled(); err != nil || len(enrolled) != 0 {
				t.Errorf("got %v enrolled, %v; want none", enrolled, err)
			}
			for _, cookie := range cookies {
				if err := n.Enrol(cookie); err != nil {
					t.Fatal(err)
				}
			}
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			from := n.counts(t)
			c, s := connect(t, pods[0].Netns, l, "tcp4", address)
			sandboxtest.MustPing(t, c, s, 10, 100)
			n.mustCount(t, from, paired())
			endTalk()
			for _, m := range n.usage(t) {
				if m == 0 {
					t.Error("a map is empty")
				}
			}
			if got := n.mustPinned(t, "flows").MaxEntries(); got != n.Config.MaxFlows {
				t.Errorf("got map flows of %d entries, want %d", got, n.Config.MaxFlows)
			}
		})
	}
}

// TestReplacing: while a program does not read what was redirected, the pins stay, and all goes
// by TCP; when it has read, they are taken down. Who comes meanwhile goes on with it.
func TestReplacing(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustListenOn(t, pods[1])
	for name, change := range incompatible() {
		t.Run(name, func(t *testing.T) {
			for _, cookie := range cookies {
				if err := n.Enrol(cookie); err != nil {
					t.Fatal(err)
				}
			}
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			c, s := connect(t, pods[0].Netns, l, "tcp4", address)
			sandboxtest.MustPing(t, c, s, 10, 100)
			unread := traffic{seed: 1, bytes: 100_000, maxWrite: 10_000, maxRead: 10_000}
			if err := unread.write(c); err != nil {
				t.Fatal(err)
			}
			old := mustObjects(t, n.Config.PinDir)
			n.mustClose(t)
			change(t, n)
			later := traffic{seed: 2, bytes: 20_000, maxWrite: 10_000, maxRead: 10_000}
			for range 2 { // the second one as after a crash
				n.MustOpen(t)
				if !n.Replacing() {
					t.Fatal("got it not replacing, want it to wait for a program that does not read")
				}
				n.wantWaiting(t, c, s)
				n.wantPinned(t, "podshunt", "podshunt_lock")
				if err := n.Enrol(cookies[0]); !errors.Is(err, datapath.ErrUnloaded) {
					t.Errorf("enrol: got %v, want %v", err, datapath.ErrUnloaded)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
				waiting, err := n.Unload(ctx)
				cancel()
				if !errors.Is(err, context.DeadlineExceeded) || len(waiting) != 1 {
					t.Fatalf("unload: got %d flows and %v, want 1 and a timeout", len(waiting), err)
				}
				if err := later.write(c); err != nil {
					t.Fatal(err)
				}
				n.mustClose(t)
			}
			n.MustOpen(t)
			done := make(chan error, 1)
			go func() {
				_, err := n.Unload(t.Context())
				done <- err
			}()
			if err := errors.Join(unread.read(s), later.read(s), later.read(s)); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			old.waitGone(t)
			n.wantPinned(t)
			n.mustClose(t)
			n.MustOpen(t)
			if n.Replacing() {
				t.Fatal("got it replacing, want new pins")
			}
			sandboxtest.MustPing(t, c, s, 10, 1000)
		})
	}
}

// wantWaiting wants the datapath to wait for a connection.
func (n *node) wantWaiting(tb testing.TB, c, s net.Conn) {
	tb.Helper()
	for name, list := range map[string]func() ([]datapath.Flow, error){"Waiting": n.Waiting, "Flows": n.Flows} {
		flows, err := list()
		if err != nil || len(flows) != 1 {
			tb.Fatalf("%s: got %d flows, %v; want 1", name, len(flows), err)
		}
		f := flows[0]
		if f.Client.String() != c.LocalAddr().String() || f.Server.String() != s.LocalAddr().String() || !f.ToServer.Redirected || f.ToClient.Redirected {
			tb.Errorf("%s: got %+v, want %v to %v with bytes to the server", name, f, c.LocalAddr(), s.LocalAddr())
		}
	}
}

// TestUnloadOtherLayout: an unload takes out what a build with another layout has pinned.
func TestUnloadOtherLayout(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	for _, number := range []uint32{0, 1 << 31} {
		w := n.mustLoad(t, pods)
		n.mustMarkLayout(t, number)
		n.mustClose(t)
		steps := n.mustRunTask(t, true, 0)
		n.wantPinned(t)
		w.mustEnd(t)
		n.MustOpen(t)
		// As one that is killed, and finished by another start.
		w = n.mustLoad(t, pods)
		n.mustMarkLayout(t, number)
		n.mustClose(t)
		n.mustRunTask(t, true, len(steps)-3)
		n.mustFinish(t, number == 0)
		w.mustEnd(t)
	}
}

// TestIncompatibleFails: with OnIncompatibleFail nothing is touched, and the error says what to do.
func TestIncompatibleFails(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustMarkLayout(t, 1<<31)
	before := n.counts(t)
	n.mustClose(t)
	cfg := n.Config
	cfg.OnIncompatible = datapath.OnIncompatibleFail
	if d, err := datapath.Open(cfg, n.Log); !errors.Is(err, datapath.ErrOtherBuild) ||
		!strings.HasSuffix(err.Error(), "by `podshunt-agent unload`, or run with --on-incompatible=drain") {
		t.Fatalf("got %v %v, want %v, and what to do", d, err, datapath.ErrOtherBuild)
	}
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustMarkLayout(t, uint32(bpf.ShortcutLayoutLAYOUT))
	n.MustOpen(t)
	n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
}

// TestUnreadablePins: pins whose controls nobody can read stay, and the error says what to do.
func TestUnreadablePins(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	before := n.counts(t)
	n.mustClose(t)
	path := filepath.Join(n.Config.PinDir, "control")
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), m.Pin(path), m.Close()); err != nil {
		t.Fatal(err)
	}
	want := "map control is of a build that this one knows nothing of, by which redirecting is turned off, and connections may use the shortcut: " +
		"restart the pods that take part, or reboot the node, then delete " + n.Config.PinDir
	if d, err := datapath.Open(n.Config, n.Log); err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Fatalf("got %v %v, want %s", d, err, want)
	}
	d, err := datapath.OpenPins(n.Config.PinDir, n.Log)
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Unload(t.Context())
	if err := errors.Join(err, d.Close()); err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Fatalf("unload: got %v, want %s", err, want)
	}
	n.wantPinned(t, "podshunt", "podshunt_lock")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	n.MustOpen(t) // the programs have the map
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
}

// TestUnknownPins: a removal takes what nobody knows with it.
func TestUnknownPins(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	w := n.mustLoad(t, pods)
	n.mustMarkLayout(t, 1<<31)
	n.mustClose(t)
	// Other names of links, one of them that of pairing, and a map more.
	for _, name := range []string{"link_track", "link_deliver"} {
		path := filepath.Join(n.Config.PinDir, name)
		if err := os.Rename(path, path+"_of_another"); err != nil && name == "link_track" {
			t.Fatal(err)
		}
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Pin(filepath.Join(n.Config.PinDir, "another")), m.Close()); err != nil {
		t.Fatal(err)
	}
	n.MustOpen(t)
	n.wantPinned(t, "podshunt", "podshunt_lock")
	w.mustEnd(t)
	if pins, err := filepath.Glob(filepath.Join(n.Config.PinDir, "*another")); err != nil || len(pins) > 0 {
		t.Errorf("got pins %q, %v; want none of before", pins, err)
	}
}

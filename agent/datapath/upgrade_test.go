// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustClose gives the datapath up as the end of the agent does.
func (n *node) mustClose(tb testing.TB) {
	tb.Helper()
	if err := n.Datapath.Close(); err != nil {
		tb.Fatal(err)
	}
}

// talk has two ends take turns until stop, with bytes that differ in every round.
func talk(a, b net.Conn, stop *atomic.Bool) error {
	for round := 0; !stop.Load(); round++ {
		// Of each round: how long all of them take is for the machine to say.
		limit := time.Now().Add(deadline)
		if err := errors.Join(a.SetDeadline(limit), b.SetDeadline(limit)); err != nil {
			return err
		}
		for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
			message := traffic{seed: byte(round), bytes: 10_000, maxWrite: 3000, maxRead: 4000}
			if err := message.write(way[0]); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
			if err := message.read(way[1]); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
		}
	}
	return nil
}

// mustTalk makes connections that have exchanged so many messages, and has the ends of each
// talk until the result is called.
func mustTalk(t *testing.T, from *sandbox.Pod, l net.Listener, address netip.AddrPort, connections, messages int) (end func()) {
	t.Helper()
	var (
		stop  atomic.Bool
		loads []func() error
	)
	for range connections {
		c, s := connect(t, from.Netns, l, "tcp4", address)
		sandboxtest.MustPing(t, c, s, messages, 100)
		loads = append(loads, func() error { return talk(c, s, &stop) })
	}
	done := make(chan error, 1)
	go func() { done <- together(loads...) }()
	return func() {
		t.Helper()
		stop.Store(true)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestTakeOver: the process goes and comes back under load. Flows keep their
// shortcut, and connections are paired while there is none, as the policy of
// the last one says.
func TestTakeOver(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server", "refused")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies[:2]...))
	l, address := mustListenOn(t, pods[1])
	refusedL, refusedAddress := mustListenOn(t, pods[2])

	const streams, restarts = 2, 5
	endTalk := mustTalk(t, pods[0], l, address, streams, 2)

	moved, misses := uint64(0), sandboxtest.MustMisses(t)
	for i := range restarts {
		before := n.counts(t)
		n.mustClose(t)
		c, s := connect(t, pods[0].Netns, l, "tcp4", address)
		sandboxtest.MustPing(t, c, s, 10, 100)
		refusedC, refusedS := connect(t, pods[0].Netns, refusedL, "tcp4", refusedAddress)
		sandboxtest.MustPing(t, refusedC, refusedS, 10, 100)
		n.MustOpen(t)

		after := n.since(t, before)
		if after["connection_paired"] != 1 || after["connection_policy_refused"] != 1 {
			t.Errorf("restart %d: got %v without a process, want one connection paired and one refused", i, after)
		}
		// Reads that the kernel has not shown put a direction on TCP (docs/limits.md).
		missed := sandboxtest.MustMisses(t) != misses
		if missed {
			t.Logf("restart %d: a program was not run; %v", i, after)
		} else if after["message_not_seen"] != 2 {
			t.Errorf("restart %d: got %v without a process, want two messages by TCP", i, after)
		}
		flows, err := n.Flows()
		if err != nil || len(flows) != streams+i+1 {
			t.Fatalf("restart %d: got %d flows (%v), want %d", i, len(flows), err, streams+i+1)
		}
		sum := uint64(0)
		for _, f := range flows {
			for _, d := range []datapath.Direction{f.ToServer, f.ToClient} {
				if !missed && (!d.Shortcut || d.Switches != 1) {
					t.Errorf("restart %d: got %+v, want a direction that has kept its shortcut", i, d)
				}
				sum += d.ShortcutBytes
				if missed {
					sum += d.TCPBytes
				}
			}
		}
		if sum <= moved+18*100 {
			t.Errorf("restart %d: got %d bytes after %d, want more: the streams stand still", i, sum, moved)
		}
		moved = sum
	}
	endTalk()
	// The policy of before is what changes are made to.
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	before := n.counts(t)
	c, s := connect(t, pods[0].Netns, refusedL, "tcp4", refusedAddress)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, paired())
	enrolled, err := n.Enrolled()
	if err != nil || len(enrolled) != 3 {
		t.Errorf("got %v enrolled, %v; want 3 pods", enrolled, err)
	}
}

// mustDetach deletes a pin that is all that holds its link, and waits for the
// kernel, which detaches in the background.
func mustDetach(tb testing.TB, pin string) {
	tb.Helper()
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		tb.Fatal(err)
	}
	info, err := l.Info()
	if err := errors.Join(err, l.Close(), os.Remove(pin)); err != nil {
		tb.Fatal(err)
	}
	waitUntil(tb, "the end of the link", func() bool {
		l, err := link.NewFromID(info.ID)
		if err == nil {
			err = l.Close()
		}
		return errors.Is(err, fs.ErrNotExist)
	})
	time.Sleep(100 * time.Millisecond) // its number goes first
}

// TestDeletedLink: what is no longer attached is attached again by the next
// process, and a flow of before goes on byte for byte.
func TestDeletedLink(t *testing.T) {
	for _, name := range []string{"link_track", "link_deliver", "link_observe_"} {
		t.Run(name, func(t *testing.T) {
			n := mustTwoPods(t, nil)
			old, oldS := n.connect(t)
			sandboxtest.MustPing(t, old, oldS, 10, 100)
			pins, err := filepath.Glob(filepath.Join(n.Config.PinDir, name+"*"))
			if err != nil || len(pins) != 1 {
				t.Fatalf("got pins %q, %v; want one", pins, err)
			}
			before := n.counts(t)
			n.mustClose(t)
			mustDetach(t, pins[0])
			sandboxtest.MustPing(t, old, oldS, 10, 100)
			middle, middleS := n.connect(t)
			sandboxtest.MustPing(t, middle, middleS, 10, 100)
			n.MustOpen(t)
			// The old flow's socket has the program even if the map has none.
			if got := n.since(t, before)["message_shortcut"]; got > 20 {
				t.Errorf("got %d messages by shortcut without the link, want none of the new connection", got)
			}

			before = n.counts(t)
			c, s := n.connect(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			n.mustCount(t, before, paired())
			sandboxtest.MustPing(t, old, oldS, 10, 100)
			sandboxtest.MustPing(t, middle, middleS, 10, 100)
			for _, c := range []net.Conn{c, s, old, oldS, middle, middleS} {
				c.Close()
			}
			n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
		})
	}
}

// TestDetachedTrack: pins whose pairing was detached, as by an unload of a former
// build that was killed, are taken over and pair again; an unload ends as ever.
func TestDetachedTrack(t *testing.T) {
	n := mustTwoPods(t, nil)
	for _, open := range []bool{true, false} {
		old, oldS := n.connect(t)
		sandboxtest.MustPing(t, old, oldS, 10, 100)
		objects := mustObjects(t, n.Config.PinDir)
		n.mustClose(t)
		track, err := link.LoadPinnedLink(filepath.Join(n.Config.PinDir, "link_track"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(track.Detach(), track.Close()); err != nil {
			t.Fatal(err)
		}
		if !open {
			n.mustUnloadPins(t)
			objects.waitGone(t)
			sandboxtest.MustPing(t, old, oldS, 10, 100)
			n.MustOpen(t)
			return
		}
		plain, plainS := n.connect(t)
		sandboxtest.MustPing(t, plain, plainS, 10, 100)
		n.MustOpen(t)
		before := n.counts(t)
		c, s := n.connect(t)
		sandboxtest.MustPing(t, c, s, 10, 100)
		n.mustCount(t, before, paired())
		sandboxtest.MustPing(t, old, oldS, 10, 100)
	}
}

// TestConfigChanges: what the next process may change of what it takes over,
// and what not.
func TestConfigChanges(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) { c.MaxFlows = 7 })
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 5000)
	n.mustCount(t, nil, paired())

	for _, tc := range []struct {
		name        string
		change      func(*datapath.Config)
		wantMessage string
		wantLog     string
	}{
		{"smaller budget", func(c *datapath.Config) { c.Budget = 4096 }, "message_budget", ""},
		{"larger budget", func(c *datapath.Config) { c.Budget = 8192 }, "message_shortcut", ""},
		{"size that stays", func(c *datapath.Config) { c.MaxFlows, c.OnIncompatible = 9, datapath.OnIncompatibleFail }, "message_shortcut", "map=flows size=7 wanted=9"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n.mustClose(t)
			tc.change(&n.Config)
			var text bytes.Buffer
			n.Log = slog.New(slog.NewTextHandler(&text, nil))
			n.MustOpen(t)
			if got := text.String(); !strings.Contains(got, tc.wantLog) || tc.wantLog == "" && got != "" {
				t.Errorf("got log %q, want %q in it", got, tc.wantLog)
			}
			before := n.counts(t)
			sandboxtest.MustPing(t, c, s, 1, 5000)
			n.mustCount(t, before, map[string]uint64{tc.wantMessage: 2})
		})
	}
	maps, err := n.Maps()
	if err != nil {
		t.Fatal(err)
	}
	want := api.MapUsage{Name: "flows", Entries: 1, Max: 7}
	for _, m := range maps {
		if m.Name == want.Name && m != want {
			t.Errorf("got %+v, want %+v", m, want)
		}
	}
}

// TestUnfinishedPins: what a crash in a first bring-up has left is swept, both
// by one that takes over and by a new one.
func TestUnfinishedPins(t *testing.T) {
	n := mustNode(t, nil)
	leave := func() string {
		dir := n.Config.PinDir + "_new"
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if err := errors.Join(os.Mkdir(dir, 0o700), m.Pin(filepath.Join(dir, "pods"))); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, unload := range []bool{false, true} {
		if unload {
			if _, err := n.Unload(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		n.mustClose(t)
		dir := leave()
		n.MustOpen(t)
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("unload %v: got %v for %s, want it gone", unload, err, dir)
		}
		if _, err := os.Stat(n.Config.PinDir); err != nil {
			t.Errorf("unload %v: %v", unload, err)
		}
	}
}

// TestUnload: redirected data that is unread is waited for; when it has been
// read, nothing is left in the kernel and the connection goes on by TCP. After
// that the datapath can be loaded anew.
func TestUnload(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, paired())

	unread := traffic{seed: 1, bytes: 100_000, maxWrite: 10_000, maxRead: 10_000}
	// tryUnload must give up, with the flow that it waits for.
	tryUnload := func() datapath.Direction {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		waiting, err := n.Unload(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || len(waiting) != 1 {
			t.Fatalf("unload: got %d flows and %v, want 1 and a timeout", len(waiting), err)
		}
		if _, err := os.Stat(n.Config.PinDir); err != nil {
			t.Errorf("pins: %v", err)
		}
		if diff := cmp.Diff(map[string]int{"pods": 2, "policies": 4, "flows": 1, "sockets": 2}, n.usage(t)); diff != "" {
			t.Errorf("map usage (-want +got):\n%s", diff)
		}
		return waiting[0].ToServer
	}
	if err := unread.write(c); err != nil {
		t.Fatal(err)
	}
	if got := tryUnload(); !got.Redirected || !got.Shortcut || got.Unread != uint64(unread.bytes) {
		t.Errorf("got direction %+v, want %d bytes unread, all redirected", got, unread.bytes)
	}
	before := n.counts(t)
	later := traffic{seed: 2, bytes: 20_000, maxWrite: 10_000, maxRead: 10_000}
	if err := later.write(c); err != nil {
		t.Fatal(err)
	}
	if got := n.since(t, before); len(got) != 1 || got["message_switched_off"] == 0 {
		t.Errorf("got %v while unloading, want message_switched_off only", got)
	}
	if got := tryUnload(); !got.Redirected || got.Shortcut || got.Unread != uint64(unread.bytes+later.bytes) {
		t.Errorf("got direction %+v, want %d bytes unread", got, unread.bytes+later.bytes)
	}
	if err := unread.read(s); err != nil {
		t.Fatal(err)
	}

	// What is left unread went by TCP: it need not be waited for.
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	for i := range 2 {
		if waiting, err := n.Unload(ctx); err != nil || len(waiting) != 0 {
			t.Fatalf("unload %d: got %d flows and %v, want none", i, len(waiting), err)
		}
	}
	if _, err := os.Stat(n.Config.PinDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pins: got %v, want them gone", err)
	}
	if err := later.read(s); err != nil {
		t.Fatal(err)
	}
	sandboxtest.MustPing(t, c, s, 100, 1000)
	if err := n.Enrol(n.cookies[0]); !errors.Is(err, datapath.ErrUnloaded) {
		t.Errorf("enrol: got %v, want %v", err, datapath.ErrUnloaded)
	}
	if err := n.SetPolicy(nil); !errors.Is(err, datapath.ErrUnloaded) {
		t.Errorf("set policy: got %v, want %v", err, datapath.ErrUnloaded)
	}
	if err := n.UpdatePolicy(nil); !errors.Is(err, datapath.ErrUnloaded) {
		t.Errorf("update policy: got %v, want %v", err, datapath.ErrUnloaded)
	}
	if flows, err := n.Flows(); err != nil || len(flows) != 0 {
		t.Errorf("got flows %v, %v; want none", flows, err)
	}

	n.MustOpen(t)
	if diff := cmp.Diff(map[string]int{}, n.usage(t)); diff != "" {
		t.Errorf("map usage after loading anew (-want +got):\n%s", diff)
	}
	n.mustCount(t, nil, map[string]uint64{})
	for _, cookie := range n.cookies {
		if err := n.Enrol(cookie); err != nil {
			t.Fatal(err)
		}
	}
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, n.cookies...))
	c2, s2 := n.connect(t)
	sandboxtest.MustPing(t, c2, s2, 10, 100)
	sandboxtest.MustPing(t, c, s, 10, 100) // on TCP until it reconnects
	n.mustCount(t, nil, paired())
}

// TestUnloadGivenUp: after an unload that has timed out, the next process
// redirects again.
func TestUnloadGivenUp(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	message := traffic{seed: 1, bytes: 1000, maxWrite: 1000, maxRead: 1000}
	if err := message.write(c); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := n.Unload(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("unload: got %v, want a timeout", err)
	}
	if err := message.read(s); err != nil {
		t.Fatal(err)
	}
	before := n.counts(t)
	sandboxtest.MustPing(t, c, s, 1, 100)
	n.mustCount(t, before, map[string]uint64{"message_switched_off": 2})
	n.mustClose(t)
	n.MustOpen(t)
	before = n.counts(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
}

// TestUnloadUnderLoad: streams do not notice an unload, nor the load anew.
func TestUnloadUnderLoad(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustListenOn(t, pods[1])
	for range 3 {
		for _, cookie := range cookies {
			if err := n.Enrol(cookie); err != nil {
				t.Fatal(err)
			}
		}
		n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
		endTalk := mustTalk(t, pods[0], l, address, 2, 2)
		before := n.counts(t)["message_shortcut"]
		waitUntil(t, "messages by shortcut", func() bool { return n.counts(t)["message_shortcut"] > before+100 })
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		waiting, err := n.Unload(ctx)
		cancel()
		if err != nil {
			t.Errorf("unload: %v, waiting for %+v", err, waiting)
		}
		time.Sleep(20 * time.Millisecond) // so that the streams go on without it
		n.MustOpen(t)
		endTalk()
	}
}

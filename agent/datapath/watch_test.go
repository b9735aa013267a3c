// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"io"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// joinAfter is how long connections are watched here, in segments.
const joinAfter = 8

func watched(c *datapath.Config) {
	atOnce(c)
	c.JoinAfter = joinAfter
}

// mustWatchPods returns a node that watches the connections of two pods, the client's and the
// server's, which listens.
func mustWatchPods(tb testing.TB, changes ...func(*datapath.Config)) (n *node, pods []*sandbox.Pod, l *rawSocket, address netip.AddrPort) {
	tb.Helper()
	n = mustNode(tb, func(c *datapath.Config) {
		watched(c)
		for _, change := range changes {
			change(c)
		}
	})
	pods, cookies := n.MustEnrol(tb, "client", "server")
	n.MustSetPolicy(tb, sandbox.Between(rule.Allow, cookies...))
	l, address = mustRawListen(tb, pods[1].Netns, pods[1].IPv4)
	return n, pods, l, address
}

// waitInserted waits until so many sockets are in the SOCKHASH.
func (n *node) waitInserted(tb testing.TB, sockets int) {
	tb.Helper()
	waitUntil(tb, "the sockets to be inserted", func() bool { return n.usage(tb)["sockets"] == sockets })
}

// noWatch reports whether the kernel of this machine refuses what watched connections need to
// join. A test that needs it does nothing then: hack/kernels has kernels that do not.
func noWatch(tb testing.TB) bool {
	tb.Helper()
	err := datapath.CheckWatch()
	if err != nil && *ownMachine {
		tb.Fatal(err)
	}
	return err != nil
}

// joinWatched runs JoinWatched until stop is called, or the test ends.
func (n *node) joinWatched(tb testing.TB) (stop func()) {
	tb.Helper()
	return sandboxtest.MustJoinWatched(tb, n.Datapath)
}

// TestWatch lets watched connections join in the middle of random traffic, and compares
// every byte.
func TestWatch(t *testing.T) {
	if noWatch(t) {
		return
	}
	for _, tc := range []struct {
		name     string
		network  string
		loopback bool
		oneCPU   bool
		ways     ways
	}{
		{name: "IPv4", network: "tcp4", ways: bothWays},
		{name: "IPv4, one CPU", network: "tcp4", ways: bothWays, oneCPU: true},
		{name: "IPv6", network: "tcp6", ways: bothWays},
		{name: "loopback", network: "tcp4", ways: bothWays, loopback: true},
		{name: "to the server only", network: "tcp4", ways: func(toServer, _ traffic) (traffic, traffic) { return toServer, traffic{} }},
		{name: "to the client only", network: "tcp4", ways: func(_, toClient traffic) (traffic, traffic) { return traffic{}, toClient }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			connections := connectionsPerRow()
			if tc.oneCPU {
				mustUseOneCPU(t)
			}
			n := mustNode(t, watched)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			before := n.counts(t)
			done := make(chan struct{})
			all := talkUntil(t, done, pods, tc.network, tc.loopback, connections, tc.ways)
			moment := time.Duration(rand.IntN(20)) * time.Millisecond
			all = append(all, func() error {
				defer close(done)
				time.Sleep(moment)
				n.joinWatched(t)
				waitUntil(t, "all connections to join", func() bool { return n.since(t, before)["connection_paired"] == uint64(connections) })
				return nil
			})
			if err := together(all...); err != nil {
				t.Fatal(err)
			}
			got := n.since(t, before)
			t.Logf("joined after %v: %v", moment, got)
			if got["message_shortcut"] == 0 {
				t.Error("got no messages by shortcut")
			}
			for _, name := range []string{"flows", "sockets"} {
				waitUntil(t, name+" to be empty", func() bool { return n.usage(t)[name] == 0 })
			}
		})
	}
}

// TestWatchStaysOut: connections that have not earned it, or do not suit, stay plain TCP, and
// leave nothing behind.
func TestWatchStaysOut(t *testing.T) {
	if noWatch(t) {
		return
	}
	setBlocking := func(s *rawSocket) error { return unix.SetNonblock(s.fd, false) }
	const enough = 5 * joinAfter
	for _, tc := range []struct {
		name     string
		verdict  rule.Verdict
		messages int
		change   func(c, s *rawSocket) error
		alone    bool // the server's pod takes no part
		want     map[string]uint64
	}{
		{name: "too few messages", verdict: rule.Allow, messages: joinAfter/2 - 1, want: map[string]uint64{}},
		{name: "refused", verdict: rule.Refuse, messages: enough, want: map[string]uint64{"connection_policy_refused": 1}},
		{name: "on hold", verdict: rule.Hold, messages: 3000, want: map[string]uint64{}},
		{name: "peer takes no part", verdict: rule.Allow, messages: 3000, alone: true, want: map[string]uint64{"connection_no_peer": 1}},
		{
			name: "client in blocking mode", verdict: rule.Allow, messages: enough, change: func(c, _ *rawSocket) error { return setBlocking(c) },
			want: map[string]uint64{"connection_blocking_client": 1},
		},
		{
			name: "server in blocking mode", verdict: rule.Allow, messages: enough, change: func(_, s *rawSocket) error { return setBlocking(s) },
			want: map[string]uint64{"connection_blocking_server": 1},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, watched)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.joinWatched(t)
			if tc.alone {
				if err := n.Release(cookies[1]); err != nil {
					t.Fatal(err)
				}
			}
			n.MustSetPolicy(t, sandbox.Between(tc.verdict, cookies...))
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			before := n.counts(t)
			c, s := rawPair(t, pods[0], l, address)
			if tc.change != nil {
				if err := tc.change(c, s); err != nil {
					t.Fatal(err)
				}
			}
			sandboxtest.MustPing(t, c, s, tc.messages, 100)
			n.mustCount(t, before, tc.want)
			for _, name := range []string{"flows", "sockets"} {
				if got := n.usage(t)[name]; got != 0 {
					t.Errorf("got %d entries of %s, want none", got, name)
				}
			}
			if tc.verdict != rule.Hold {
				return
			}
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			n.mustTalkUntilPaired(t, before, c, s)
			n.mustBeShortcut(t, c, s)
		})
	}
}

// mustTalkUntilPaired exchanges messages until a connection has joined since before.
func (n *node) mustTalkUntilPaired(tb testing.TB, before map[string]uint64, c, s io.ReadWriter) {
	tb.Helper()
	waitUntil(tb, "the connection to join", func() bool {
		sandboxtest.MustPing(tb, c, s, 1, 100)
		return n.since(tb, before)["connection_paired"] == 1
	})
}

// TestWatchWithoutAgent: a connection that has earned it while no agent runs goes on as plain
// TCP, and joins when one comes back.
func TestWatchWithoutAgent(t *testing.T) {
	if noWatch(t) {
		return
	}
	n, pods, l, address := mustWatchPods(t)
	before := n.counts(t)
	c, s := rawPair(t, pods[0], l, address)
	sandboxtest.MustPing(t, c, s, 5*joinAfter, 100)
	n.mustCount(t, before, map[string]uint64{})
	if err := n.Datapath.Close(); err != nil {
		t.Fatal(err)
	}
	sandboxtest.MustPing(t, c, s, 5*joinAfter, 100)
	n.MustOpen(t)
	n.joinWatched(t)
	n.mustTalkUntilPaired(t, before, c, s)
	n.mustBeShortcut(t, c, s)
}

// TestWatchSwept: if a sweep has ended the flow of a connection that has waited for an agent
// for too long, both ends go on as plain TCP.
func TestWatchSwept(t *testing.T) {
	if noWatch(t) {
		return
	}
	n, pods, l, address := mustWatchPods(t)
	c, s := rawPair(t, pods[0], l, address)
	sandboxtest.MustPing(t, c, s, 5*joinAfter, 100)
	if got := n.usage(t)["flows"]; got != 1 {
		t.Fatalf("got %d flows, want the one that waits", got)
	}
	if err := n.Sweep(0); err != nil {
		t.Fatal(err)
	}
	n.joinWatched(t)
	sandboxtest.MustPing(t, c, s, 5*joinAfter, 100)
	for _, name := range []string{"flows", "sockets"} {
		if got := n.usage(t)[name]; got != 0 {
			t.Errorf("got %d entries of %s, want none", got, name)
		}
	}
}

// TestWatchReused: a socket that was to join, and connects or listens once more instead, is
// watched anew.
func TestWatchReused(t *testing.T) {
	if noWatch(t) {
		return
	}
	for name, listens := range map[string]bool{"connects": false, "listens": true} {
		t.Run(name, func(t *testing.T) {
			n, pods, l, address := mustWatchPods(t)
			used, s := rawPair(t, pods[0], l, address)
			sandboxtest.MustPing(t, used, s, 5*joinAfter, 100)
			n.joinWatched(t)
			n.waitInserted(t, 2)
			if err := used.disconnect(); err != nil {
				t.Fatal(err)
			}
			s.mustClose(t)
			var c *rawSocket
			if listens {
				used.mustListenOn(t, netip.AddrPortFrom(pods[0].IPv4, 0))
				c, s = rawPair(t, pods[1], used, used.mustAddress(t))
			} else {
				used.mustConnect(t, address)
				c, s = used, l.mustAccept(t)
			}
			before := n.counts(t)
			sandboxtest.MustPing(t, c, s, joinAfter/2-1, 100)
			n.mustCount(t, before, map[string]uint64{})
			n.mustTalkUntilPaired(t, before, c, s)
			n.mustBeShortcut(t, c, s)
		})
	}
}

// TestWatchMeetsEnds: watched connections that end in any way at any moment of their joining
// see what they would on TCP, and leave nothing behind.
func TestWatchMeetsEnds(t *testing.T) {
	if noWatch(t) {
		return
	}
	n, pods, l, address := mustWatchPods(t)
	n.joinWatched(t)
	rounds, connections := 20, 24
	if testing.Short() {
		rounds = 4
	}
	for round := range rounds {
		var all []func() error
		for i := range connections {
			c, s := rawPair(t, pods[0], l, address)
			random := rand.New(rand.NewPCG(uint64(round), uint64(i)))
			end := make(chan struct{})
			time.AfterFunc(time.Duration(random.IntN(20_000))*time.Microsecond, func() { close(end) })
			all = append(all, func() error { return endSomehow(c, s, random, end) })
		}
		if err := together(all...); err != nil {
			t.Fatal(err)
		}
	}
	got := n.counts(t)
	t.Logf("of %d connections: %v", rounds*connections, got)
	if got["connection_paired"] == 0 {
		t.Error("got no connection that has joined")
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": n.usage(t)["policies"]})
	for cookie, charge := range n.charges(t) {
		if charge != 0 {
			t.Errorf("netns %d: got a charge of %d, want none", cookie, charge)
		}
	}
}

// TestWatchUnloads: an unload while connections join leaves nothing, and no byte is lost.
func TestWatchUnloads(t *testing.T) {
	if noWatch(t) {
		return
	}
	n, pods, l, address := mustWatchPods(t)
	n.mustUnloadBusy(t, pods[0], l, address, func() {
		waitUntil(t, "connections that have earned to join", func() bool { return n.usage(t)["flows"] > 0 })
		n.joinWatched(t)
		time.Sleep(time.Duration(rand.IntN(5)) * time.Millisecond)
	})
}

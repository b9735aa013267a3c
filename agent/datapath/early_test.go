// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

func (n *node) joinPorts(tb testing.TB) []datapath.JoinPort {
	tb.Helper()
	ports, err := n.JoinPorts()
	if err != nil {
		tb.Fatal(err)
	}
	return ports
}

// mustForget forgets all that was learned, of one port.
func (n *node) mustForget(tb testing.TB) {
	tb.Helper()
	if got, err := n.Forget(func(uint64, uint64, uint16) bool { return true }); err != nil || got != 1 {
		tb.Errorf("got %d ports forgotten and %v, want 1", got, err)
	}
}

// TestEarly: after a connection for which the shortcut has paid, later ones to the port join
// at their handshake, also while no agent runs, until something speaks against it.
func TestEarly(t *testing.T) {
	if noWatch(t) {
		return
	}
	for name, end := range map[string]func(t *testing.T, n *node, pods []*sandbox.Pod, l *rawSocket, address netip.AddrPort) *rawSocket{
		"a short connection": func(t *testing.T, n *node, pods []*sandbox.Pod, l *rawSocket, address netip.AddrPort) *rawSocket {
			c, s := rawPair(t, pods[0], l, address)
			sandboxtest.MustPing(t, c, s, 1, 100)
			n.mustEnd(t, c, s)
			return l
		},
		"one that leaves": func(t *testing.T, n *node, pods []*sandbox.Pod, l *rawSocket, address netip.AddrPort) *rawSocket {
			c, s := rawPair(t, pods[0], l, address)
			n.mustBeShortcut(t, c, s)
			small := traffic{seed: 3, bytes: 300_000, maxWrite: 100, maxRead: 100_000}
			waitUntil(t, "the flow to leave", func() bool {
				if err := exchange(c, s, small, traffic{}); err != nil {
					t.Fatal(err)
				}
				return n.counts(t)["message_no_gain"] > 0
			})
			n.mustEnd(t, c, s)
			return l
		},
		"another listener": func(t *testing.T, _ *node, pods []*sandbox.Pod, l *rawSocket, address netip.AddrPort) *rawSocket {
			l.mustClose(t)
			again := mustSocket(t, pods[1].Netns, unix.AF_INET, 0)
			again.mustListenOn(t, address)
			return again
		},
		"forget": func(t *testing.T, n *node, _ []*sandbox.Pod, l *rawSocket, _ netip.AddrPort) *rawSocket {
			n.mustForget(t)
			return l
		},
	} {
		t.Run(name, func(t *testing.T) {
			n, pods, l, address := mustWatchPods(t, leaves)
			stop := n.joinWatched(t)
			c, s := rawPair(t, pods[0], l, address)
			waitUntil(t, "the port to be known", func() bool {
				sandboxtest.MustPing(t, c, s, 500, 100)
				return len(n.joinPorts(t)) > 0
			})
			if diff := cmp.Diff([]datapath.JoinPort{{Netns: sandboxtest.MustCookie(t, pods[1]), Port: address.Port()}}, n.joinPorts(t)); diff != "" {
				t.Error(diff)
			}
			n.mustEnd(t, c, s)
			stop()
			before := n.counts(t)
			c, s = rawPair(t, pods[0], l, address)
			n.mustCount(t, before, map[string]uint64{"connection_paired": 1})
			n.mustBeShortcut(t, c, s)
			sandboxtest.MustPing(t, c, s, joinAfter, 100)
			n.mustEnd(t, c, s)
			if got := n.joinPorts(t); len(got) != 1 {
				t.Errorf("got %v after a connection that was long enough, want one port", got)
			}

			l = end(t, n, pods, l, address)
			if got := n.joinPorts(t); len(got) > 0 {
				t.Errorf("got %v, want it forgotten", got)
			}
			before = n.counts(t)
			c, s = rawPair(t, pods[0], l, address)
			n.mustCount(t, before, map[string]uint64{})
			n.joinWatched(t)
			n.mustTalkUntilPaired(t, before, c, s)
			n.mustBeShortcut(t, c, s)
		})
	}
}

// TestJoinsLater: when connections end before the shortcut has saved what it cost to join, later
// ones to the port have to earn twice as much, until one has lived that long, or some time has
// passed. Few messages are enough if they are large.
func TestJoinsLater(t *testing.T) {
	if noWatch(t) {
		return
	}
	const (
		few, long    = 12, 6 * joinAfter // few are less than twice joinAfter, of which some go by TCP
		small, large = 100, 32 << 10
	)
	type step struct{ messages, size, joins, after int }
	for name, tc := range map[string]struct {
		halves time.Duration
		steps  []step
	}{
		"until one lives": {time.Hour, []step{
			{0, 0, joinAfter, 2 * joinAfter},
			{few, small, 2 * joinAfter, 4 * joinAfter},
			{long, small, 4 * joinAfter, 2 * joinAfter},
			{few, large, 2 * joinAfter, 0},
			{long, small, joinAfter, 0},
			{few, small, joinAfter, 2 * joinAfter},
		}},
		"until some time has passed": {time.Nanosecond, []step{{0, 0, joinAfter, 0}, {0, 0, joinAfter, 0}}},
	} {
		t.Run(name, func(t *testing.T) {
			n, pods, l, address := mustWatchPods(t, leaves, func(c *datapath.Config) {
				c.SetJoinHalves(tc.halves)
			})
			stop := n.joinWatched(t)
			want := func(after uint32) {
				t.Helper()
				var ports []datapath.JoinPort
				if after > 0 {
					ports = []datapath.JoinPort{{Netns: sandboxtest.MustCookie(t, pods[1]), Port: address.Port(), JoinAfter: after}}
				}
				if diff := cmp.Diff(ports, n.joinPorts(t)); diff != "" {
					t.Error(diff)
				}
			}
			for _, s := range tc.steps {
				n.mustJoinAfter(t, pods[0], l, address, s.joins, s.messages, s.size)
				want(uint32(s.after))
			}
			n.mustForget(t)
			want(0)
			n.mustJoinAfter(t, pods[0], l, address, joinAfter, long, small)

			// One that nobody inserts says nothing.
			stop()
			c, s := rawPair(t, pods[0], l, address)
			sandboxtest.MustPing(t, c, s, joinAfter, 100)
			n.mustEnd(t, c, s)
			want(0)
		})
	}
}

// TestJoinsLaterDefaults: with the agent's settings, too, connections of 40 requests soon stay on
// TCP, where they end before they have earned what it costs to join.
func TestJoinsLaterDefaults(t *testing.T) {
	if noWatch(t) {
		return
	}
	const requests = 40
	n, pods, l, address := mustWatchPods(t, leaves, onTrial, func(c *datapath.Config) {
		c.JoinAfter = datapath.DefaultConfig().JoinAfter
		c.SetJoinHalves(time.Hour)
	})
	n.joinWatched(t)
	request := func() {
		t.Helper()
		c, s := rawPair(t, pods[0], l, address)
		sandboxtest.MustPing(t, c, s, requests, 1)
		n.mustEnd(t, c, s)
	}
	connections := 0
	waitUntil(t, "connections that stay on TCP", func() bool {
		request()
		connections++
		ports := n.joinPorts(t)
		return len(ports) == 1 && ports[0].JoinAfter > 2*requests
	})
	got := n.counts(t)
	t.Logf("after %d connections: %v", connections, got)
	if got["connection_paired"] == 0 {
		t.Errorf("got %v, want connections that have joined before", got)
	}
	for range 10 {
		request()
	}
	if since := n.since(t, got); since["connection_paired"] != 0 {
		t.Errorf("got %v, want no more connections that join", since)
	}
}

// mustEarn returns the ends of a connection that has just earned to join, and after how many
// segments of data it has.
func (n *node) mustEarn(t *testing.T, client *sandbox.Pod, l *rawSocket, address netip.AddrPort) (c, s *rawSocket, segments int) {
	t.Helper()
	before := n.usage(t)["flows"]
	c, s = rawPair(t, client, l, address)
	waitUntil(t, "the connection to earn it", func() bool {
		sandboxtest.MustPing(t, c, s, 1, 100)
		segments += 2
		return n.usage(t)["flows"] > before
	})
	return c, s, segments
}

// mustJoinAfter makes a connection, which is to join after so many segments of data and not after
// twice as many, lets it exchange some more messages, and ends it.
func (n *node) mustJoinAfter(t *testing.T, client *sandbox.Pod, l *rawSocket, address netip.AddrPort, joins, messages, size int) {
	t.Helper()
	before := n.counts(t)
	c, s, segments := n.mustEarn(t, client, l, address)
	if segments < joins || segments >= 2*joins {
		t.Errorf("got a connection that joins after %d segments, want %d", segments, joins)
	}
	// Without a message, or it may join late, and says nothing.
	n.waitInserted(t, 2)
	n.mustTalkUntilPaired(t, before, c, s)
	if messages > 0 {
		sandboxtest.MustPing(t, c, s, messages/2, size)
		n.mustHaveRedirected(t)
	}
	n.mustEnd(t, c, s)
}

// TestJoinsLaterOnce: connections that end soon after they have joined together say no more than
// one of them, and those that end on trial, or that have joined late, say nothing.
func TestJoinsLaterOnce(t *testing.T) {
	if noWatch(t) {
		return
	}
	for name, tc := range map[string]struct {
		trialReads, trialBytes uint32
		size                   int // of some messages that a connection exchanges after it has joined, or 0
		late                   bool
		want                   uint32
	}{
		"together":                  {0, 0, 0, false, 2 * joinAfter},
		"on trial":                  {1000, 0, 100, false, 0},
		"on trial for large bursts": {1, 1 << 20, 10_000, false, 0},
		"late":                      {0, 0, 0, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			n, pods, l, address := mustWatchPods(t, leaves, func(c *datapath.Config) {
				c.SetJoinHalves(time.Hour)
				c.TrialReads, c.TrialBytes = tc.trialReads, tc.trialBytes
			})
			var ends []*rawSocket
			for range 3 {
				before := n.counts(t)
				c, s, _ := n.mustEarn(t, pods[0], l, address)
				ends = append(ends, c, s)
				if tc.late {
					sandboxtest.MustPing(t, c, s, joinAfter, 100)
				}
				stop := n.joinWatched(t)
				// As in mustJoinAfter.
				n.waitInserted(t, len(ends))
				stop()
				if tc.size > 0 {
					n.mustTalkUntilPaired(t, before, c, s)
					sandboxtest.MustPing(t, c, s, 3, tc.size)
				}
			}
			for _, e := range ends {
				e.mustClose(t)
			}
			n.closeAll(t)
			var got uint32
			for _, p := range n.joinPorts(t) {
				got = p.JoinAfter
			}
			if got != tc.want {
				t.Errorf("got %d segments to earn, want %d", got, tc.want)
			}
		})
	}
}

// TestJoinsLaterUnjoined: nor has a connection paid that is inserted, and closed before it has joined.
func TestJoinsLaterUnjoined(t *testing.T) {
	if noWatch(t) {
		return
	}
	n, pods, l, address := mustWatchPods(t, leaves, func(c *datapath.Config) {
		c.SetJoinHalves(time.Hour)
		c.TrialReads = 0
	})
	n.joinWatched(t)
	waitUntil(t, "a connection that is closed before it has joined", func() bool {
		before := n.counts(t)
		c, s, _ := n.mustEarn(t, pods[0], l, address)
		n.waitInserted(t, 2)
		n.mustEnd(t, c, s)
		if got := n.joinPorts(t); len(got) != 1 || got[0].JoinAfter != 2*joinAfter {
			t.Fatalf("got %v, want one port whose connections have to earn %d segments", got, 2*joinAfter)
		}
		n.mustForget(t)
		return n.since(t, before)["connection_join_ended"] > 0
	})
}

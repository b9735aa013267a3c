// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
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
			if got, err := n.Forget(func(uint64, uint64, uint16) bool { return true }); err != nil || got != 1 {
				t.Errorf("got %d ports forgotten and %v, want 1", got, err)
			}
			return l
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := mustNode(t, func(c *datapath.Config) {
				watched(c)
				leaves(c)
			})
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			stop := n.joinWatched(t)
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c, s := rawPair(t, pods[0], l, address)
			waitUntil(t, "the port to be known", func() bool {
				sandboxtest.MustPing(t, c, s, 500, 100)
				return len(n.joinPorts(t)) > 0
			})
			if diff := cmp.Diff([]datapath.JoinPort{{Netns: cookies[1], Port: address.Port()}}, n.joinPorts(t)); diff != "" {
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

// TestJoinsLater: when connections end soon after they have joined, later ones to the port have
// to earn twice as much, until one has lived that long.
func TestJoinsLater(t *testing.T) {
	if noWatch(t) {
		return
	}
	n := mustNode(t, func(c *datapath.Config) {
		watched(c)
		leaves(c)
	})
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	stop := n.joinWatched(t)
	// Returns how many segments the connection had exchanged when it joined, and lets it exchange
	// some more messages.
	connect := func(messages int) (segments int) {
		t.Helper()
		before := n.counts(t)
		c, s := rawPair(t, pods[0], l, address)
		waitUntil(t, "the connection to earn it", func() bool {
			sandboxtest.MustPing(t, c, s, 1, 100)
			segments += 2
			flows, err := n.Flows()
			if err != nil {
				t.Fatal(err)
			}
			return len(flows) > 0
		})
		n.mustTalkUntilPaired(t, before, c, s)
		if messages > 0 {
			n.mustBeShortcut(t, c, s)
			sandboxtest.MustPing(t, c, s, messages/2, 100)
		}
		n.mustEnd(t, c, s)
		return segments
	}
	want := func(after uint32) {
		t.Helper()
		var ports []datapath.JoinPort
		if after > 0 {
			ports = []datapath.JoinPort{{Netns: cookies[1], Port: address.Port(), JoinAfter: after}}
		}
		if diff := cmp.Diff(ports, n.joinPorts(t)); diff != "" {
			t.Error(diff)
		}
	}
	const long = 2 * joinAfter
	for _, step := range []struct{ messages, least, after int }{
		{0, joinAfter, 2 * joinAfter},
		{0, 2 * joinAfter, 4 * joinAfter},
		{long, 4 * joinAfter, 2 * joinAfter},
		{long, 2 * joinAfter, 0},
		{long, joinAfter, 0},
		{0, joinAfter, 2 * joinAfter},
	} {
		if got := connect(step.messages); got < step.least {
			t.Errorf("got a connection that joins after %d segments, want at least %d", got, step.least)
		}
		want(uint32(step.after))
	}
	if got, err := n.Forget(func(uint64, uint64, uint16) bool { return true }); err != nil || got != 1 {
		t.Errorf("got %d ports forgotten and %v, want 1", got, err)
	}
	want(0)

	// One that nobody inserts says nothing.
	stop()
	c, s := rawPair(t, pods[0], l, address)
	sandboxtest.MustPing(t, c, s, joinAfter, 100)
	n.mustEnd(t, c, s)
	want(0)
}

// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// service is a server pod with a client pod. Of the two endpoints for streams
// and for short connections, one has the pod's own address and one an address
// that the node translates to it. Each has a listener of its own: connections
// that differ only before the translation make the node change a client's port,
// and such connections are not paired.
type service struct {
	client, web     *sandbox.Pod
	streams, shorts [2]endpoint
}

func mustService(t testing.TB, n *node) *service {
	t.Helper()
	s := &service{client: sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), web: sandboxtest.MustAddPod(t, n, "web", sandbox.PodOptions{})}
	for first, endpoints := range map[uint16]*[2]endpoint{7000: &s.streams, 7100: &s.shorts} {
		for i := range uint16(2) {
			own := netip.AddrPortFrom(s.web.IPv4, first+i)
			// Of both families and all interfaces, for those who dial another address.
			endpoints[i] = endpoint{own, sandboxtest.MustListen(t, s.web, "tcp", fmt.Sprintf(":%d", first+i))}
			if i == 1 {
				endpoints[i].AddrPort = netip.AddrPortFrom(netip.MustParseAddr("10.96.0.1"), first)
				if err := n.DNAT(endpoints[i].AddrPort, own); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return s
}

// onShortcut tells of each stream whether both its directions are.
func (n *node) onShortcut(t testing.TB, streams []*stream) []bool {
	t.Helper()
	flows := n.MustFlows(t)
	var is []bool
	for _, s := range streams {
		f := s.flow(t, flows)
		is = append(is, f.Paired && f.ToServer.Shortcut && f.ToClient.Shortcut)
	}
	return is
}

// mustShortcut waits until all streams are on the shortcut.
func (n *node) mustShortcut(t testing.TB, streams ...*stream) {
	t.Helper()
	want := make([]bool, len(streams))
	for i := range want {
		want[i] = true
	}
	mustBecome(t, "streams on the shortcut", want, func() []bool { return n.onShortcut(t, streams) })
}

// shortcutBytes returns what each stream has sent by the shortcut, to the
// server and to the client, from the pinned map: there need not be an agent.
func (n *node) shortcutBytes(t testing.TB, streams []*stream) [][2]uint64 {
	t.Helper()
	pairs, err := ebpf.LoadPinnedMap(filepath.Join(n.PinDir, bpf.ShortcutMapFlows), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pairs.Close()
	var sent [][2]uint64
	for _, s := range streams {
		var pair bpf.ShortcutFlow
		if err := pairs.Lookup(mustCookie(t, s.client), &pair); err != nil {
			t.Fatalf("stream to %s is not paired: %v", s.origDst, err)
		}
		sent = append(sent, [2]uint64{pair.Side[0].Sending.ShortcutBytes, pair.Side[1].Sending.ShortcutBytes})
	}
	return sent
}

func mustCookie(t testing.TB, c net.Conn) (cookie uint64) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(raw.Control(func(fd uintptr) {
		cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
	}), err); err != nil {
		t.Fatal(err)
	}
	return cookie
}

// TestKilledAgent: nothing that goes on notices that the agent is killed and
// comes back, and nothing is left in the end.
func TestKilledAgent(t *testing.T) {
	n := mustNode(t)
	n.MustWritePods(t, "client "+on, "web "+on)
	n.mustStart(t)
	s := mustService(t, n)
	l := newLoad(t)
	for i := range 4 {
		l.mustStream(t, s.client, s.streams[i%2])
	}
	l.churn(s.client, s.shorts[:]...)
	n.mustShortcut(t, l.streams...)

	for range 5 {
		n.Kill()
		for _, to := range s.streams {
			l.mustStream(t, s.client, to)
		}
		before, churned := n.shortcutBytes(t, l.streams), l.short.Load()
		mustBecome(t, "by the shortcut without an agent", true, func() bool {
			for i, after := range n.shortcutBytes(t, l.streams) {
				if after[0] <= before[i][0] || after[1] <= before[i][1] {
					return false
				}
			}
			return l.short.Load() > churned+10
		})
		n.mustStart(t)
		n.mustShortcut(t, l.streams...)
	}
	l.finish(t)
	made := l.short.Load() + int64(len(l.streams))
	wantDiff(t, "connections", map[string]int64{"connection_paired": made}, n.connections(t))

	used := []string{bpf.ShortcutMapFlows, bpf.ShortcutMapSockets, bpf.ShortcutMapSyns, bpf.ShortcutMapPending}
	mustBecome(t, "entries after all sockets are closed", map[string]int{"flows": 0, "sockets": 0, "syns": 0, "pending": 0},
		func() map[string]int { return n.entries(t, used...) })
	wantDiff(t, "entries of pods", map[string]int{"pods": 2, "policies": 4}, n.entries(t, "pods", "policies"))
	for _, p := range []*sandbox.Pod{s.client, s.web} {
		if err := n.DelPod(p); err != nil {
			t.Error(err)
		}
	}
	wantDiff(t, "entries after DEL", map[string]int{"pods": 0, "policies": 0}, n.entries(t, "pods", "policies"))
}

// connections returns the counters of what became of connections, but for zeroes.
func (n *node) connections(t testing.TB) map[string]int64 {
	t.Helper()
	counts := map[string]int64{}
	for _, o := range n.MustStatus(t).Outcomes {
		if o.Kind == api.OutcomeConnection && o.Count > 0 {
			counts[o.String()] = int64(o.Count)
		}
	}
	return counts
}

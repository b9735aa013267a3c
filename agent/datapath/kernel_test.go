// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

func TestMain(m *testing.M) {
	if task := os.Getenv(taskEnv); task != "" {
		os.Exit(runTask(task))
	}
	if address := os.Getenv(receiverEnv); address != "" {
		os.Exit(runReceiver(address))
	}
	os.Exit(sandbox.Main(m.Run))
}

// node is a sandbox with an open datapath.
type node struct{ *sandboxtest.Loaded }

// mustNode opens a datapath in a sandbox of its own, with the guard splice if the kernel allows
// it, as an agent has it: without, a preemptible kernel may miss a read, and the direction stays
// on TCP (recount). At the end of the test it is unloaded, and the test fails if that leaves pins.
func mustNode(tb testing.TB, change func(*datapath.Config)) *node {
	tb.Helper()
	s := sandboxtest.MustNew(tb, sandbox.Config{})
	n := &node{}
	tb.Cleanup(func() {
		if n.Loaded != nil {
			n.wantPinned(tb)
		}
	})
	n.Loaded = sandboxtest.MustLoad(tb, s, func(c *datapath.Config) {
		if !hazard(tb, "no-trampolines") {
			c.Guards = []string{datapath.GuardSplice}
		}
		if change != nil {
			change(c)
		}
	})
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("counters: %v", n.counts(tb))
		}
	})
	return n
}

// counts returns the counters that are not zero.
func (n *node) counts(tb testing.TB) map[string]uint64 {
	tb.Helper()
	outcomes, err := n.Outcomes()
	if err != nil {
		tb.Fatal(err)
	}
	counts := map[string]uint64{}
	for _, o := range outcomes {
		if o.Count > 0 {
			counts[o.String()] = o.Count
		}
	}
	return counts
}

// usage returns the entries of the maps that hold any.
func (n *node) usage(tb testing.TB) map[string]int {
	tb.Helper()
	maps, err := n.Maps()
	if err != nil {
		tb.Fatal(err)
	}
	used := map[string]int{}
	for _, m := range maps {
		if m.Entries > 0 {
			used[m.Name] = m.Entries
		}
	}
	return used
}

// waitUsage waits until the maps hold just want: closing a socket is finished in the background.
func (n *node) waitUsage(tb testing.TB, want map[string]int) {
	tb.Helper()
	var diff string
	for limit := time.Now().Add(deadline); time.Now().Before(limit); time.Sleep(10 * time.Millisecond) {
		if diff = cmp.Diff(want, n.usage(tb)); diff == "" {
			return
		}
	}
	tb.Errorf("map usage (-want +got):\n%s", diff)
}

const deadline = sandboxtest.Timeout

// connect dials address from client and returns both ends, which are closed at
// the end of the test.
func connect(tb testing.TB, from *sandbox.Netns, l net.Listener, network string, address netip.AddrPort) (client, server net.Conn) {
	tb.Helper()
	return sandboxtest.MustConnect(tb, from, network, address.String(), l)
}

// twoPods is a node with a client and a server that may use the shortcut.
type twoPods struct {
	*node
	pods    []*sandbox.Pod // client, server
	cookies []uint64
	l       net.Listener // of the server
	address netip.AddrPort
}

func mustTwoPods(tb testing.TB, change func(*datapath.Config)) *twoPods {
	tb.Helper()
	n := &twoPods{node: mustNode(tb, change)}
	n.pods, n.cookies = n.MustEnrol(tb, "client", "server")
	n.MustSetPolicy(tb, sandbox.Between(rule.Allow, n.cookies...))
	n.l, n.address = mustListenOn(tb, n.pods[1])
	return n
}

// connect makes a connection from the client to the server.
func (n *twoPods) connect(tb testing.TB) (client, server net.Conn) {
	tb.Helper()
	return connect(tb, n.pods[0].Netns, n.l, "tcp4", n.address)
}

// listenerPort returns the port that the kernel chose.
func listenerPort(l net.Listener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

// TestPairing: which connections find each other. In each, 10 messages go each
// way; the first of each direction goes by TCP, because its receiver has not
// been seen to read, and all others by the shortcut.
func TestPairing(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	client, server := pods[0], pods[1]
	vip4, vip6 := netip.MustParseAddrPort("10.96.0.10:80"), netip.MustParseAddrPort("[fd00:96::10]:80")

	for _, tc := range []struct {
		name            string
		network         string
		from            *sandbox.Pod
		listen          string
		dial            func(port uint16) netip.AddrPort
		service         netip.AddrPort
		clientC, serveC uint64
	}{
		{name: "pod IPv4", network: "tcp4", from: client, listen: server.IPv4.String()},
		{name: "pod IPv6", network: "tcp6", from: client, listen: server.IPv6.String()},
		{name: "dual-stack listener", network: "tcp", from: client, listen: server.IPv4.String()},
		{name: "service IPv4", network: "tcp4", from: client, listen: server.IPv4.String(), service: vip4},
		{name: "service IPv6", network: "tcp6", from: client, listen: server.IPv6.String(), service: vip6},
		{name: "loopback IPv4", network: "tcp4", from: server, listen: "127.0.0.1"},
		{name: "loopback IPv6", network: "tcp6", from: server, listen: "::1"},
		{name: "own pod address", network: "tcp4", from: server, listen: server.IPv4.String()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bind := net.JoinHostPort(tc.listen, "0")
			if tc.network == "tcp" {
				bind = ":0"
			}
			l := sandboxtest.MustListen(t, server, tc.network, bind)
			address := netip.AddrPortFrom(netip.MustParseAddr(tc.listen), listenerPort(l))
			dial := address
			if tc.service.IsValid() {
				if err := n.DNAT(tc.service, address); err != nil {
					t.Fatal(err)
				}
				dial = tc.service
			}
			before := n.counts(t)
			c, s := connect(t, tc.from.Netns, l, tc.network, dial)
			sandboxtest.MustPing(t, c, s, 10, 100)
			got := n.counts(t)
			for name := range got {
				if got[name] -= before[name]; got[name] == 0 {
					delete(got, name)
				}
			}
			want := map[string]uint64{"connection_paired": 1, "message_not_seen": 2, "message_shortcut": 18}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("counters (-want +got):\n%s", diff)
			}

			flows, err := n.Flows()
			if err != nil || len(flows) != 1 {
				t.Fatalf("got %d flows (%v), want 1", len(flows), err)
			}
			clientCookie := cookies[0]
			if tc.from == server {
				clientCookie = cookies[1]
			}
			wantDirection := datapath.Direction{
				Shortcut: true, Verdict: rule.Allow, Switches: 1, ShortcutBytes: 900, TCPBytes: 100,
				Reason: "not_seen",
			}
			wantFlow := datapath.Flow{
				ClientNetns: clientCookie, ServerNetns: cookies[1], Joined: true,
				Client:   c.LocalAddr().(*net.TCPAddr).AddrPort(),
				OrigDst:  dial,
				Server:   address,
				ToServer: wantDirection, ToClient: wantDirection,
			}
			got1 := flows[0]
			if age := time.Since(got1.Since); age < 0 || age > deadline {
				t.Errorf("flow is %v old", age)
			}
			for end, id := range map[net.Conn]uint64{c: got1.ID, s: got1.ServerID} {
				control(t, end.(*net.TCPConn), func(fd int) error {
					cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
					if cookie != id {
						t.Errorf("got socket cookie %d in the flow, want %d of %s", id, cookie, end.LocalAddr())
					}
					return err
				})
			}
			got1.ID, got1.ServerID, got1.Since = 0, 0, time.Time{}
			if diff := cmp.Diff(wantFlow, got1, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("flow (-want +got):\n%s", diff)
			}
			c.Close()
			s.Close()
			n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// Codes of datapath.Direction.Reason.
const (
	reasonNotAllowed  = "not_allowed"
	reasonUnsupported = "unsupported"
	reasonLowat       = "lowat"
)

// since returns what has been counted after before was.
func (n *node) since(tb testing.TB, before map[string]uint64) map[string]uint64 {
	tb.Helper()
	counts := n.counts(tb)
	for name := range counts {
		if counts[name] -= before[name]; counts[name] == 0 {
			delete(counts, name)
		}
	}
	return counts
}

// mustCount wants exactly these counters since before.
func (n *node) mustCount(tb testing.TB, before, want map[string]uint64) {
	tb.Helper()
	if diff := cmp.Diff(want, n.since(tb, before)); diff != "" {
		tb.Errorf("counters (-want +got):\n%s", diff)
	}
}

// mustFlow returns the only flow.
func (n *node) mustFlow(tb testing.TB) datapath.Flow {
	tb.Helper()
	flows, err := n.Flows()
	if err != nil || len(flows) != 1 {
		tb.Fatalf("got %d flows (%v), want 1", len(flows), err)
	}
	return flows[0]
}

// paired is what a connection counts over which 10 messages went each way.
func paired() map[string]uint64 {
	return map[string]uint64{"connection_paired": 1, "message_not_seen": 2, "message_shortcut": 18}
}

// waitUntil polls a condition that the kernel brings about on its own.
func waitUntil(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	tb.Fatalf("waited for %s", what)
}

// dialFrom dials from a port that other connections may have at the same time.
func dialFrom(from *sandbox.Netns, port uint16, to netip.AddrPort, options ...func(fd int) error) (c net.Conn, err error) {
	dialer := net.Dialer{
		Timeout:   deadline,
		LocalAddr: &net.TCPAddr{Port: int(port)},
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			return errors.Join(raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				for _, option := range options {
					err = errors.Join(err, option(int(fd)))
				}
			}), err)
		},
	}
	err = from.Do(func() error {
		c, err = dialer.Dial("tcp4", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(deadline))
}

// dialling is a connection that is being made.
type dialling struct{ client, server chan dialled }

// dialled is one end of a connection, or why there is none.
type dialled struct {
	conn net.Conn
	err  error
}

// dialInBackground dials and accepts.
func dialInBackground(from *sandbox.Netns, port uint16, l net.Listener, to netip.AddrPort) dialling {
	d := dialling{make(chan dialled, 1), make(chan dialled, 1)}
	go func() {
		c, err := dialFrom(from, port, to)
		d.client <- dialled{c, err}
	}()
	go func() {
		s, err := l.Accept()
		if err == nil {
			err = s.SetDeadline(time.Now().Add(deadline))
		}
		d.server <- dialled{s, err}
	}()
	return d
}

// mustFinish waits for both ends.
func (d dialling) mustFinish(tb testing.TB) (client, server net.Conn) {
	tb.Helper()
	wait := func(from chan dialled) net.Conn {
		tb.Helper()
		select {
		case e := <-from:
			if e.err != nil {
				tb.Fatal(e.err)
			}
			tb.Cleanup(func() { e.conn.Close() })
			return e.conn
		case <-time.After(15 * time.Second):
			tb.Fatal("no connection")
			return nil
		}
	}
	return wait(d.client), wait(d.server)
}

// mustDropSYNACKs makes a network namespace drop the SYN-ACKs of a server until
// restore; dropped says how many.
func mustDropSYNACKs(tb testing.TB, in *sandbox.Netns, from netip.Addr) (dropped func() uint64, restore func()) {
	tb.Helper()
	table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "drop-" + from.String()}
	chain := &nftables.Chain{
		Name: "input", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	}
	do := func(f func(*nftables.Conn) error) {
		tb.Helper()
		err := in.Do(func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			return f(conn)
		})
		if err != nil {
			tb.Fatalf("SYN-ACKs from %s: %v", from, err)
		}
	}
	const flags = 0x12 // SYN and ACK
	do(func(conn *nftables.Conn) error {
		conn.AddTable(table)
		conn.AddChain(chain)
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4, DestRegister: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: from.AsSlice()},
			&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1, DestRegister: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flags}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{flags}},
			&expr.Counter{},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
		return conn.Flush()
	})
	dropped = func() (n uint64) {
		do(func(conn *nftables.Conn) error {
			rules, err := conn.GetRules(table, chain)
			for _, rule := range rules {
				for _, e := range rule.Exprs {
					if counter, ok := e.(*expr.Counter); ok {
						n += counter.Packets
					}
				}
			}
			return err
		})
		return n
	}
	return dropped, func() {
		do(func(conn *nftables.Conn) error {
			conn.DelTable(table)
			return conn.Flush()
		})
	}
}

// TestOnePortTwoServers: a client dials two servers at once from one port, so
// that the entry in `syns` of one may replace the other's. Which connections are paired is
// for the moment to say, but each is with its own server or stays on TCP.
func TestOnePortTwoServers(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "first", "second")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l1, first := mustListenOn(t, pods[1])
	l2, second := mustListenOn(t, pods[2])
	const rounds = 100
	for round := range rounds {
		port := uint16(20000 + round)
		d1 := dialInBackground(pods[0].Netns, port, l1, first)
		d2 := dialInBackground(pods[0].Netns, port, l2, second)
		c1, s1 := d1.mustFinish(t)
		c2, s2 := d2.mustFinish(t)
		for range 2 {
			sandboxtest.MustPing(t, c1, s1, 3, 100)
			sandboxtest.MustPing(t, c2, s2, 3, 200)
		}
		flows, err := n.Flows()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Joined && f.Server != f.OrigDst {
				t.Errorf("round %d: connection to %s was paired with %s", round, f.OrigDst, f.Server)
			}
		}
		for _, c := range []net.Conn{c1, c2, s1, s2} {
			c.Close()
		}
	}
	counts := n.counts(t)
	t.Log(counts)
	if got := counts["connection_paired"]; got < rounds || got+counts["connection_unmatched"]+counts["connection_syn_lost"] > 2*rounds {
		t.Errorf("got %v, want at least one connection paired in each of %d rounds, and none counted twice", counts, rounds)
	}
	n.waitUsage(t, map[string]int{"pods": 3, "policies": 9})
}

// TestSynReplaced: as before, with both entries of syns surely written before either
// handshake goes on. The second server's replaces the first one's.
func TestSynReplaced(t *testing.T) {
	for _, tc := range []struct {
		name string
		// order is in which the handshakes go on.
		order []int
		// want counts both handshakes and the messages of the first connection.
		want map[string]uint64
	}{
		// The client takes the second server's entry in syns for the first one's, and joins.
		{"first server first", []int{0, 1}, map[string]uint64{"connection_paired": 1, "connection_unmatched": 1, "message_peer_missing": 10}},
		{"second server first", []int{1, 0}, map[string]uint64{"connection_paired": 1, "connection_syn_lost": 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, nil)
			pods, cookies := n.MustEnrol(t, "client", "first", "second")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			var (
				attempts [2]dialling
				restore  [2]func()
			)
			for i, pod := range pods[1:] {
				l, address := mustListenOn(t, pod)
				var dropped func() uint64
				dropped, restore[i] = mustDropSYNACKs(t, pods[0].Netns, pod.IPv4)
				attempts[i] = dialInBackground(pods[0].Netns, 20000, l, address)
				waitUntil(t, "a SYN-ACK", func() bool { return dropped() > 0 })
			}
			if diff := cmp.Diff(map[string]int{"pods": 3, "policies": 9, "syns": 1}, n.usage(t)); diff != "" {
				t.Fatalf("map usage (-want +got):\n%s", diff)
			}
			var clients, servers [2]net.Conn
			for _, i := range tc.order {
				restore[i]()
				clients[i], servers[i] = attempts[i].mustFinish(t)
			}
			sandboxtest.MustPing(t, clients[0], servers[0], 10, 100)
			n.mustCount(t, nil, tc.want)
			before := n.counts(t)
			sandboxtest.MustPing(t, clients[1], servers[1], 10, 200)
			n.mustCount(t, before, map[string]uint64{"message_not_seen": 2, "message_shortcut": 18})
			for i := range clients {
				clients[i].Close()
				servers[i].Close()
			}
			n.waitUsage(t, map[string]int{"pods": 3, "policies": 9})
		})
	}
}

// netstat returns a counter of the pod's TCP, such as "SyncookiesRecv".
func netstat(tb testing.TB, pod *sandbox.Pod, name string) string {
	tb.Helper()
	var text []byte
	err := pod.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/netstat")
		return err
	})
	lines := strings.SplitN(string(text), "\n", 3)
	if err != nil || len(lines) < 2 {
		tb.Fatalf("read netstat: got %q, %v", text, err)
	}
	values := strings.Fields(lines[1])
	for i, field := range strings.Fields(lines[0]) {
		if field == name {
			return values[i]
		}
	}
	tb.Fatalf("netstat has no %s", name)
	return ""
}

// TestSYNCookies: a connection by SYN cookie stays on TCP. The kernel runs no
// program for a SYN that it answers with a cookie, so there is no entry in `syns`.
func TestSYNCookies(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	if err := pods[1].Sysctl("net.ipv4.tcp_syncookies", "2"); err != nil {
		t.Fatal(err)
	}
	l, address := mustListenOn(t, pods[1])
	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 10, 100)
	if got := netstat(t, pods[1], "SyncookiesRecv"); got != "1" {
		t.Errorf("got %s SYN cookies back, want 1", got)
	}
	n.mustCount(t, nil, map[string]uint64{"connection_syn_lost": 1})
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
}

// TestFastOpen: a connection with data in its SYN stays on TCP, since its
// server's handshake ends before the client's; one that only asks for the
// cookie is paired.
func TestFastOpen(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	for _, pod := range pods {
		if err := pod.Sysctl("net.ipv4.tcp_fastopen", "3"); err != nil {
			t.Fatal(err)
		}
	}
	l, address := mustListenOn(t, pods[1])
	control(t, l.(*net.TCPListener), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16)
	})
	for i, tc := range []struct {
		name    string
		synData bool
		want    map[string]uint64
	}{
		{"asks for the cookie", false, paired()},
		{"data in the SYN", true, map[string]uint64{}},
		{"data in the SYN again", true, map[string]uint64{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := n.counts(t)
			c, err := dialFrom(pods[0].Netns, uint16(20000+i), address, func(fd int) error {
				return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			hello := []byte("hello")
			if _, err := c.Write(hello); err != nil {
				t.Fatal(err)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			got := make([]byte, len(hello))
			if err := s.SetDeadline(time.Now().Add(deadline)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, hello) {
				t.Fatalf("got %q, %v; want %q", got, err, hello)
			}
			sandboxtest.MustPing(t, s, c, 9, 100)
			if _, err := s.Write(hello); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, hello) {
				t.Fatalf("got %q, %v; want %q", got, err, hello)
			}
			control(t, c.(*net.TCPConn), func(fd int) error {
				info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
				const synData = 0x20 // TCPI_OPT_SYN_DATA
				if got := err == nil && info.Options&synData != 0; got != tc.synData {
					t.Errorf("got data in the SYN %v (%v), want %v", got, err, tc.synData)
				}
				return err
			})
			n.mustCount(t, before, tc.want)
		})
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
}

// control calls f with the descriptor of a connection or listener.
func control(tb testing.TB, c syscall.Conn, f func(fd int) error) {
	tb.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(fd uintptr) { err = f(int(fd)) }), err)
	}
	if err != nil {
		tb.Fatal(err)
	}
}

// TestNotPaired: connections that have no part in the shortcut, and what is counted of them.
func TestNotPaired(t *testing.T) {
	for _, tc := range []struct {
		name       string
		enrol      []string
		verdict    rule.Verdict
		masquerade bool
		want       map[string]uint64
	}{
		{name: "client not enrolled", enrol: []string{"server"}, verdict: rule.Allow},
		{name: "server not enrolled", enrol: []string{"client"}, verdict: rule.Allow},
		{name: "neither enrolled", verdict: rule.Allow},
		{name: "masqueraded", enrol: []string{"client", "server"}, verdict: rule.Allow, masquerade: true},
		{
			name: "refused", enrol: []string{"client", "server"}, verdict: rule.Refuse,
			want: map[string]uint64{"connection_policy_refused": 1},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, nil)
			pods := map[string]*sandbox.Pod{}
			var cookies []uint64
			for _, name := range []string{"client", "server"} {
				pods[name] = sandboxtest.MustAddPod(t, n, name, sandbox.PodOptions{})
				cookie, err := datapath.NetnsCookie(pods[name].Path)
				if err != nil {
					t.Fatal(err)
				}
				cookies = append(cookies, cookie)
			}
			for _, name := range tc.enrol {
				if err := n.Enrol(sandboxtest.MustCookie(t, pods[name])); err != nil {
					t.Fatal(err)
				}
			}
			n.MustSetPolicy(t, sandbox.Between(tc.verdict, cookies...))
			empty := n.usage(t)
			l, address := mustListenOn(t, pods["server"])
			dial := address
			if tc.masquerade {
				dial = netip.MustParseAddrPort("10.96.0.10:80")
				if err := errors.Join(n.DNAT(dial, address), n.Masquerade(dial)); err != nil {
					t.Fatal(err)
				}
			}
			c, s := connect(t, pods["client"].Netns, l, "tcp4", dial)
			sandboxtest.MustPing(t, c, s, 10, 100)
			if seen := s.RemoteAddr().String() != c.LocalAddr().String(); seen != tc.masquerade {
				t.Errorf("server sees %s of %s: got masqueraded %v, want %v", s.RemoteAddr(), c.LocalAddr(), seen, tc.masquerade)
			}
			want := tc.want
			if want == nil {
				want = map[string]uint64{}
			}
			n.mustCount(t, nil, want)
			n.waitUsage(t, empty) // with the connection still open
		})
	}
}

// TestRelease: a pod that is released goes on by TCP with its next message.
func TestRelease(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, paired())

	// What is on its way by the shortcut is read before what follows by TCP.
	if _, err := c.Write([]byte("one ")); err != nil {
		t.Fatal(err)
	}
	if err := n.Release(n.cookies[1]); err != nil {
		t.Fatal(err)
	}
	n.MustSetPolicy(t, nil)
	before := n.counts(t)
	if _, err := c.Write([]byte("two")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 7)
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "one two" {
		t.Fatalf("got %q, %v; want %q", got, err, "one two")
	}
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_not_allowed": 21})
	f := n.mustFlow(t)
	for _, d := range []datapath.Direction{f.ToServer, f.ToClient} {
		if d.Shortcut || d.Verdict != rule.Refuse || d.Reason != reasonNotAllowed {
			t.Errorf("got direction %+v, want one on TCP that is refused: %q", d, reasonNotAllowed)
		}
	}
	before = n.counts(t)
	c2, s2 := n.connect(t)
	sandboxtest.MustPing(t, c2, s2, 3, 100)
	n.mustCount(t, before, map[string]uint64{})
	c.Close()
	s.Close()
	n.waitUsage(t, map[string]int{"pods": 1})
}

// TestAbortedConnections: clients that reset as soon as they are connected, or
// do not wait for that, leave nothing.
func TestAbortedConnections(t *testing.T) {
	n := mustTwoPods(t, nil)
	const connections = 500
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			s, err := n.l.Accept()
			if err != nil {
				return
			}
			// Its errors are the resets.
			_ = s.SetDeadline(time.Now().Add(deadline))
			_, _ = io.Copy(io.Discard, s)
			s.Close()
		}
	}()
	err := n.pods[0].Do(func() error {
		for i := range connections {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: n.address.Addr().As4(), Port: int(n.address.Port())}); err != unix.EINPROGRESS {
				return errors.Join(fmt.Errorf("connect: %w", err), unix.Close(fd))
			}
			if i%2 == 0 {
				_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 1000)
			}
			if i%4 == 0 {
				_, err = unix.Write(fd, []byte("x"))
			}
			reset := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			if err := errors.Join(err, reset, unix.Close(fd)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
	counts := n.counts(t)
	t.Log(counts)
	if counts["connection_paired"] == 0 {
		t.Errorf("got %v, want some connections paired before they are reset", counts)
	}
	n.l.Close()
	<-served
}

// TestUnfinishedHandshake: an attempt that never gets its answer leaves its
// entry in syns, which a sweep deletes.
func TestUnfinishedHandshake(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	_, address := mustListenOn(t, pods[1])
	_, restore := mustDropSYNACKs(t, pods[0].Netns, pods[1].IPv4)
	defer restore()
	if c, err := pods[0].Dial("tcp4", address.String(), 500*time.Millisecond); err == nil {
		c.Close()
		t.Fatal("got a connection without a SYN-ACK")
	}
	for _, tc := range []struct {
		age  time.Duration
		want map[string]int
	}{
		{time.Hour, map[string]int{"pods": 2, "policies": 4, "syns": 1}},
		{time.Minute, map[string]int{"pods": 2, "policies": 4, "syns": 1}},
		{0, map[string]int{"pods": 2, "policies": 4}},
	} {
		if err := n.Sweep(tc.age); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tc.want, n.usage(t)); diff != "" {
			t.Errorf("map usage after a sweep of %v (-want +got):\n%s", tc.age, diff)
		}
	}
	n.mustCount(t, nil, map[string]uint64{})
}

// recvAll receives with MSG_WAITALL what arrives in two halves.
func recvAll(tb testing.TB, from io.Writer, fd int, message []byte) {
	tb.Helper()
	got := make([]byte, len(message))
	var n int
	err := together(
		onThread(func() (err error) {
			n, _, err = unix.Recvfrom(fd, got, unix.MSG_WAITALL)
			return err
		}),
		func() error {
			half := len(message) / 2
			for _, part := range [][]byte{message[:half], message[half:]} {
				time.Sleep(20 * time.Millisecond) // until the receiver sleeps
				if _, err := from.Write(part); err != nil {
					return err
				}
			}
			return nil
		},
	)
	if err != nil || n != len(message) || !bytes.Equal(got, message) {
		tb.Fatalf("got %d bytes, %v; want %d, as sent", n, err, len(message))
	}
}

// TestWaitall: MSG_WAITALL gets the full count in the first read, and in all
// that follow, because its receiver stays on TCP.
func TestWaitall(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) { c.AllowBlocking = true })
	c, s := n.connect(t)
	fd := int(blocking(t, s).(blockingSocket))
	message := bytes.Repeat([]byte("0123456789"), 10)
	recvAll(t, c, fd, message)
	n.mustCount(t, nil, map[string]uint64{"connection_paired": 1, "message_not_seen": 2})
	for range 5 {
		recvAll(t, c, fd, message)
	}
	n.mustCount(t, nil, map[string]uint64{"connection_paired": 1, "message_not_seen": 2, "message_unsupported": 10})
	got := n.mustFlow(t).ToServer
	want := datapath.Direction{Verdict: rule.Allow, Reason: reasonUnsupported, ReadFlags: unix.MSG_WAITALL, Unsupported: true, TCPBytes: 600}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("direction (-want +got):\n%s", diff)
	}
}

// TestLowat: messages to a receiver with SO_RCVLOWAT go by TCP, and poll keeps to it.
func TestLowat(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	setLowat := func(bytes int) {
		control(t, s.(*net.TCPConn), func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, bytes)
		})
	}
	poll := func(wait time.Duration) (ready bool) {
		control(t, s.(*net.TCPConn), func(fd int) error {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(wait.Milliseconds()))
			ready = n > 0
			return err
		})
		return ready
	}
	before := n.counts(t)
	setLowat(200)
	message := bytes.Repeat([]byte("0123456789"), 10)
	if _, err := c.Write(message); err != nil {
		t.Fatal(err)
	}
	if got := n.mustFlow(t).ToServer; got.Shortcut || got.Reason != reasonLowat {
		t.Errorf("got direction %+v, want it on TCP: %q", got, reasonLowat)
	}
	if poll(50 * time.Millisecond) {
		t.Error("poll: got readable with 100 of 200 bytes")
	}
	if _, err := c.Write(message); err != nil {
		t.Fatal(err)
	}
	if !poll(5 * time.Second) {
		t.Error("poll: got nothing to read with 200 of 200 bytes")
	}
	got := make([]byte, 200)
	if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, append(message, message...)) {
		t.Fatalf("got %q, %v", got, err)
	}
	n.mustCount(t, before, map[string]uint64{"message_lowat": 1, "message_draining": 1})
	setLowat(1)
	before = n.counts(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
}

// TestHalfClose: after one end has said that it is done, it still gets all of
// the other's bytes by the shortcut, and then the end.
func TestHalfClose(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	if _, err := c.Write([]byte("last")); err != nil {
		t.Fatal(err)
	}
	if err := closeWrite(c); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); err != nil || string(got) != "last" {
		t.Fatalf("got %q, %v; want %q and the end", got, err, "last")
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write after shutdown: got %v, want EPIPE", err)
	}
	before := n.counts(t)
	answer := traffic{seed: 1, bytes: 1 << 20, maxWrite: 10_000, maxRead: 10_000}
	if err := together(func() error { return answer.write(s) }, func() error { return answer.read(c) }); err != nil {
		t.Fatal(err)
	}
	if got := n.since(t, before)["message_shortcut"]; got == 0 {
		t.Error("nothing took the shortcut after the half-close")
	}
	if err := errors.Join(closeWrite(s), wantEOF(c)); err != nil {
		t.Error(err)
	}
	c.Close()
	s.Close()
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
}

// TestPeerCloses: who writes to a connection that the other end has closed is told as on TCP.
func TestPeerCloses(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	for _, tc := range []struct {
		name    string
		verdict rule.Verdict
	}{{"TCP", rule.Refuse}, {"shortcut", rule.Allow}} {
		t.Run(tc.name, func(t *testing.T) {
			n.MustSetPolicy(t, sandbox.Between(tc.verdict, cookies...))
			l, address := mustListenOn(t, pods[1])
			c, s := connect(t, pods[0].Netns, l, "tcp4", address)
			before := n.counts(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			if got := n.since(t, before)["message_shortcut"]; (got > 0) != (tc.verdict == rule.Allow) {
				t.Errorf("got %d messages by shortcut", got)
			}
			s.Close()
			if err := wantEOF(c); err != nil {
				t.Error(err)
			}
			var errs []error
			waitUntil(t, "an error of write", func() bool {
				if _, err := c.Write([]byte("x")); err != nil {
					errs = append(errs, err)
				}
				return len(errs) == 2
			})
			if !errors.Is(errs[0], unix.EPIPE) && !errors.Is(errs[0], unix.ECONNRESET) || !errors.Is(errs[1], unix.EPIPE) {
				t.Errorf("got %v, want EPIPE or ECONNRESET, then EPIPE", errs)
			}
			c.Close()
			n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/hazards"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// unsupported returns what is remembered, without the times.
func (n *node) unsupported(tb testing.TB) []datapath.UnsupportedPort {
	tb.Helper()
	unsupported, err := n.UnsupportedPorts()
	if err != nil {
		tb.Fatal(err)
	}
	for i := range unsupported {
		if age := time.Since(unsupported[i].Since); age < 0 || age > deadline {
			tb.Errorf("an unsupported port is %v old", age)
		}
		unsupported[i].Since = time.Time{}
	}
	return unsupported
}

// warmUp makes both directions take the shortcut.
func (n *node) warmUp(tb testing.TB, c, s net.Conn) {
	tb.Helper()
	sandboxtest.MustPing(tb, c, s, 5, 100)
	n.mustHaveRedirected(tb)
}

// TestUnsupported: what a connection uses that is not served puts its direction on
// TCP, and later connections to the server port are not paired, until that is
// forgotten.
func TestUnsupported(t *testing.T) {
	recv := func(flags int) func(*testing.T, net.Conn, net.Conn) {
		return func(t *testing.T, c, s net.Conn) {
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			control(t, s.(*net.TCPConn), func(fd int) error {
				_, _, err := unix.Recvfrom(fd, make([]byte, 1), flags)
				return err
			})
		}
	}
	setServer := func(option, value int) func(*testing.T, net.Conn, net.Conn) {
		return func(t *testing.T, _, s net.Conn) {
			control(t, s.(*net.TCPConn), func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, value) })
		}
	}
	for _, tc := range []struct {
		name    string
		use     func(t *testing.T, c, s net.Conn)
		reason  string
		outcome string
		// client is set where the client did it: connections of other pods are paired.
		client bool
	}{
		{"MSG_WAITALL", recv(unix.MSG_WAITALL), "msg_waitall", "message_unsupported", false},
		{"MSG_TRUNC", recv(unix.MSG_TRUNC), "recv_flags", "message_unsupported", false},
		{"SO_RCVLOWAT", setServer(unix.SO_RCVLOWAT, 2), "so_rcvlowat", "message_lowat", false},
		{"SO_ZEROCOPY of the server", setServer(unix.SO_ZEROCOPY, 1), "so_zerocopy", "message_zerocopy", false},
		{"SO_ZEROCOPY of the client", func(t *testing.T, c, _ net.Conn) {
			setServer(unix.SO_ZEROCOPY, 1)(t, nil, c)
		}, "so_zerocopy", "message_zerocopy", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, nil)
			pods, cookies := n.MustEnrol(t, "client", "server", "neighbour")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			l, address := mustListenOn(t, pods[1])
			other, otherAddress := mustListenOn(t, pods[1])
			c, s := connect(t, pods[0].Netns, l, "tcp4", address)
			n.warmUp(t, c, s)
			before := n.counts(t)
			tc.use(t, c, s)
			sandboxtest.MustPing(t, c, s, 5, 100)
			if got := n.since(t, before); got[tc.outcome] < 5 {
				t.Errorf("got %v, want at least 5 of %s", got, tc.outcome)
			}
			want := []datapath.UnsupportedPort{{Netns: cookies[1], Port: address.Port(), Reasons: []string{tc.reason}}}
			if tc.client {
				want[0].Client = cookies[0]
			}
			check := func(when string) {
				t.Helper()
				if diff := cmp.Diff(want, n.unsupported(t)); diff != "" {
					t.Errorf("unsupported ports %s (-want +got):\n%s", when, diff)
				}
			}
			check("after the use")
			if got := n.mustFlow(t).Unsupported; !slices.Equal(got, want[0].Reasons) {
				t.Errorf("flow: got unsupported ports %v, want %v", got, want[0].Reasons)
			}

			// The agent is started again.
			if err := n.Datapath.Close(); err != nil {
				t.Fatal(err)
			}
			n.MustOpen(t)
			if err := n.Sweep(time.Hour); err != nil {
				t.Fatal(err)
			}
			check("after a take-over")
			n.closeAll(t, c, s)
			pair := func(from *sandbox.Pod, l net.Listener, want map[string]uint64) {
				t.Helper()
				before := n.counts(t)
				c, s := connect(t, from.Netns, l, "tcp4", l.Addr().(*net.TCPAddr).AddrPort())
				sandboxtest.MustPing(t, c, s, 5, 100)
				n.mustCount(t, before, want)
				n.closeAll(t, c, s)
			}
			served := map[string]uint64{"connection_paired": 1, "message_not_seen": 2, "message_shortcut": 8}
			unsupported := map[string]uint64{"connection_unsupported": 1}
			pair(pods[0], l, unsupported)
			pair(pods[0], other, served)
			// What a client uses is no matter of the others.
			if tc.client {
				pair(pods[2], l, served)
			} else {
				pair(pods[2], l, unsupported)
			}

			forget := func(netns uint64, port uint16, want int) {
				t.Helper()
				got, err := n.Forget(func(n, _ uint64, p uint16) bool { return n == netns && p == port })
				if err != nil || got != want {
					t.Errorf("got %d forgotten (%v), want %d", got, err, want)
				}
			}
			forget(cookies[1], otherAddress.Port(), 0)
			forget(cookies[0], address.Port(), 0)
			check("after others were forgotten")
			forget(cookies[1], address.Port(), 1)
			pair(pods[0], l, served)
		})
	}
}

// closeAll closes the ends of a connection and waits until its flow is gone.
func (n *node) closeAll(tb testing.TB, ends ...net.Conn) {
	tb.Helper()
	for _, c := range ends {
		c.Close()
	}
	waitUntil(tb, "the flow is gone", func() bool {
		flows, err := n.Flows()
		return err == nil && len(flows) == 0
	})
}

// TestUnsupportedGo: what is remembered of a pod goes when it does not take part any more.
func TestUnsupportedGo(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) { c.AllowBlocking = true })
	c, s := n.connect(t)
	recvAll(t, c, int(blocking(t, s).(blockingSocket)), []byte("0123456789"))
	if err := n.Sweep(time.Hour); err != nil || len(n.unsupported(t)) != 1 {
		t.Fatalf("got unsupported ports %v (%v), want one", n.unsupported(t), err)
	}
	if err := n.Release(n.cookies[1]); err != nil {
		t.Fatal(err)
	}
	if err := n.Sweep(time.Hour); err != nil || len(n.unsupported(t)) != 0 {
		t.Errorf("got unsupported ports %v (%v), want none", n.unsupported(t), err)
	}
}

// TestZerocopy: a sender that sets SO_ZEROCOPY in the middle of a flow gets its
// completions, one for each message.
func TestZerocopy(t *testing.T) {
	n := mustTwoPods(t, nil)
	c, s := n.connect(t)
	n.warmUp(t, c, s)
	const messages = 5
	message := bytes.Repeat([]byte("podshunt"), 4096)
	control(t, c.(*net.TCPConn), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1)
	})
	for range messages {
		control(t, c.(*net.TCPConn), func(fd int) error { return unix.Sendto(fd, message, unix.MSG_ZEROCOPY, nil) })
		got := make([]byte, len(message))
		if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, message) {
			t.Fatalf("bytes differ, or %v", err)
		}
	}
	completed := uint32(0)
	waitUntil(t, "all completions", func() bool {
		control(t, c.(*net.TCPConn), func(fd int) error {
			oob := make([]byte, 256)
			_, size, _, _, err := unix.Recvmsg(fd, nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				return nil // none has arrived
			}
			controls, err := unix.ParseSocketControlMessage(oob[:size])
			if err != nil || len(controls) != 1 || len(controls[0].Data) < 16 {
				t.Fatalf("got %v (%v), want one extended error", controls, err)
			}
			// struct sock_extended_err: first and last completed are its last words.
			low, high := binary.NativeEndian.Uint32(controls[0].Data[8:]), binary.NativeEndian.Uint32(controls[0].Data[12:])
			if low != completed {
				t.Fatalf("got completions from %d on, want from %d on", low, completed)
			}
			completed = high + 1
			return nil
		})
		return completed == messages
	})
	if got := n.mustFlow(t).ToServer; got.Shortcut || got.Reason != "zerocopy" {
		t.Errorf("got direction %+v, want it on TCP because of SO_ZEROCOPY", got)
	}
}

// TestMPTCPListener: what an MPTCP listener accepts from a plain client is
// paired on kernels that can bear it, and kept out and remembered on others.
func TestMPTCPListener(t *testing.T) {
	for _, tc := range []struct {
		name        string
		keepOut     bool
		mptcp, want bool // is paired
	}{
		{"plain listener", true, false, true},
		{"MPTCP listener, kept out", true, true, false},
		{"mptcp_listener", false, true, !hazard(t, hazards.MPTCPListener)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, func(c *datapath.Config) { c.SetNoMPTCPListeners(tc.keepOut) })
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			l := mustListenMPTCP(t, pods[1], tc.mptcp)
			address := l.Addr().(*net.TCPAddr).AddrPort()
			want := map[string]uint64{"connection_paired": 1, "message_not_seen": 2, "message_shortcut": 8}
			again := want
			unsupported := []datapath.UnsupportedPort{}
			if !tc.want {
				want = map[string]uint64{"connection_unsupported": 1, "message_peer_missing": 5}
				again = map[string]uint64{"connection_unsupported": 1}
				unsupported = []datapath.UnsupportedPort{{Netns: cookies[1], Port: address.Port(), Reasons: []string{"mptcp_listener"}}}
			}
			for _, want := range []map[string]uint64{want, again} {
				before := n.counts(t)
				c, s := connect(t, pods[0].Netns, l, "tcp4", address)
				sandboxtest.MustPing(t, c, s, 5, 100)
				n.mustCount(t, before, want)
				c.Close()
				s.Close()
			}
			if diff := cmp.Diff(unsupported, n.unsupported(t)); diff != "" {
				t.Errorf("unsupported ports (-want +got):\n%s", diff)
			}
		})
	}
}

// TestMPTCPListenerRace: what an MPTCP listener accepts is kept out also when
// accept runs beside the end of the handshake, and has made the kernel's socket
// the program's own before the handshake is seen; and when the agent was started
// again, for as long as it keeps them out.
func TestMPTCPListenerRace(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.SetNoMPTCPListeners(true) })
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l := mustListenMPTCP(t, pods[1], true)
	address := l.Addr().(*net.TCPAddr).AddrPort()
	connectAndForget := func(connections int, want string) {
		t.Helper()
		before := n.counts(t)
		accepted := make(chan error)
		for range connections {
			go func() { accepted <- acceptSpinning(l.(*net.TCPListener)) }()
			c, err := dialFrom(pods[0].Netns, 0, address)
			if err := errors.Join(err, <-accepted); err != nil {
				t.Fatal(err)
			}
			c.Close()
			if _, err := n.Forget(func(uint64, uint64, uint16) bool { return true }); err != nil {
				t.Fatal(err)
			}
		}
		n.mustCount(t, before, map[string]uint64{want: uint64(connections)})
	}
	connectAndForget(500, "connection_unsupported")
	n.mustClose(t)
	n.MustOpen(t)
	connectAndForget(10, "connection_unsupported")
	if n.Config.SetNoMPTCPListeners(false); !hazard(t, hazards.MPTCPListener) {
		n.mustClose(t)
		n.MustOpen(t)
		connectAndForget(10, "connection_paired")
	}
}

// acceptSpinning accepts and closes a connection without ever sleeping.
func acceptSpinning(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) {
		for end := time.Now().Add(deadline); time.Now().Before(end); {
			var s int
			s, _, err = unix.Accept4(int(fd), unix.SOCK_CLOEXEC)
			if err == nil {
				err = unix.Close(s)
			}
			if !errors.Is(err, unix.EAGAIN) {
				return
			}
		}
	}), err)
}

// mustListenMPTCP listens in a pod, with MPTCP or without.
func mustListenMPTCP(tb testing.TB, pod *sandbox.Pod, mptcp bool) net.Listener {
	tb.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(mptcp)
	var l net.Listener
	if err := pod.Do(func() (err error) {
		l, err = config.Listen(context.Background(), "tcp4", pod.IPv4.String()+":0")
		return err
	}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	control(tb, l.(*net.TCPListener), func(fd int) error {
		protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		if got := protocol == unix.IPPROTO_MPTCP; err == nil && got != mptcp {
			tb.Errorf("got protocol %d, want MPTCP: %v", protocol, mptcp)
		}
		return err
	})
	return l
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package diag_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/diag"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m.Run)) }

// TestList compares a list with the sockets of a pod, whose addresses and cookies are
// known from the sockets themselves. The server's is of IPv6, and serves both families.
func TestList(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	pod, other := sandboxtest.MustAddPod(t, s, "pod", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, s, "other", sandbox.PodOptions{})
	l := sandboxtest.MustListen(t, pod, "tcp", ":8080")
	sandboxtest.MustListen(t, other, "tcp", ":8081")
	var want []diag.Socket
	for _, ip := range []string{pod.IPv4.String(), pod.IPv6.String(), "127.0.0.1"} {
		client := sandboxtest.MustDial(t, pod, "tcp", net.JoinHostPort(ip, "8080"))
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		want = append(want, mustDescribe(t, client.(*net.TCPConn), diag.Established), mustDescribe(t, server.(*net.TCPConn), diag.Established))
	}
	want = append(want, mustDescribe(t, l.(*net.TCPListener), diag.Listening))
	conn, err := diag.Open(pod.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, tc := range []struct {
		name   string
		states uint32
		want   []diag.Socket
	}{
		{"all", diag.All, want},
		{"both", diag.Established | diag.Listening, want},
		{"established", diag.Established, want[:len(want)-1]},
		{"listening", diag.Listening, want[len(want)-1:]},
	} {
		got, err := list(conn, tc.states)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		byCookie := func(a, b diag.Socket) int { return int(int64(a.Cookie) - int64(b.Cookie)) }
		sorted := slices.Clone(tc.want)
		slices.SortFunc(sorted, byCookie)
		slices.SortFunc(got, byCookie)
		if diff := cmp.Diff(sorted, got, cmp.Comparer(func(a, b diag.Socket) bool {
			return a.Local == b.Local && a.Remote == b.Remote && a.Cookie == b.Cookie && a.State == b.State
		})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
	if _, err := diag.Open(t.TempDir()); err == nil {
		t.Error("got no error for a path that is no network namespace")
	}
}

func list(c *diag.Conn, states uint32) (found []diag.Socket, err error) {
	err = c.Each(states, func(s *diag.Socket) { found = append(found, *s) })
	return found, err
}

// mustListenAndAsk returns a pod that listens on a port, and a Conn for it.
func mustListenAndAsk(t *testing.T) (*sandbox.Pod, net.Listener, *diag.Conn) {
	t.Helper()
	pod := sandboxtest.MustAddPod(t, sandboxtest.MustNew(t, sandbox.Config{}), "pod", sandbox.PodOptions{})
	conn, err := diag.Open(pod.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return pod, sandboxtest.MustListen(t, pod, "tcp", ":8080"), conn
}

// TestReset resets one of two connections between the same addresses.
func TestReset(t *testing.T) {
	pod, l, conn := mustListenAndAsk(t)
	for _, ip := range []string{pod.IPv4.String(), pod.IPv6.String()} {
		var clients []net.Conn
		for range 2 {
			clients = append(clients, sandboxtest.MustDial(t, pod, "tcp", net.JoinHostPort(ip, "8080")))
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
		}
		reset := mustDescribe(t, clients[0].(*net.TCPConn), diag.Established)
		found, err := list(conn, diag.Established)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(found, func(s diag.Socket) bool { return s.Cookie == reset.Cookie })
		if i < 0 {
			t.Fatalf("got %v without %v", found, reset)
		}
		err = conn.Reset(found[i])
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Logf("the kernel does not reset sockets: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := clients[0].Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("%s: got error %v of a connection that is reset, want ECONNABORTED", ip, err)
		}
		if err := conn.Reset(found[i]); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s: got error %v when it is reset again, want ENOENT", ip, err)
		}
		if _, err := clients[1].Write([]byte("x")); err != nil {
			t.Errorf("%s: the other connection: %v", ip, err)
		}
	}
}

// mustDescribe returns what a list has of a socket.
func mustDescribe(t *testing.T, c syscall.Conn, state int) diag.Socket {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	s := diag.Socket{State: state}
	control := raw.Control(func(fd uintptr) { s.Cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE) })
	if err := errors.Join(control, err); err != nil {
		t.Fatal(err)
	}
	address := func(a net.Addr) netip.AddrPort {
		p := a.(*net.TCPAddr).AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	switch c := c.(type) {
	case *net.TCPListener:
		s.Local, s.Remote = address(c.Addr()), netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	case *net.TCPConn:
		s.Local, s.Remote = address(c.LocalAddr()), address(c.RemoteAddr())
	}
	return s
}

// TestSegments: a connection has sent and received a segment for each message.
func TestSegments(t *testing.T) {
	pod, l, conn := mustListenAndAsk(t)
	client := sandboxtest.MustDial(t, pod, "tcp", net.JoinHostPort(pod.IPv4.String(), "8080"))
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	const rounds = 10
	sandboxtest.MustPing(t, client, server, rounds, 100)
	sockets := 0
	if err := conn.EachWithSegments(diag.Established, func(s *diag.Socket) {
		sockets++
		if s.Segments != 2*rounds {
			t.Errorf("%s: got %d segments, want %d", s.Local, s.Segments, 2*rounds)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if sockets != 2 {
		t.Errorf("got %d sockets, want 2", sockets)
	}
}

// SPDX-License-Identifier: Apache-2.0

package datapath_test

import (
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
)

// TestBlockingListener: the first connections to a listener in blocking mode are
// not paired, until one of them has shown whether the program accepts into it.
func TestBlockingListener(t *testing.T) {
	for _, tc := range []struct {
		name        string
		acceptFlags int
		want        []string
	}{
		{"accepts into blocking mode", 0, []string{"connection_blocking_server", "connection_misfit", "connection_misfit"}},
		{"accepts into non-blocking mode", unix.SOCK_NONBLOCK, []string{"connection_blocking_server", "connection_paired", "connection_paired"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, nil)
			pods, cookies := n.mustEnrol(t, "client", "server")
			n.mustSetPolicy(t, between(datapath.Allow, cookies...))
			l, address := mustListenOn(t, pods[1])
			listener, err := l.(*net.TCPListener).File()
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			if err := unix.SetNonblock(int(listener.Fd()), false); err != nil {
				t.Fatal(err)
			}
			for i, want := range tc.want {
				before := n.counts(t)
				accepted := make(chan net.Conn, 1)
				go func() {
					defer close(accepted)
					fd, _, err := unix.Accept4(int(listener.Fd()), unix.SOCK_CLOEXEC|tc.acceptFlags)
					if err != nil {
						t.Errorf("accept: %v", err)
						return
					}
					f := os.NewFile(uintptr(fd), "accepted")
					defer f.Close()
					// It shares the mode with what net makes of it, so that comes first.
					buf := make([]byte, 1)
					for {
						n, _, err := unix.Recvfrom(fd, buf, 0)
						if err == unix.EAGAIN || err == unix.EINTR {
							time.Sleep(time.Millisecond)
							continue
						}
						if n != 1 || err != nil {
							t.Errorf("recv gives %d, %v", n, err)
						}
						break
					}
					if _, err := unix.Write(fd, buf); err != nil {
						t.Errorf("answer: %v", err)
					}
					c, err := net.FileConn(f)
					if err != nil {
						t.Error(err)
						return
					}
					accepted <- c
				}()
				c := pods[0].MustDial(t, "tcp4", address.String())
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
					t.Fatalf("got %d bytes and %v of the answer, want 1", n, err)
				}
				s, ok := <-accepted
				if !ok {
					t.FailNow()
				}
				if got := n.since(t, before); got[want] != 1 {
					t.Errorf("connection %d: got %v, want %s", i, got, want)
				}
				// The answer is acknowledged at the latest with the next request.
				if _, err := c.Write([]byte("y")); err != nil {
					t.Fatal(err)
				}
				if n, err := s.Read(make([]byte, 1)); n != 1 || err != nil {
					t.Fatalf("got %d bytes and %v of the second request, want 1", n, err)
				}
				c.Close()
				s.Close()
			}
		})
	}
}

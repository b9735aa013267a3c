// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestBlockingListener: the first connections to a listener in blocking mode are
// not paired, until one of them has shown whether the program accepts into it.
func TestBlockingListener(t *testing.T) {
	for _, tc := range []struct {
		name        string
		acceptFlags int
		want        []string
	}{
		{"accepts into blocking mode", 0, []string{"connection_blocking_server", "connection_unsupported", "connection_unsupported"}},
		{"accepts into non-blocking mode", unix.SOCK_NONBLOCK, []string{"connection_blocking_server", "connection_paired", "connection_paired"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, nil)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
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
				served := make(chan error, 1)
				go func() {
					fd, _, err := unix.Accept4(int(listener.Fd()), unix.SOCK_CLOEXEC|tc.acceptFlags)
					if err == nil {
						// The mode stays as it was accepted until all is acknowledged.
						err = errors.Join(serveTwice(fd), unix.Close(fd))
					}
					served <- err
				}()
				c := sandboxtest.MustDial(t, pods[0], "tcp4", address.String())
				for _, request := range []string{"x", "y"} {
					mustWrite(t, c, request)
					mustRead(t, c, request)
				}
				if err := <-served; err != nil {
					t.Fatal(err)
				}
				if got := n.since(t, before); got[want] != 1 {
					t.Errorf("connection %d: got %v, want %s", i, got, want)
				}
				c.Close()
			}
		})
	}
}

// serveTwice answers two requests of one byte. The second comes with the
// acknowledgement of the first answer, at the latest.
func serveTwice(fd int) error {
	buf := make([]byte, 1)
	for range 2 {
		for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
			_, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
				return err
			}
		}
		if _, err := unix.Write(fd, buf); err != nil {
			return err
		}
	}
	return nil
}

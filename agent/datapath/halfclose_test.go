// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestBlockingHalfClose: a program whose reads sleep sends, shuts down writing and
// waits for the answer. The peer's acknowledgement of the end wakes the recv, which
// must go on to wait. A plain close is not counted as a socket that leaves.
func TestBlockingHalfClose(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) { c.AllowBlocking = true })
	const connections, warm = 10, 5
	// One after another: with more threads that read at a time, a preemptible kernel may miss a read,
	// and then keeps the socket (docs/limits.md).
	for i := range connections {
		c, s := n.connect(t)
		socket := blocking(t, c)
		if err := together(onThread(func() error {
			p := make([]byte, 100)
			for range warm {
				if _, err := socket.Write(p); err != nil {
					return err
				}
				if _, err := io.ReadFull(socket, p); err != nil {
					return err
				}
			}
			if _, err := socket.Write(p); err != nil {
				return err
			}
			if err := closeWrite(socket); err != nil {
				return err
			}
			if _, err := io.ReadFull(socket, p); err != nil {
				return fmt.Errorf("connection %d: read after shutdown: %w", i, err)
			}
			return wantEOF(socket)
		}), func() error {
			p := make([]byte, 100)
			for range warm {
				if _, err := io.ReadFull(s, p); err != nil {
					return err
				}
				if _, err := s.Write(p); err != nil {
					return err
				}
			}
			if _, err := io.ReadFull(s, p); err != nil {
				return err
			}
			if err := wantEOF(s); err != nil {
				return err
			}
			// A delayed acknowledgement takes up to 40 ms, or as much as a busy machine makes of it.
			time.Sleep(200 * time.Millisecond)
			if _, err := s.Write(p); err != nil {
				return err
			}
			return s.Close()
		}); err != nil {
			t.Error(err)
		}
	}
	if got := n.counts(t); got["socket_evicted"] != connections || got["message_shortcut"] < connections*warm {
		t.Errorf("got %v, want %d sockets that have left, and messages on the shortcut before", got, connections)
	}

	before := n.counts(t)
	raw, rawAddress := mustRawListen(t, n.pods[1].Netns, n.pods[1].IPv4)
	for range connections {
		c, s := rawPair(t, n.pods[0], raw, rawAddress)
		sandboxtest.MustPing(t, c, s, 2, 100)
		if err := unix.SetNonblock(c.fd, false); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, c, "last")
		mustRead(t, s, "last")
		c.mustClose(t)
		if err := wantEOF(s); err != nil {
			t.Error(err)
		}
		s.mustClose(t)
	}
	if got := n.since(t, before); got["socket_evicted"] != 0 || got["connection_paired"] != connections {
		t.Errorf("after plain closes: got %v, want %d connections paired and no socket that has left", got, connections)
	}
}

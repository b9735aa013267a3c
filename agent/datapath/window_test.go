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
)

// TestWindow streams by TCP until the kernel has opened the receiver's window. Once bytes
// are redirected it is small, and large again when TCP is to take them all.
func TestWindow(t *testing.T) {
	const small = 64 << 10 // WINDOW_SMALL of bpf/window.h
	n := mustTwoPods(t, atOnce)
	client, server := n.connect(t)
	limit := time.Now().Add(deadline)
	if err := errors.Join(client.SetDeadline(limit), server.SetDeadline(limit)); err != nil {
		t.Fatal(err)
	}
	window := func() (bytes int) {
		t.Helper()
		control(t, server.(*net.TCPConn), func(fd int) (err error) {
			bytes, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP)
			return err
		})
		return bytes
	}
	// stream sends pieces, which the receiver reads at last.
	stream := func(pieces, size int) {
		t.Helper()
		b := newBacklog(client, server, 7)
		for range pieces {
			if !b.write(t, size) {
				break
			}
		}
		b.read(t)
	}
	// streamUntil streams while the window is not as wanted.
	streamUntil := func(what string, ok func(window int) bool) {
		t.Helper()
		waitUntil(t, what, func() bool {
			stream(64, 16<<10)
			return ok(window())
		})
	}
	set := func(verdict rule.Verdict) {
		t.Helper()
		n.MustSetPolicy(t, sandbox.Between(verdict, n.cookies...))
	}

	set(rule.Hold)
	streamUntil("a window that TCP has opened", func(window int) bool { return window > 2*small })
	opened := window()

	set(rule.Allow)
	_, redirected := n.redirected(t, func() {
		streamUntil("a small window while bytes are redirected", func(window int) bool { return window == small })
		stream(64, 16<<10)
	})
	if redirected == 0 {
		t.Error("nothing was redirected")
	}

	set(rule.Hold)
	streamUntil("a window that is large again", func(window int) bool { return window >= opened })

	// A window that the program has made smaller itself stays.
	control(t, server.(*net.TCPConn), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, small/2)
	})
	set(rule.Allow)
	_, redirected = n.redirected(t, func() {
		for range 4 {
			stream(64, 16<<10)
		}
	})
	if got := window(); got != small/2 || redirected == 0 {
		t.Errorf("the program's own limit of the window: got %d and %d redirected bytes, want %d", got, redirected, small/2)
	}
}

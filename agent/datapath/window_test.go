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
// are redirected it is small, and large again when TCP is to take them all: as large as the
// receive buffer, which has grown meanwhile, has room for.
func TestWindow(t *testing.T) {
	const small = 64 << 10 // WINDOW_SMALL of bpf/window.h
	n := mustTwoPods(t, atOnce)
	client, server := n.connect(t)
	limit := time.Now().Add(deadline)
	if err := errors.Join(client.SetDeadline(limit), server.SetDeadline(limit)); err != nil {
		t.Fatal(err)
	}
	option := func(level, name int) (value int) {
		t.Helper()
		control(t, server.(*net.TCPConn), func(fd int) (err error) {
			value, err = unix.GetsockoptInt(fd, level, name)
			return err
		})
		return value
	}
	window := func() int { return option(unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP) }
	buffer := func() int { return option(unix.SOL_SOCKET, unix.SO_RCVBUF) }
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
	opened, held := window(), buffer()

	set(rule.Allow)
	_, redirected := n.redirected(t, func() {
		streamUntil("a small window while bytes are redirected", func(window int) bool { return window == small })
		// What the shortcut has no room for goes by TCP, for which the kernel raises the buffer,
		// unless that is large enough already.
		waitUntil(t, "a larger receive buffer", func() bool {
			stream(1024, 16<<10)
			return buffer() > 3*held || held > 1<<20
		})
	})
	if redirected == 0 {
		t.Error("nothing was redirected")
	}

	set(rule.Hold)
	streamUntil("a window that is large again", func(window int) bool { return window >= opened })
	// Of a buffer, the kernel keeps up to a half for its own data.
	if got, grown := window(), buffer(); got < grown/2 {
		t.Errorf("the window is limited to %d bytes, with a receive buffer of %d", got, grown)
	}

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

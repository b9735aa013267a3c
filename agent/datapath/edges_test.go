// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// edgeReader reads as nginx does: it waits for an edge, and takes a recv that was
// not filled for the last one.
type edgeReader struct {
	epoll, fd int
	buf       []byte
	// untilNothing makes it read on until there is nothing left, as Go and envoy do.
	untilNothing bool
}

// readAll reads size bytes and returns how many came before no edge came any more.
func (r *edgeReader) readAll(size int, patience time.Duration) (got int, err error) {
	events := make([]unix.EpollEvent, 1)
	for got < size {
		n, err := unix.EpollWait(r.epoll, events, int(patience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return got, err
		}
		for {
			n, err := unix.Read(r.fd, r.buf)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				return got, err
			}
			got += n
			if n < len(r.buf) && !r.untilNothing {
				break
			}
		}
	}
	return got, nil
}

// mustWatch takes a connection over for edges of epoll.
func mustWatch(tb testing.TB, c net.Conn, untilNothing bool) *edgeReader {
	tb.Helper()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	// The mode is shared with c; Fd would put both into blocking mode.
	raw, err := f.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	r := &edgeReader{buf: make([]byte, 64<<10), untilNothing: untilNothing}
	if err := raw.Control(func(fd uintptr) { r.fd = int(fd) }); err != nil {
		tb.Fatal(err)
	}
	r.epoll = mustWatchEdges(tb, r.fd)
	return r
}

// mustWatchEdges returns an epoll that watches a socket for edges until the test ends.
func mustWatchEdges(tb testing.TB, fd int) (epoll int) {
	tb.Helper()
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(epoll) })
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET}); err != nil {
		tb.Fatal(err)
	}
	return epoll
}

// TestEdges: a program that waits for edges, and stops at a recv that was not
// filled, gets TCP bytes that came behind redirected ones only because nothing is
// redirected to it; one that reads until nothing is left has the shortcut.
func TestEdges(t *testing.T) {
	const message, rounds = 30_000, 40
	for _, tc := range []struct {
		name         string
		untilNothing bool
		drains       uint32
		wantShortcut bool
		wantStall    bool
	}{
		{name: "stops at a recv that was not filled", drains: 4},
		{name: "reads until nothing is left", untilNothing: true, drains: 4, wantShortcut: true},
		// What the trial is for.
		{name: "stops, without the trial", wantShortcut: true, wantStall: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustTwoPods(t, func(c *datapath.Config) { c.TrialDrains = tc.drains })
			c, s := n.connect(t)
			r := mustWatch(t, s, tc.untilNothing)
			before := n.counts(t)
			for i := range rounds {
				mustWriteAll(t, c, message)
				if got, err := r.readAll(message, deadline); got != message || err != nil {
					t.Fatalf("round %d: got %d bytes (%v), want %d", i, got, err, message)
				}
			}
			counts := n.since(t, before)
			if got := counts["message_shortcut"] > rounds/2; got != tc.wantShortcut {
				t.Errorf("got %v, want most by the shortcut: %v", counts, tc.wantShortcut)
			}
			if (counts["message_edge"] > rounds/2) == tc.wantShortcut {
				t.Errorf("got %v, want most by TCP for the edges: %v", counts, !tc.wantShortcut)
			}

			// One message by shortcut, if it may, then one by TCP behind it, both before
			// anybody waits.
			first, err := tcpInfo(s)
			if err != nil {
				t.Fatal(err)
			}
			mustWriteAll(t, c, message)
			n.MustSetPolicy(t, sandbox.Between(rule.Hold, n.cookies...))
			mustWriteAll(t, c, message)
			waitUntil(t, "the second message at the receiver", func() bool {
				info, err := tcpInfo(s)
				return err == nil && info.Bytes_received >= first.Bytes_received+message
			})
			patience := deadline
			if tc.wantStall {
				patience = 3 * time.Second
			}
			got, err := r.readAll(2*message, patience)
			if err != nil || (got == 2*message) == tc.wantStall {
				t.Errorf("got %d bytes (%v) of %d, want a stall: %v", got, err, 2*message, tc.wantStall)
			}
			if tc.wantStall {
				if rest, err := unix.Read(r.fd, r.buf); rest != 2*message-got {
					t.Errorf("got %d bytes (%v) when asked once more, want the %d that were there", rest, err, 2*message-got)
				}
			}
		})
	}
}

func mustWriteAll(tb testing.TB, c net.Conn, size int) {
	tb.Helper()
	if _, err := c.Write(make([]byte, size)); err != nil {
		tb.Fatal(err)
	}
}

func tcpInfo(c net.Conn) (info *unix.TCPInfo, err error) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	return info, errors.Join(raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }), err)
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// tooMuch is how many eighths of TCP's speed are more than the shortcut can have.
const tooMuch = 1000

// compares has streams compared: see SetCompare.
func compares(eighths uint32, busy time.Duration) func(*datapath.Config) {
	return func(c *datapath.Config) {
		atOnce(c)
		c.LeaveRatio = leaveRatio
		c.SetCompare(eighths, busy)
	}
}

// mustStream sends messages of 2000 bytes in a row, and then wants them to be read.
func mustStream(tb testing.TB, c, s io.ReadWriter, messages int) {
	tb.Helper()
	message := make([]byte, 2000)
	for i := range message {
		message[i] = byte(i)
	}
	for range messages {
		if _, err := c.Write(message); err != nil {
			tb.Fatal(err)
		}
	}
	got := make([]byte, messages*len(message))
	if _, err := io.ReadFull(s, got); err != nil {
		tb.Fatal(err)
	}
	for i, b := range got {
		if b != message[i%len(message)] {
			tb.Fatalf("byte %d: got %d, want %d", i, b, message[i%len(message)])
		}
	}
}

// TestCompare: a stream goes by TCP now and then, and leaves if the shortcut is slower than was
// asked for; requests and answers are not compared.
func TestCompare(t *testing.T) {
	for _, tc := range []struct {
		name     string
		eighths  uint32
		busy     time.Duration
		messages int           // in a row
		pause    time.Duration // after these
		compared bool
		leaves   bool
	}{
		{name: "slower", eighths: tooMuch, busy: time.Second, messages: 8, compared: true, leaves: true},
		{name: "faster", eighths: 1, busy: time.Second, messages: 8, compared: true},
		{name: "the program sets the pace", eighths: tooMuch, messages: 8, pause: time.Millisecond, compared: true},
		{name: "requests and answers", eighths: tooMuch, busy: time.Second, messages: 1},
		{name: "not compared", eighths: 0, messages: 8},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, c, s := mustRawPair(t, compares(tc.eighths, tc.busy))
			n.mustBeShortcut(t, c, s)
			before := n.counts(t)
			talk := func(rounds int) {
				t.Helper()
				for range rounds {
					mustStream(t, c, s, tc.messages)
					if tc.messages == 1 {
						sandboxtest.MustPing(t, s, c, 1, 100)
					}
					time.Sleep(tc.pause)
				}
			}
			switch {
			case tc.leaves:
				waitUntil(t, "the flow to leave", func() bool {
					talk(100)
					return n.usage(t)["sockets"] == 0
				})
				if f := n.mustFlow(t); f.ToServer.Reason != "no_gain" {
					t.Errorf("got reason %q, want that there is no gain", f.ToServer.Reason)
				}
			case tc.compared:
				compared := func() uint64 { return n.since(t, before)["message_compared"] }
				waitUntil(t, "the stream to be compared", func() bool { talk(100); return compared() > 0 })
				last := compared()
				waitUntil(t, "the comparison to be over", func() bool {
					talk(1000)
					over := compared() == last
					last = compared()
					return over
				})
				n.mustBeShortcut(t, c, s)
			default:
				for began := time.Now(); time.Since(began) < 2*time.Second; { // streams are compared after one
					talk(100)
				}
			}
			got2 := n.since(t, before)
			if (got2["message_compared"] > 0) != tc.compared || (got2["message_no_gain"] > 0 || n.usage(t)["sockets"] == 0) != tc.leaves {
				t.Errorf("got %v, want it compared: %v, and left: %v", got2, tc.compared, tc.leaves)
			}
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCompareBoth: while a stream goes by TCP to be compared, so do its answers, as they would if
// the flow left. By the shortcut they would make TCP look slower than it is.
func TestCompareBoth(t *testing.T) {
	n, c, s := mustRawPair(t, compares(1, time.Second))
	n.mustBeShortcut(t, c, s)
	before := n.mustFlow(t).ToClient.TCPBytes
	waitUntil(t, "an answer by TCP", func() bool {
		for range 100 {
			mustStream(t, c, s, 8)
			mustWrite(t, s, "answer")
			mustRead(t, c, "answer")
		}
		return n.mustFlow(t).ToClient.TCPBytes > before
	})
}

// TestCompareCalm: a stream whose reader keeps up with it by TCP is compared to the end.
func TestCompareCalm(t *testing.T) {
	n, c, s := mustRawPair(t, compares(tooMuch, time.Second))
	n.mustBeShortcut(t, c, s)
	// TCP has the second of three turns (bpf/compare.h). Both ends run on one CPU, so they are long ones.
	turn := func() int64 {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
			t.Fatal(err)
		}
		return now.Nano() >> 24 % 3
	}
	waitUntil(t, "the flow to leave", func() bool {
		for range 1000 {
			if turn() == 1 {
				sandboxtest.MustPing(t, c, s, 1, 2000)
			} else {
				mustStream(t, c, s, 8)
			}
		}
		return n.usage(t)["sockets"] == 0
	})
}

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

// TestCompare: a stream goes by TCP now and then, and leaves if the shortcut is slower than was
// asked for; requests and answers are not compared.
func TestCompare(t *testing.T) {
	const asked = 1000 // more than the shortcut can be
	for _, tc := range []struct {
		name     string
		eighths  uint32
		busy     time.Duration
		messages int           // in a row
		pause    time.Duration // after these
		compared bool
		leaves   bool
	}{
		{name: "slower", eighths: asked, busy: time.Second, messages: 8, compared: true, leaves: true},
		{name: "faster", eighths: 1, busy: time.Second, messages: 8, compared: true},
		{name: "the program sets the pace", eighths: asked, messages: 8, pause: time.Millisecond, compared: true},
		{name: "requests and answers", eighths: asked, busy: time.Second, messages: 1},
		{name: "not compared", eighths: 0, messages: 8},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, c, s := mustRawPair(t, func(c *datapath.Config) {
				atOnce(c)
				c.LeaveRatio = leaveRatio
				c.SetCompare(tc.eighths, tc.busy)
			})
			n.mustBeShortcut(t, c, s)
			before := n.counts(t)
			message, got := make([]byte, 2000), make([]byte, 2000*tc.messages)
			for i := range message {
				message[i] = byte(i)
			}
			talk := func(rounds int) {
				t.Helper()
				for range rounds {
					for range tc.messages {
						if _, err := c.Write(message); err != nil {
							t.Fatal(err)
						}
					}
					if _, err := io.ReadFull(s, got); err != nil {
						t.Fatal(err)
					}
					for i, b := range got {
						if b != message[i%len(message)] {
							t.Fatalf("byte %d: got %d, want %d", i, b, message[i%len(message)])
						}
					}
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
	n, c, s := mustRawPair(t, func(c *datapath.Config) {
		atOnce(c)
		c.LeaveRatio = leaveRatio
		c.SetCompare(1, time.Second)
	})
	n.mustBeShortcut(t, c, s)
	const messages, size = 8, 2000
	message, got := make([]byte, size), make([]byte, messages*size)
	before := n.mustFlow(t).ToClient.TCPBytes
	waitUntil(t, "an answer by TCP", func() bool {
		for range 100 {
			for range messages {
				if _, err := c.Write(message); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.ReadFull(s, got); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, s, "answer")
			mustRead(t, c, "answer")
		}
		return n.mustFlow(t).ToClient.TCPBytes > before
	})
}

// TestCompareCalm: a stream whose reader keeps up with it by TCP is compared to the end.
func TestCompareCalm(t *testing.T) {
	n, c, s := mustRawPair(t, func(c *datapath.Config) {
		atOnce(c)
		c.LeaveRatio = leaveRatio
		c.SetCompare(1000, time.Second) // more than the shortcut can be
	})
	n.mustBeShortcut(t, c, s)
	const messages, size = 8, 2000
	message, got := make([]byte, size), make([]byte, messages*size)
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
				sandboxtest.MustPing(t, c, s, 1, size)
				continue
			}
			for range messages {
				if _, err := c.Write(message); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.ReadFull(s, got); err != nil {
				t.Fatal(err)
			}
		}
		return n.usage(t)["sockets"] == 0
	})
}

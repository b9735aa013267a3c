// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"context"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// messageSize is that of all messages of a oneWay.
const messageSize = 10

// oneWay is a connection whose client alone sends, in messages that are read at
// once: its limit is met when 4 of them look unread.
type oneWay struct {
	*node
	cookies []uint64
	c, s    *rawSocket
	sent    int
}

// mustOneWay connects when a guard sees splice, or with guard false while none does.
func mustOneWay(tb testing.TB, guard, blocking bool, change ...func(*datapath.Config)) *oneWay {
	tb.Helper()
	n := mustNode(tb, func(c *datapath.Config) {
		c.Budget, c.AllowBlocking = 4096, blocking
		if !guard {
			c.Guards = nil
		}
		for _, f := range change {
			f(c)
		}
	})
	if guard && hazard(tb, "no-trampolines") {
		n.mustPretendGuard(tb)
	}
	pods, cookies := n.MustEnrol(tb, "client", "server")
	n.MustSetPolicy(tb, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(tb, pods[1].Netns, pods[1].IPv4)
	c, s := rawPair(tb, pods[0], l, address)
	return &oneWay{node: n, cookies: cookies, c: c, s: s}
}

// mustPretendGuard tells the programs that a guard sees splice, which nobody uses here.
func (n *node) mustPretendGuard(tb testing.TB) {
	tb.Helper()
	control := n.mustPinned(tb, bpf.ShortcutMapControl)
	var settings bpf.ShortcutSettings
	if err := control.Lookup(uint32(0), &settings); err != nil {
		tb.Fatal(err)
	}
	settings.SpliceSeen = 1
	if err := control.Put(uint32(0), settings); err != nil {
		tb.Fatal(err)
	}
}

// write writes a message and returns it.
func (w *oneWay) write(tb testing.TB) (message string) {
	tb.Helper()
	message = fmt.Sprintf("%*d", messageSize, w.sent)
	w.sent++
	mustWrite(tb, w.c, message)
	return message
}

func (w *oneWay) say(tb testing.TB, times int) {
	tb.Helper()
	for range times {
		mustRead(tb, w.s, w.write(tb))
	}
}

// miss is for MissReads: it returns when a redirected message looks unread.
func (w *oneWay) miss(tb testing.TB) {
	tb.Helper()
	waitUntil(tb, "a read that is missed", func() bool {
		w.say(tb, 1)
		return w.mustFlow(tb).ToServer.Unread > 0
	})
	if got := w.mustFlow(tb).ToServer; !got.Shortcut || !got.Redirected || got.Unread != messageSize {
		tb.Fatalf("got %+v, want a redirected message that looks unread", got)
	}
}

// wantAllRead wants nothing to look unread.
func (w *oneWay) wantAllRead(tb testing.TB) {
	tb.Helper()
	got := w.mustFlow(tb).ToServer
	if all := uint64(w.sent * messageSize); got.Redirected || got.Unread != 0 || got.ShortcutBytes+got.TCPBytes != all {
		tb.Errorf("got %+v, want %d bytes sent and read", got, all)
	}
	if got := w.mustCharge(tb, w.cookies[1]); got != 0 {
		tb.Errorf("the server's pod is charged with %d bytes, want 0", got)
	}
}

// TestRecount: redirected messages whose reads were missed are found to be read, by
// the queue that is empty. The direction keeps the shortcut, and comes back to it; a
// socket that has to leave leaves, and an unload ends.
func TestRecount(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*testing.T, *oneWay)
	}{
		{"then the socket leaves", func(t *testing.T, w *oneWay) {
			if err := unix.SetNonblock(w.s.fd, false); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, "the server's socket to leave", func() bool {
				mustWrite(t, w.s, "x")
				mustRead(t, w.c, "x")
				return w.counts(t)["socket_evicted"] == 1
			})
		}},
		{"then an unload", func(t *testing.T, w *oneWay) {
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			if waiting, err := w.Unload(ctx); err != nil {
				t.Errorf("unload: %v, waiting for %+v", err, waiting)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := mustOneWay(t, true, false)
			w.say(t, 10)
			w.mustCount(t, nil, map[string]uint64{"connection_paired": 1, "message_not_seen": 1, "message_shortcut": 9})

			// Above the limit.
			w.MissReads(t, func() {
				w.miss(t)
				before := w.counts(t)
				w.say(t, 20)
				w.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
			})
			before := w.counts(t)
			w.say(t, 10)
			w.mustCount(t, before, map[string]uint64{"message_shortcut": 10})
			w.wantAllRead(t)

			// What is in the queue is unread.
			before = w.counts(t)
			unread := ""
			for range 5 {
				unread += w.write(t)
			}
			w.mustCount(t, before, map[string]uint64{"message_shortcut": 3, "message_budget": 1, "message_draining": 1})
			mustRead(t, w.s, unread)

			// On the way back from TCP.
			w.MissReads(t, func() { w.miss(t) })
			w.MustSetPolicy(t, sandbox.Between(rule.Hold, w.cookies...))
			before = w.counts(t)
			w.say(t, 1)
			w.MustSetPolicy(t, sandbox.Between(rule.Allow, w.cookies...))
			w.say(t, 10)
			w.mustCount(t, before, map[string]uint64{"message_not_allowed": 1, "message_shortcut": 10})
			w.wantAllRead(t)

			tc.end(t, w)
			w.say(t, 10)
		})
	}
}

// TestRecountTrial: reads that were missed do not keep a direction on trial, of which
// they make each burst look larger than all that were read.
func TestRecountTrial(t *testing.T) {
	w := mustOneWay(t, true, false, onTrial)
	mustNotDelay(t, w.c, w.s) // see TestPiggyback
	ask := func(times int) {
		for range times {
			w.say(t, 1)
			mustWrite(t, w.s, "answer")
			mustRead(t, w.c, "answer")
		}
	}
	w.MissReads(t, func() { ask(3) })
	ask(int(w.Config.TrialReads) + 1)
	before := w.counts(t)
	ask(10)
	w.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
	w.wantAllRead(t)
}

// TestRecountRefused: an empty queue says nothing of a receiver in blocking mode,
// which may be inside a read, nor where nobody sees splice. What looks unread then
// keeps the direction on TCP.
func TestRecountRefused(t *testing.T) {
	for _, tc := range []struct {
		name            string
		guard, blocking bool
	}{
		{"blocking mode", true, true},
		{"no guard", false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := mustOneWay(t, tc.guard, tc.blocking)
			if err := unix.SetNonblock(w.s.fd, !tc.blocking); err != nil {
				t.Fatal(err)
			}
			w.say(t, 10)
			w.MissReads(t, func() {
				w.miss(t)
				before := w.counts(t)
				w.say(t, 20)
				w.mustCount(t, before, map[string]uint64{"message_shortcut": 2, "message_budget": 1, "message_unobserved": 17})
			})
			before := w.counts(t)
			w.say(t, 10)
			w.mustCount(t, before, map[string]uint64{"message_unobserved": 10})
			if got := w.mustFlow(t).ToServer; got.Shortcut || got.Unread != 21*messageSize {
				t.Errorf("got %+v, want TCP, and the 21 messages unread whose reads were missed", got)
			}
		})
	}
}

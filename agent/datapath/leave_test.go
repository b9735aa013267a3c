// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// leaveRatio is the default.
const leaveRatio = 3

// leaves lets connections leave by what they send, and not by how fast that is, which depends
// on the machine.
func leaves(c *datapath.Config) {
	c.LeaveRatio = leaveRatio
	c.SetCompare(0, 0)
}

// TestLeave: a connection leaves the SOCKHASH when the shortcut is no faster for what it
// sends, and no byte is lost; others stay.
func TestLeave(t *testing.T) {
	stream := func(size int) func(*testing.T, *rawSocket, *rawSocket) error {
		return func(_ *testing.T, c, s *rawSocket) error {
			one := traffic{seed: 1, bytes: 20_000 * min(size, 1000), maxWrite: size, maxRead: 100_000}
			return together(func() error { return one.write(c) }, func() error { return one.read(s) })
		}
	}
	const few = 16 // a receiver that begins to wait just then may look like one that waits for edges
	for _, tc := range []struct {
		name   string
		start  func(t *testing.T, c, s *rawSocket) // nil: on the shortcut
		talk   func(t *testing.T, c, s *rawSocket) error
		leaves bool
		most   uint64 // messages that go by TCP for edges before it leaves
	}{
		{name: "stream of small messages", talk: stream(100), leaves: true, most: few},
		{name: "stream of large messages", talk: stream(60_000)},
		{name: "small messages that are answered", talk: answered},
		{name: "sendfile", talk: sendFiles, leaves: true, most: few},
		{name: "neither end may receive by the shortcut", start: func(t *testing.T, c, s *rawSocket) {
			mustWatchEdges(t, c.fd)
			mustWatchEdges(t, s.fd)
		}, talk: answered, leaves: true, most: 256},
		{name: "one end may not", start: func(t *testing.T, _, s *rawSocket) { mustWatchEdges(t, s.fd) }, talk: answered},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, c, s := mustRawPair(t, func(c *datapath.Config) {
				atOnce(c)
				leaves(c)
				c.TrialDrains = datapath.DefaultConfig().TrialDrains
			})
			if tc.start != nil {
				tc.start(t, c, s)
				mustNotDelay(t, c, s)
			} else {
				n.mustBeShortcut(t, c, s)
			}
			before := n.counts(t)
			if err := tc.talk(t, c, s); err != nil {
				t.Fatal(err)
			}
			if !tc.leaves {
				if got := n.since(t, before); got["message_no_gain"] != 0 || got["message_shortcut"] == 0 {
					t.Errorf("got %v, want messages by shortcut, and that the flow does not leave", got)
				}
				return
			}
			waitUntil(t, "the flow to leave", func() bool {
				sandboxtest.MustPing(t, c, s, 1, 100)
				return n.usage(t)["sockets"] == 0
			})
			if got := n.since(t, before)["message_edge"]; got > tc.most {
				t.Errorf("%d messages were held back for edges before the flow left, want at most %d", got, tc.most)
			}
			f := n.mustFlow(t)
			for name, d := range map[string]struct {
				reason  string
				evicted bool
			}{"server": {f.ToServer.Reason, f.ToServer.Evicted}, "client": {f.ToClient.Reason, f.ToClient.Evicted}} {
				if d.reason != "no_gain" || !d.evicted {
					t.Errorf("to the %s: got %+v, want it evicted, since there is no gain", name, d)
				}
			}
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
		})
	}
}

func answered(t *testing.T, c, s *rawSocket) error {
	sandboxtest.MustPing(t, c, s, 10_000, 100)
	return nil
}

// sendFiles sends a file a few times, as a web server does.
func sendFiles(t *testing.T, c, s *rawSocket) error {
	const size, times = 1 << 20, 8
	path := filepath.Join(t.TempDir(), "file")
	one := traffic{seed: 2, bytes: size, maxWrite: size, maxRead: 100_000}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := one.write(f); err != nil {
		return err
	}
	for range times {
		offset := int64(0)
		if err := together(
			func() error {
				for offset < size {
					if _, err := c.call(unix.POLLOUT, func() (int, error) {
						return unix.Sendfile(c.fd, int(f.Fd()), &offset, int(size-offset))
					}); err != nil {
						return fmt.Errorf("sendfile: %w", err)
					}
				}
				return nil
			},
			func() error { return one.read(io.Reader(s)) },
		); err != nil {
			return err
		}
	}
	return nil
}

// TestLeaveAndReturn: a connection that has left joins again later, each time less soon and
// after a second at least, and no byte is lost.
func TestLeaveAndReturn(t *testing.T) {
	if noWatch(t) {
		return
	}
	for _, oneWay := range []bool{true, false} {
		t.Run(fmt.Sprintf("one way %v", oneWay), func(t *testing.T) {
			n := mustNode(t, func(c *datapath.Config) {
				watched(c)
				leaves(c)
			})
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			n.joinWatched(t)
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c, s := rawPair(t, pods[0], l, address)
			n.mustTalkUntilPaired(t, nil, c, s)
			n.mustBeShortcut(t, c, s)
			small := traffic{seed: 3, bytes: 300_000, maxWrite: 100, maxRead: 100_000}
			mixed := traffic{seed: 4, bytes: 3_000_000, maxWrite: 3000, maxRead: 10_000}
			for again := range uint64(3) {
				began := time.Now()
				waitUntil(t, "the flow to leave", func() bool {
					if err := exchange(c, s, small, traffic{}); err != nil {
						t.Fatal(err)
					}
					return n.counts(t)["socket_evicted"] > 2*again
				})
				waitUntil(t, "the flow to return", func() bool {
					toClient := traffic{}
					if !oneWay {
						toClient = mixed
					}
					if err := exchange(c, s, mixed, toClient); err != nil {
						t.Fatal(err)
					}
					return n.counts(t)["connection_returned"] > again
				})
				// The kernel's coarse clock is behind by a tick.
				if away := time.Since(began); away < time.Second-10*time.Millisecond {
					t.Errorf("returned %v after it was on the shortcut, want after a second or more", away)
				}
			}
			sandboxtest.MustPing(t, c, s, 10, 100)
			segments, returned := c.segments(t), n.counts(t)["connection_returned"]
			t.Logf("%d segments by TCP, returned %d times: %v", segments, returned, n.counts(t))
			if most := bits.Len64(segments); returned > uint64(most) {
				t.Errorf("returned %d times within %d segments, want at most %d times", returned, segments, most)
			}
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLeaveRefused: a connection that is not allowed any more leaves the SOCKHASH, and returns
// when it is allowed again, with its next messages. Where it could not return, it stays.
func TestLeaveRefused(t *testing.T) {
	times := uint64(20)
	if testing.Short() {
		times = 5
	}
	for _, tc := range []struct {
		name      string
		verdict   rule.Verdict
		joinAfter int
		oneWay    bool
	}{
		{name: "refused", verdict: rule.Refuse, joinAfter: joinAfter},
		{name: "refused, one way", verdict: rule.Refuse, joinAfter: joinAfter, oneWay: true},
		{name: "on hold", verdict: rule.Hold, joinAfter: joinAfter},
		{name: "joins at the handshake only", verdict: rule.Refuse},
	} {
		t.Run(tc.name, func(t *testing.T) {
			watches := tc.joinAfter > 0
			if watches && noWatch(t) {
				return
			}
			n := mustNode(t, func(c *datapath.Config) {
				atOnce(c)
				c.JoinAfter = uint32(tc.joinAfter)
			})
			pods, cookies := n.MustEnrol(t, "client", "server")
			allow := sandbox.Between(rule.Allow, cookies...)
			n.MustSetPolicy(t, allow)
			if watches {
				n.joinWatched(t)
			}
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c, s := rawPair(t, pods[0], l, address)
			n.mustTalkUntilPaired(t, nil, c, s)
			n.mustBeShortcut(t, c, s)
			talk := func() {
				toServer, toClient := traffic{seed: 5, bytes: 20_000, maxWrite: 1000, maxRead: 1000}, traffic{}
				if !tc.oneWay {
					toClient = toServer
				}
				if err := exchange(c, s, toServer, toClient); err != nil {
					t.Fatal(err)
				}
			}
			for i := range times {
				n.MustSetPolicy(t, sandbox.Between(tc.verdict, cookies...))
				if watches {
					waitUntil(t, "the flow to leave", func() bool { talk(); return n.usage(t)["sockets"] == 0 })
				} else {
					talk()
				}
				if f := n.mustFlow(t); f.ToServer.Reason != reasonNotAllowed || f.ToServer.Evicted != watches {
					t.Errorf("got %+v, want it on TCP since it is not allowed, and evicted: %v", f.ToServer, watches)
				}
				n.MustSetPolicy(t, allow)
				if watches {
					waitUntil(t, "the flow to return", func() bool { talk(); return n.counts(t)["connection_returned"] == i+1 })
				}
				waitUntil(t, "the shortcut", func() bool { talk(); return n.mustFlow(t).ToServer.Shortcut })
			}
			if got := n.counts(t); !watches && got["socket_evicted"] != 0 {
				t.Errorf("got %v, want no socket evicted, as it could not return", got)
			}
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
		})
	}
}

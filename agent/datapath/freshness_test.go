// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestRefresh: each direction sends a message by TCP when the interval has
// passed since its last one, and goes on by the shortcut.
func TestRefresh(t *testing.T) {
	// 10 round trips take far less time, also on a busy machine.
	const interval = 10 * time.Second
	n := mustTwoPods(t, func(c *datapath.Config) {
		atOnce(c)
		c.RefreshInterval = interval
	})
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, paired())
	before := n.counts(t)
	time.Sleep(interval + 100*time.Millisecond)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_refresh": 2, "message_shortcut": 18})

	// What goes by TCP for another reason keeps the connection fresh as well.
	time.Sleep(interval - 3*time.Second)
	n.MustSetPolicy(t, sandbox.Between(rule.Hold, n.cookies...))
	sandboxtest.MustPing(t, c, s, 1, 100)
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, n.cookies...))
	before = n.counts(t)
	time.Sleep(4 * time.Second)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})

	// One direction alone.
	time.Sleep(interval + 100*time.Millisecond)
	before = n.counts(t)
	for range 10 {
		mustWrite(t, c, "one way")
		mustRead(t, s, "one way")
	}
	n.mustCount(t, before, map[string]uint64{"message_refresh": 1, "message_shortcut": 9})
}

// conversation is a connection that was busy for longer than the node's
// connection tracking remembers one that sends no packets.
type conversation struct {
	path, act    string
	held         bool // on TCP
	client, serv net.Conn
	longest      time.Duration // between two rounds
	broken       error         // what ended it while it was busy
}

func (c *conversation) String() string {
	way := "shortcut"
	if c.held {
		way = "TCP"
	}
	return fmt.Sprintf("%s, %s, %s", way, c.path, c.act)
}

// talk exchanges messages until end.
func (c *conversation) talk(end time.Time) error {
	message, got := make([]byte, 100), make([]byte, 100)
	last := time.Now()
	defer func() { c.longest = max(c.longest, time.Since(last)) }()
	for round := 0; time.Now().Before(end); round++ {
		for _, way := range [][2]net.Conn{{c.client, c.serv}, {c.serv, c.client}} {
			copy(message, strconv.Itoa(round))
			if _, err := way[0].Write(message); err != nil {
				return fmt.Errorf("%v: round %d: %w", c, round, err)
			}
			if _, err := io.ReadFull(way[1], got); err != nil {
				return fmt.Errorf("%v: round %d: %w", c, round, err)
			}
			if string(got) != string(message) {
				return fmt.Errorf("%v: round %d: bytes differ", c, round)
			}
		}
		now := time.Now()
		c.longest = max(c.longest, now.Sub(last))
		last = now
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

const (
	clientSends, serverSends   = "client sends", "server sends"
	clientCloses, serverCloses = "client closes", "server closes"
	// The server's keep-alive probes, which go by TCP, find nothing else to do.
	serverProbes = "server probes"
)

// setKeepAlive makes the server's socket probe a client that it has not heard of
// by TCP for longer than the node remembers, or not at all.
func (c *conversation) setKeepAlive() error {
	config := net.KeepAliveConfig{Enable: c.act == serverProbes, Idle: conntrackTimeout + 2*time.Second, Interval: time.Second, Count: 2}
	return errors.Join(c.client.(*net.TCPConn).SetKeepAlive(false), c.serv.(*net.TCPConn).SetKeepAliveConfig(config))
}

// carryOut does by TCP what the conversation is to show, and then ends it: an
// error if anything does not arrive in time.
func (c *conversation) carryOut(patience time.Duration) error {
	limit := time.Now().Add(patience)
	if c.act == serverProbes {
		return c.talk(time.Now().Add(time.Second))
	}
	first, second := c.client, c.serv
	if c.act == serverSends || c.act == serverCloses {
		first, second = second, first
	}
	say := func(from, to net.Conn, text string) error {
		if _, err := io.WriteString(from, text); err != nil {
			return err
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(to, got); err != nil || string(got) != text {
			return fmt.Errorf("got %q, %w; want %q", got, err, text)
		}
		return nil
	}
	end := func(from, to net.Conn) error { return errors.Join(closeWrite(from), wantEOF(to)) }
	steps := []func() error{
		func() error { return errors.Join(first.SetDeadline(limit), second.SetDeadline(limit)) },
		func() error { return say(first, second, "first") },
		func() error { return say(second, first, "answer") },
		func() error { return end(first, second) },
		func() error { return end(second, first) },
	}
	if c.act == clientCloses || c.act == serverCloses {
		steps[1], steps[2], steps[3] = steps[3], func() error { return say(second, first, "answer") }, func() error { return nil }
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("%v: %w", c, err)
		}
	}
	return nil
}

// conntrackTimeout is when the node forgets connections that send no packets.
const conntrackTimeout = 8 * time.Second

// outlast makes a conversation of each kind on a node and has all of them talk
// for longer than the node remembers them. patience is for what follows.
func outlast(t *testing.T, refresh time.Duration) (n *node, all []*conversation) {
	t.Helper()
	n = mustNode(t, func(c *datapath.Config) {
		atOnce(c)
		c.RefreshInterval = refresh
	})
	pods, cookies := n.MustEnrol(t, "client", "server", "filtered", "other")
	client, server, filtered, other := pods[0], pods[1], pods[2], pods[3]
	rules := sandbox.Between(rule.Allow, cookies...)
	vip := netip.MustParseAddr("10.96.0.10")
	var moves [][2]netip.AddrPort // services that get another endpoint
	for i, held := range []bool{false, true} {
		for j, path := range []string{"service", "service with another endpoint", "pod address behind stateful rules"} {
			pod := server
			if path == "pod address behind stateful rules" {
				pod = filtered
			}
			l, address := mustListenOn(t, pod)
			dial := address
			if pod == filtered {
				if err := n.Stateful(address); err != nil {
					t.Fatal(err)
				}
			} else {
				dial = netip.AddrPortFrom(vip, uint16(80+2*i+j))
				if err := n.DNAT(dial, address); err != nil {
					t.Fatal(err)
				}
			}
			if path == "service with another endpoint" {
				_, elsewhere := mustListenOn(t, other)
				moves = append(moves, [2]netip.AddrPort{dial, elsewhere})
			}
			if held {
				cookie := cookies[1]
				if pod == filtered {
					cookie = cookies[2]
				}
				rules = append(rules, rule.Rule{
					Client: cookies[0], Server: cookie, First: address.Port(), Last: address.Port(), Verdict: rule.Hold,
				})
			}
			n.MustSetPolicy(t, rules)
			for _, act := range []string{clientSends, serverSends, clientCloses, serverCloses, serverProbes} {
				c, s := connect(t, client.Netns, l, "tcp4", dial)
				one := &conversation{path: path, act: act, held: held, client: c, serv: s}
				if err := one.setKeepAlive(); err != nil {
					t.Fatal(err)
				}
				all = append(all, one)
			}
		}
	}
	// It holds for connections that are known already, with their next packet.
	if err := n.Node.Sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", strconv.Itoa(int(conntrackTimeout.Seconds()))); err != nil {
		t.Fatal(err)
	}
	var talks []func() error
	end := time.Now().Add(2 * conntrackTimeout)
	for _, c := range all {
		talks = append(talks, func() error {
			c.broken = c.talk(end)
			return nil
		})
	}
	if err := together(talks...); err != nil {
		t.Fatal(err)
	}
	for _, move := range moves {
		if err := n.DNAT(move[0], move[1]); err != nil {
			t.Fatal(err)
		}
	}
	return n, all
}

// TestForgottenConnections: what connection tracking and stateful rules of the
// node do with a flow that sends no packets. After it was busy on the shortcut
// for longer than they remember, either end sends by TCP or closes: all arrives,
// as on TCP, since a message now and then goes by TCP. Without those, it does not.
func TestForgottenConnections(t *testing.T) {
	for _, tc := range []struct {
		name    string
		refresh time.Duration
	}{{"without refresh", 0}, {"with refresh", 2 * time.Second}} {
		t.Run(tc.name, func(t *testing.T) {
			var (
				n   *node
				all []*conversation
			)
			misses := sandboxtest.MustMisses(t)
			// A connection on TCP that stands still for so long is forgotten as well.
			for attempt := 1; ; attempt++ {
				n, all = outlast(t, tc.refresh)
				longest := time.Duration(0)
				for _, c := range all {
					longest = max(longest, c.longest)
				}
				t.Logf("attempt %d: the longest round took %v", attempt, longest)
				if longest < conntrackTimeout/2 {
					break
				}
				if attempt == 3 {
					t.Fatalf("round trips take up to %v: the machine is too slow for this test", longest)
				}
			}
			flows, err := n.Flows()
			if err != nil {
				t.Fatal(err)
			}
			held, missed := 0, map[string]bool{}
			for _, f := range flows {
				for _, d := range []datapath.Direction{f.ToServer, f.ToClient} {
					switch messages := d.TCPBytes / 100; {
					case d.Verdict == rule.Hold:
						held++
					case d.Unread > 0 && sandboxtest.MustMisses(t) != misses:
						// A read that the kernel has not shown puts a direction on TCP (docs/limits.md).
						t.Logf("a program was not run: got %+v", d)
						missed[f.Client.String()] = true
					case d.ShortcutBytes < 2*d.TCPBytes:
						t.Errorf("got %+v, want most of it by shortcut", d)
					// The first message, and those of 16 seconds, of which some may be late.
					case tc.refresh == 0 && messages != 1 || tc.refresh > 0 && messages < 4:
						t.Errorf("got %+v, with refresh every %v", d, tc.refresh)
					}
				}
			}
			var left []*conversation
			for _, c := range all {
				if tc.refresh == 0 && missed[c.client.LocalAddr().String()] {
					continue
				}
				if want := tc.refresh == 0 && c.act == serverProbes && !c.held; (c.broken != nil) != want {
					t.Errorf("%v: got %v while it was busy, want an error %v", c, c.broken, want)
				}
				if c.broken == nil {
					left = append(left, c)
				}
			}
			if want := len(all) * 2 / 3; len(left) < want {
				t.Errorf("got %d connections left to try, want at least %d", len(left), want)
			}
			if want := 2 * 3 * 5; held != want {
				t.Errorf("got %d directions held on TCP, want %d", held, want)
			}
			counts := n.counts(t)
			t.Log(counts)
			if got := counts["message_refresh"]; (got > 0) != (tc.refresh > 0) {
				t.Errorf("got %d messages to refresh, with refresh every %v", got, tc.refresh)
			}

			enrolled, err := n.Enrolled()
			if err != nil {
				t.Fatal(err)
			}
			n.MustSetPolicy(t, sandbox.Between(rule.Hold, enrolled...))
			var acts []func() error
			for _, c := range left {
				acts = append(acts, func() error {
					if c.held || tc.refresh > 0 {
						return c.carryOut(deadline)
					}
					// What did not arrive is sent again for minutes, unless the socket forgets it.
					if err := errors.Join(c.client.(*net.TCPConn).SetLinger(0), c.serv.(*net.TCPConn).SetLinger(0)); err != nil {
						return err
					}
					err := c.carryOut(5 * time.Second)
					if err != nil {
						t.Logf("without refresh: %v", err)
					}
					// What the client sends is taken for a new connection, which is let
					// through if it leads to the same server.
					sameServer := c.act == clientSends && c.path != "service with another endpoint"
					if err == nil && !sameServer {
						return fmt.Errorf("%v: got everything through, so this shows nothing", c)
					}
					return nil
				})
			}
			if err := together(acts...); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGenerationAfterCrash: an agent was killed after it had changed the policy
// map, and before it told the flows. The next one does.
func TestGenerationAfterCrash(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(policies *ebpf.Map, key bpf.ShortcutPolicyKey) error
		rules  func(cookies []uint64, port uint16) []rule.Rule // what it was about to write
	}{
		{
			name:   "rule deleted",
			change: func(policies *ebpf.Map, key bpf.ShortcutPolicyKey) error { return policies.Delete(key) },
			rules:  func([]uint64, uint16) []rule.Rule { return nil },
		},
		{
			name: "rule changed",
			change: func(policies *ebpf.Map, key bpf.ShortcutPolicyKey) error {
				return policies.Put(key, bpf.ShortcutPolicy{Verdict: bpf.ShortcutVerdict(rule.Refuse)})
			},
			rules: func(cookies []uint64, _ uint16) []rule.Rule { return sandbox.Between(rule.Refuse, cookies...) },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustTwoPods(t, atOnce)
			c, s := n.connect(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			n.mustCount(t, nil, paired())
			n.mustClose(t)

			policies, err := ebpf.LoadPinnedMap(filepath.Join(n.Config.PinDir, bpf.ShortcutMapPolicies), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer policies.Close()
			var (
				keys  []bpf.ShortcutPolicyKey
				key   bpf.ShortcutPolicyKey
				value bpf.ShortcutPolicy
			)
			for all := policies.Iterate(); all.Next(&key, &value); {
				keys = append(keys, key)
			}
			if len(keys) != 4 {
				t.Fatalf("got %d entries in the policy map, want 4", len(keys))
			}
			for _, key := range keys {
				if err := tc.change(policies, key); err != nil {
					t.Fatal(err)
				}
			}

			n.MustOpen(t)
			n.MustSetPolicy(t, tc.rules(n.cookies, n.address.Port()))
			before := n.counts(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			n.mustCount(t, before, map[string]uint64{"message_not_allowed": 20})
		})
	}
}

// TestGenerationDue: flows that could not be told of a change are told with the
// next call, although that finds nothing to change.
func TestGenerationDue(t *testing.T) {
	n := mustTwoPods(t, atOnce)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, paired())
	restore := n.MakeControlsReadOnly(t)
	for i := range 2 {
		if err := n.SetPolicy(nil); !errors.Is(err, unix.EPERM) {
			t.Errorf("try %d: got %v, want %v", i, err, unix.EPERM)
		}
	}
	restore()
	n.MustSetPolicy(t, nil)
	before := n.counts(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_not_allowed": 20})

	// The same by changes to one pair.
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, n.cookies...))
	restore = n.MakeControlsReadOnly(t)
	refused := []rule.PairRules{{Client: n.cookies[0], Server: n.cookies[1]}}
	for i := range 2 {
		if err := n.UpdatePolicy(refused); !errors.Is(err, unix.EPERM) {
			t.Errorf("update %d: got %v, want %v", i, err, unix.EPERM)
		}
	}
	restore()
	if err := n.UpdatePolicy(nil); err != nil {
		t.Error(err)
	}
	before = n.counts(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_not_allowed": 20})
}

// TestLease: what the policy map says holds until the lease ends, whether an
// agent runs or not. Then messages go by TCP and nothing is paired, until there
// is a new lease.
func TestLease(t *testing.T) {
	n := mustTwoPods(t, atOnce)
	lease := func(until time.Duration) {
		t.Helper()
		if err := n.SetLease(until); err != nil {
			t.Fatal(err)
		}
	}
	lease(time.Hour)
	c, s := n.connect(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, paired())

	const short = 200 * time.Millisecond
	for _, agent := range []bool{true, false} {
		lease(short)
		before := n.counts(t)
		if !agent {
			n.mustClose(t)
		}
		time.Sleep(short + 50*time.Millisecond)
		sandboxtest.MustPing(t, c, s, 10, 100)
		other, otherS := n.connect(t)
		sandboxtest.MustPing(t, other, otherS, 10, 100)
		if !agent {
			n.MustOpen(t)
		}
		n.mustCount(t, before, map[string]uint64{"message_stale": 20, "connection_stale": 1})

		before = n.counts(t)
		lease(time.Hour)
		sandboxtest.MustPing(t, c, s, 10, 100)
		sandboxtest.MustPing(t, other, otherS, 10, 100)
		n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
		other.Close()
		otherS.Close()
	}

	// 0 means that there is no end.
	lease(short)
	lease(0)
	before := n.counts(t)
	time.Sleep(short + 50*time.Millisecond)
	sandboxtest.MustPing(t, c, s, 10, 100)
	other, otherS := n.connect(t)
	sandboxtest.MustPing(t, other, otherS, 10, 100)
	n.mustCount(t, before, map[string]uint64{"connection_paired": 1, "message_not_seen": 2, "message_shortcut": 38})
}

// streaming is traffic both ways on several connections until it is stopped.
type streaming struct {
	n    *node
	stop atomic.Bool
	done chan error
}

func (n *twoPods) mustStream(t *testing.T, streams int) *streaming {
	t.Helper()
	work := &streaming{n: n.node, done: make(chan error, 1)}
	var loads []func() error
	for i := range streams {
		c, s := n.connect(t)
		limit := time.Now().Add(4 * deadline)
		if err := errors.Join(c.SetDeadline(limit), s.SetDeadline(limit)); err != nil {
			t.Fatal(err)
		}
		loads = append(loads, func() error {
			for round := 0; !work.stop.Load(); round++ {
				down := traffic{seed: byte(i + round), bytes: 256 << 10, maxWrite: 30_000, maxRead: 40_000}
				up := traffic{seed: byte(i + round + 100), bytes: 64 << 10, maxWrite: 300, maxRead: 5000}
				if err := exchange(c, s, down, up); err != nil {
					return fmt.Errorf("stream %d: %w", i, err)
				}
			}
			return nil
		})
	}
	go func() { work.done <- together(loads...) }()
	return work
}

// mustCount waits for more messages with an outcome.
func (w *streaming) mustCount(t *testing.T, name string, more uint64) {
	t.Helper()
	for before, limit := w.n.counts(t)[name], time.Now().Add(deadline); w.n.counts(t)[name] < before+more; time.Sleep(5 * time.Millisecond) {
		if len(w.done) > 0 {
			t.Fatalf("the streams have ended: %v", <-w.done)
		}
		if time.Now().After(limit) {
			t.Fatalf("waited for %s: %v", name, w.n.counts(t))
		}
	}
}

// mustStop ends the streams, of which every byte has arrived.
func (w *streaming) mustStop(t *testing.T) {
	t.Helper()
	w.stop.Store(true)
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}

// TestRefreshUnderLoad: streams that send a message by TCP ten times a second go
// on byte for byte, and by the shortcut.
func TestRefreshUnderLoad(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) {
		atOnce(c)
		c.RefreshInterval = 100 * time.Millisecond
	})
	work := n.mustStream(t, 3)
	for range 5 {
		work.mustCount(t, "message_refresh", 20)
		work.mustCount(t, "message_shortcut", 100)
	}
	work.mustStop(t)
}

// TestLeaseUnderLoad: the lease runs out and comes back under streams, which go
// on byte for byte; nothing is paired meanwhile.
func TestLeaseUnderLoad(t *testing.T) {
	n := mustTwoPods(t, atOnce)
	const streams, rounds = 3, 10
	work := n.mustStream(t, streams)
	lease := func(until time.Duration) {
		t.Helper()
		if err := n.SetLease(until); err != nil {
			t.Fatal(err)
		}
	}
	for round := range rounds {
		lease(time.Hour)
		work.mustCount(t, "message_shortcut", 100)
		lease(time.Duration(1+round) * time.Millisecond)
		work.mustCount(t, "message_stale", 100)
		before := n.counts(t)
		c, s := n.connect(t)
		sandboxtest.MustPing(t, c, s, 5, 100)
		got := n.since(t, before)
		delete(got, "message_stale")
		if diff := cmp.Diff(map[string]uint64{"connection_stale": 1}, got); diff != "" {
			t.Errorf("round %d: counters beside message_stale (-want +got):\n%s", round, diff)
		}
		c.Close()
		s.Close()
	}
	lease(time.Hour)
	work.mustCount(t, "message_shortcut", 100)
	work.mustStop(t)
	flows, err := n.Flows()
	if err != nil || len(flows) != streams {
		t.Errorf("got %d flows (%v), want %d", len(flows), err, streams)
	}
}

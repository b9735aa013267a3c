// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

func netnsOf(tb testing.TB, pods []*sandbox.Pod) (all []datapath.Netns) {
	tb.Helper()
	for _, p := range pods {
		cookie, err := p.Cookie()
		if err != nil {
			tb.Error(err)
		}
		all = append(all, datapath.Netns{Cookie: cookie, Path: p.Path})
	}
	return all
}

// mustJoin lets open connections join, and returns how many did.
func (n *node) mustJoin(tb testing.TB, pods ...*sandbox.Pod) int {
	tb.Helper()
	joined, err := n.Join(tb.Context(), netnsOf(tb, pods))
	if err != nil {
		tb.Error(err)
	}
	return joined
}

// canJoin reports whether open connections join on this kernel. The kernels of the virtual
// machines are safe for it, others need not be.
func canJoin(tb testing.TB, n *node) bool {
	tb.Helper()
	err := n.NoJoin()
	if err != nil && *ownMachine {
		tb.Fatal(err)
	}
	return err == nil
}

// TestNoJoin: on a kernel that is not safe for it, an open connection stays plain TCP.
func TestNoJoin(t *testing.T) {
	n := mustNode(t, atOnce)
	if canJoin(t, n) {
		return
	}
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	c, s := rawPair(t, pods[0], l, address)
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	before := n.counts(t)
	if got := n.mustJoin(t, pods...); got != 0 {
		t.Errorf("got %d connections that have joined, want none", got)
	}
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, before, map[string]uint64{})
	if want := "CVE-2026-74714"; !strings.Contains(n.NoJoin().Error(), want) {
		t.Errorf("got the reason %q, want one with %s", n.NoJoin(), want)
	}
}

// mustBeShortcut exchanges messages over the only flow, and wants both directions on the
// shortcut then.
func (n *node) mustBeShortcut(tb testing.TB, c, s io.ReadWriter) {
	tb.Helper()
	sandboxtest.MustPing(tb, c, s, 10, 100)
	n.mustHaveRedirected(tb)
}

// mustHaveRedirected fails if the last message of a direction of the only flow did not take the shortcut.
func (n *node) mustHaveRedirected(tb testing.TB) {
	tb.Helper()
	if f := n.mustFlow(tb); !f.ToServer.Shortcut || !f.ToClient.Shortcut {
		tb.Fatalf("got %+v, want both directions on the shortcut", f)
	}
}

var joins = flag.Int("joins", 32, "connections of each row of TestJoin and TestWatch")

// connectionsPerRow is how many connections each row has: fewer where the CPU is emulated.
func connectionsPerRow() int {
	if testing.Short() {
		return *joins / 4
	}
	return *joins
}

// ways chooses the traffic of a connection.
type ways func(toServer, toClient traffic) (traffic, traffic)

func bothWays(toServer, toClient traffic) (traffic, traffic) { return toServer, toClient }

// talkUntil connects the first pod, or with loopback the second one, to the second one a number
// of times. It returns what runs random traffic over each connection until done is closed,
// compares every byte, and closes it.
func talkUntil(tb testing.TB, done <-chan struct{}, pods []*sandbox.Pod, network string, loopback bool, connections int, chosen ways) (all []func() error) {
	tb.Helper()
	from, listen := pods[0], pods[1].IPv4.String()
	switch {
	case loopback:
		from, listen = pods[1], "127.0.0.1"
	case network == "tcp6":
		listen = pods[1].IPv6.String()
	}
	most := 1 << 20
	if testing.Short() {
		most = 64 << 10 // so that the CPU's time goes to joining
	}
	l := sandboxtest.MustListen(tb, pods[1], network, net.JoinHostPort(listen, "0"))
	for i := range connections {
		c, s := sandboxtest.MustConnect(tb, from.Netns, network, l.Addr().String(), l)
		random := rand.New(rand.NewPCG(uint64(i), 2))
		one := func(seed byte) traffic {
			return traffic{
				seed: seed, bytes: 1 + random.IntN(most), maxWrite: 1 + random.IntN(32<<10), maxRead: 1 + random.IntN(64<<10),
				writerPause: 1 + random.IntN(64<<10), readerPause: 1 + random.IntN(256<<10),
			}
		}
		all = append(all, func() error {
			for last := false; !last; {
				select {
				case <-done:
					last = true
				default:
				}
				toServer, toClient := chosen(one(byte(random.Uint32())), one(byte(random.Uint32())))
				if err := exchange(c, s, toServer, toClient); err != nil {
					return fmt.Errorf("connection %d: %w", i, err)
				}
			}
			return errors.Join(finish(c, s), c.Close(), s.Close())
		})
	}
	return all
}

// TestJoin lets connections join in the middle of random traffic both ways, at a random
// moment, and compares every byte.
func TestJoin(t *testing.T) {
	for _, tc := range []struct {
		name        string
		network     string
		loopback    bool
		noCallbacks bool // as on kernels before 6.12
		oneCPU      bool
	}{
		{name: "IPv4", network: "tcp4"},
		{name: "IPv4, one CPU", network: "tcp4", oneCPU: true},
		{name: "IPv6", network: "tcp6"},
		{name: "loopback", network: "tcp4", loopback: true},
		{name: "without callbacks", network: "tcp4", noCallbacks: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			connections := connectionsPerRow()
			if tc.oneCPU {
				mustUseOneCPU(t)
			}
			n := mustNode(t, func(c *datapath.Config) {
				atOnce(c)
				c.SetNoLateCallbacks(tc.noCallbacks)
			})
			if !canJoin(t, n) {
				return
			}
			pods, cookies := n.MustEnrol(t, "client", "server")
			done := make(chan struct{})
			all := talkUntil(t, done, pods, tc.network, tc.loopback, connections, bothWays)
			moment := time.Duration(rand.IntN(20)) * time.Millisecond
			before := n.counts(t)
			all = append(all, func() error {
				defer close(done)
				time.Sleep(moment)
				n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
				if got := n.mustJoin(t, pods...); got != connections {
					t.Errorf("got %d connections that have joined, want %d", got, connections)
				}
				return nil
			})
			if err := together(all...); err != nil {
				t.Fatal(err)
			}
			got := n.since(t, before)
			t.Logf("joined after %v: %v", moment, got)
			if got["connection_joined"] != uint64(connections) || got["message_shortcut"] == 0 {
				t.Errorf("got %v, want %d connections that have joined, and messages by shortcut", got, connections)
			}
		})
	}
}

// TestJoinStaysOut: open connections that do not suit stay plain TCP, and leave nothing
// behind.
func TestJoinStaysOut(t *testing.T) {
	setBlocking := func(s *rawSocket) error { return unix.SetNonblock(s.fd, false) }
	for _, tc := range []struct {
		name   string
		rules  func(cookies []uint64) []rule.Rule
		change func(c, s *rawSocket) error
		want   map[string]uint64
	}{
		{name: "client in blocking mode", change: func(c, _ *rawSocket) error { return setBlocking(c) }, want: map[string]uint64{"connection_blocking_client": 1}},
		{name: "server in blocking mode", change: func(_, s *rawSocket) error { return setBlocking(s) }, want: map[string]uint64{"connection_blocking_server": 1}},
		{name: "client has shut down writing", change: func(c, _ *rawSocket) error { return c.CloseWrite() }, want: map[string]uint64{}},
		{name: "server has shut down writing", change: func(_, s *rawSocket) error { return s.CloseWrite() }, want: map[string]uint64{}},
		{name: "another port is allowed", rules: func(cookies []uint64) []rule.Rule {
			rules := sandbox.Between(rule.Allow, cookies...)
			for i := range rules {
				rules[i].First, rules[i].Last = 1, 2
			}
			return rules
		}, want: map[string]uint64{"connection_policy_refused": 1}},
		{name: "the other direction is allowed", rules: func(cookies []uint64) []rule.Rule {
			return slices.DeleteFunc(sandbox.Between(rule.Allow, cookies...), func(r rule.Rule) bool { return r.Client == cookies[0] })
		}, want: map[string]uint64{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, atOnce)
			if !canJoin(t, n) {
				return
			}
			pods, cookies := n.MustEnrol(t, "client", "server")
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c, s := rawPair(t, pods[0], l, address)
			sandboxtest.MustPing(t, c, s, 5, 100)
			if tc.change != nil {
				if err := tc.change(c, s); err != nil {
					t.Fatal(err)
				}
			}
			rules := sandbox.Between(rule.Allow, cookies...)
			if tc.rules != nil {
				rules = tc.rules(cookies)
			}
			n.MustSetPolicy(t, rules)
			before := n.counts(t)
			if got := n.mustJoin(t, pods...); got != 0 {
				t.Errorf("got %d connections that have joined, want none", got)
			}
			n.mustCount(t, before, tc.want)
			for _, name := range []string{"flows", "sockets"} {
				if got := n.usage(t)[name]; got != 0 {
					t.Errorf("got %d entries of %s, want none", got, name)
				}
			}
		})
	}
}

// TestJoinNotReady: an open connection whose server has not accepted it, or which a thread
// sleeps on in recv, does not join. It does once it is ready and something is allowed
// anew. The thread, and the server, get every byte.
func TestJoinNotReady(t *testing.T) {
	hello := []byte("hello")
	allow := func(t *testing.T, n *node, pods []*sandbox.Pod, cookies []uint64, want int) {
		t.Helper()
		n.MustSetPolicy(t, nil)
		n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
		before := n.counts(t)
		if got := n.mustJoin(t, pods...); got != want {
			t.Errorf("got %d connections that have joined, want %d", got, want)
		}
		counter := "connection_joined"
		if want == 0 {
			counter = "connection_join_ended"
		}
		n.mustCount(t, before, map[string]uint64{counter: 1})
	}
	t.Run("not accepted", func(t *testing.T) {
		n := mustNode(t, atOnce)
		if !canJoin(t, n) {
			return
		}
		pods, cookies := n.MustEnrol(t, "client", "server")
		l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
		c := mustSocket(t, pods[0].Netns, unix.AF_INET, 0)
		c.mustConnect(t, address)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		allow(t, n, pods, cookies, 0)
		s := l.mustAccept(t)
		allow(t, n, pods, cookies, 1)
		got := make([]byte, len(hello))
		if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, hello) {
			t.Errorf("got %q (%v), want %q", got, err, hello)
		}
		n.mustBeShortcut(t, c, s)
	})
	t.Run("asleep in recv", func(t *testing.T) {
		n := mustNode(t, atOnce)
		if !canJoin(t, n) {
			return
		}
		pods, cookies := n.MustEnrol(t, "client", "server")
		l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
		c, s := rawPair(t, pods[0], l, address)
		sandboxtest.MustPing(t, c, s, 5, 100)
		if err := unix.SetNonblock(s.fd, false); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(hello))
		thread, read := make(chan int, 1), make(chan error, 1)
		go func() {
			runtime.LockOSThread()
			thread <- unix.Gettid()
			_, err := unix.Read(s.fd, got)
			read <- err
		}()
		mustSleepInRead(t, <-thread)
		if err := unix.SetNonblock(s.fd, true); err != nil { // the thread sleeps on
			t.Fatal(err)
		}
		allow(t, n, pods, cookies, 0)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		if err := <-read; err != nil || !bytes.Equal(got, hello) {
			t.Errorf("got %q (%v), want %q", got, err, hello)
		}
		allow(t, n, pods, cookies, 1)
		n.mustBeShortcut(t, c, s)
	})
}

// mustSleepInRead waits until a thread sleeps in read.
func mustSleepInRead(tb testing.TB, tid int) {
	tb.Helper()
	waitUntil(tb, "a thread that sleeps in read", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		return err == nil && strings.HasPrefix(string(text), fmt.Sprintf("%d ", unix.SYS_READ))
	})
}

// TestJoinMeetsEnds: connections that end in any way at any moment of their joining, or
// after it, see what they would on TCP, and leave nothing behind.
func TestJoinMeetsEnds(t *testing.T) {
	n := mustNode(t, atOnce)
	if !canJoin(t, n) {
		return
	}
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	rounds, connections := 20, 24
	if testing.Short() {
		rounds = 4
	}
	joined := 0
	for round := range rounds {
		n.MustSetPolicy(t, nil)
		var all []func() error
		done := make(chan struct{})
		for i := range connections {
			c, s := rawPair(t, pods[0], l, address)
			random := rand.New(rand.NewPCG(uint64(round), uint64(i)))
			end := done
			if i%2 == 0 { // at a random moment
				end = make(chan struct{})
				time.AfterFunc(time.Duration(random.IntN(60_000))*time.Microsecond, func() { close(end) })
			}
			all = append(all, func() error { return endSomehow(c, s, random, end) })
		}
		all = append(all, func() error {
			defer close(done)
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			joined += n.mustJoin(t, pods...)
			return nil
		})
		if err := together(all...); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d of %d joined: %v", joined, rounds*connections, n.counts(t))
	if joined < rounds*connections/2 {
		t.Errorf("got %d connections that have joined, want at least the %d that lasted", joined, rounds*connections/2)
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": n.usage(t)["policies"]})
	for cookie, charge := range n.charges(t) {
		if charge != 0 {
			t.Errorf("netns %d: got a charge of %d, want none", cookie, charge)
		}
	}
}

// TestJoinBlocking: where sockets in blocking mode may take part, open ones join even if
// their programs sleep in recv nearly all the time, and get every byte.
func TestJoinBlocking(t *testing.T) {
	t.Run("on the node", func(t *testing.T) { testJoinBlocking(t, false) })
	t.Run("between the pods", func(t *testing.T) { testJoinBlocking(t, true) })
}

func testJoinBlocking(t *testing.T, byPolicy bool) {
	n := mustNode(t, func(c *datapath.Config) {
		atOnce(c)
		c.AllowBlocking = !byPolicy
	})
	if !canJoin(t, n) {
		return
	}
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	c, s := rawPair(t, pods[0], l, address)
	timeout := unix.NsecToTimeval(int64(deadline))
	for _, fd := range []int{c.fd, s.fd} {
		if err := errors.Join(unix.SetNonblock(fd, false), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	one := traffic{seed: 1, bytes: 1 << 30, maxWrite: 1000, maxRead: 1000}
	// A socket that one thread reads and another one writes would be evicted.
	talk := func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		content, sizes := one.source()
		message, got := make([]byte, one.maxWrite), make([]byte, one.maxWrite)
		for last := 20; last > 0; {
			select {
			case <-done:
				last--
			default:
			}
			message = message[:1+sizes.IntN(one.maxWrite)]
			_, _ = content.Read(message)
			if _, err := c.Write(message); err != nil {
				return err
			}
			if _, err := io.ReadFull(patientSocket{c}, got[:len(message)]); err != nil || !bytes.Equal(got[:len(message)], message) {
				return fmt.Errorf("got another answer, or none: %w", err)
			}
		}
		return c.CloseWrite()
	}
	echo := func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_, err := io.Copy(struct{ io.Writer }{s}, patientSocket{s})
		return err
	}
	join := func() error {
		defer close(done)
		rules := sandbox.Between(rule.Allow, cookies...)
		if byPolicy {
			n.MustSetPolicy(t, rules)
			if got := n.mustJoin(t, pods...); got != 0 {
				t.Errorf("got %d connections that have joined without consent, want none", got)
			}
			for i := range rules {
				rules[i].Blocking = true
			}
		}
		n.MustSetPolicy(t, rules)
		want := 1
		if version, err := datapath.RunningVersion(); err != nil || !version.LateCallbacks() {
			want = 0 // nothing would evict them in time
		}
		if got := n.mustJoin(t, pods...); got != want {
			t.Errorf("got %d connections that have joined, want %d", got, want)
		}
		return nil
	}
	if err := together(talk, echo, join); err != nil {
		t.Fatal(err)
	}
	if got := n.counts(t); got["connection_joined"] > 0 && got["message_shortcut"] == 0 {
		t.Errorf("got %v, want messages by shortcut", got)
	}
}

// patientSocket reads again where recv returns EAGAIN in blocking mode, as it may on the
// shortcut.
type patientSocket struct{ *rawSocket }

func (p patientSocket) Read(b []byte) (int, error) {
	for limit := time.Now().Add(deadline); ; {
		n, err := unix.Read(p.fd, b)
		switch {
		case n == 0 && err == nil && len(b) > 0:
			return 0, io.EOF
		case err == nil || !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || time.Now().After(limit):
			return max(n, 0), err
		}
	}
}

// mustHaveFiles lets this process have both ends of so many connections open, until it ends.
func mustHaveFiles(tb testing.TB, connections int) {
	tb.Helper()
	const more = 1000 // of the test itself
	needed := uint64(2*connections + more)
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		tb.Fatal(err)
	}
	if files.Cur >= needed {
		return
	}
	files = unix.Rlimit{Cur: needed, Max: max(needed, files.Max)}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		tb.Fatalf("%d connections need %d open files, which only CAP_SYS_RESOURCE may allow here (ulimit -n): %v", connections, needed, err)
	}
}

// TestJoinStorm opts in two pods with very many open connections, most of them idle.
func TestJoinStorm(t *testing.T) {
	connections := 10_000
	if testing.Short() {
		connections = 1_000
	}
	n := mustNode(t, atOnce)
	if !canJoin(t, n) {
		return
	}
	mustHaveFiles(t, connections)
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	type pair struct{ c, s *rawSocket }
	var all []pair
	for range connections {
		c, s := rawPair(t, pods[0], l, address)
		all = append(all, pair{c, s})
	}
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	began := time.Now()
	got := n.mustJoin(t, pods...)
	t.Logf("%d connections after %v", got, time.Since(began))
	if got != connections {
		t.Errorf("got %d connections that have joined, want %d", got, connections)
	}
	for i := 0; i < connections; i += 100 {
		sandboxtest.MustPing(t, all[i].c, all[i].s, 5, 100)
	}
	if n.counts(t)["message_shortcut"] == 0 {
		t.Error("nothing took the shortcut")
	}
}

// TestEvictLate: a socket that has joined late, and gets no callbacks, is evicted when it
// is in blocking mode at last, and redirects nothing from then on.
func TestEvictLate(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) {
		atOnce(c)
		c.SetNoLateCallbacks(true)
	})
	if !canJoin(t, n) {
		return
	}
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	c, s := rawPair(t, pods[0], l, address)
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	if got := n.mustJoin(t, pods...); got != 1 {
		t.Fatalf("got %d connections that have joined, want 1", got)
	}
	sandboxtest.MustPing(t, c, s, 10, 100)
	evict := func() {
		t.Helper()
		if err := n.EvictLate(func() []datapath.Netns { return netnsOf(t, pods) }); err != nil {
			t.Fatal(err)
		}
	}
	n.mustHaveRedirected(t)
	evict()
	if got := n.counts(t)["socket_evicted"]; got != 0 {
		t.Fatalf("got %d sockets evicted, want none yet", got)
	}
	if err := unix.SetNonblock(s.fd, false); err != nil {
		t.Fatal(err)
	}
	// The server's own send shows it. What it has not read keeps it in the SOCKHASH.
	if _, err := c.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	evict()
	if got := n.counts(t)["socket_evicted"]; got != 0 {
		t.Errorf("got %d sockets evicted with unread bytes, want none", got)
	}
	if err := errors.Join(readFull(s, "unread"), readFull(c, "x")); err != nil {
		t.Fatal(err)
	}
	evict()
	if got := n.counts(t)["socket_evicted"]; got != 1 {
		t.Errorf("got %d sockets evicted, want 1", got)
	}
	before := n.counts(t)
	sandboxtest.MustPing(t, c, s, 5, 100)
	if got := n.since(t, before)["message_shortcut"]; got != 0 {
		t.Errorf("got %d messages by shortcut after the eviction, want none", got)
	}
}

// readFull wants to read just this.
func readFull(r io.Reader, want string) error {
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
		return fmt.Errorf("got %q (%w), want %q", got, err, want)
	}
	return nil
}

// mustUseOneCPU keeps all threads of this process on one CPU until the test ends.
func mustUseOneCPU(tb testing.TB) {
	tb.Helper()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		tb.Fatal(err)
	}
	for cpu := range 1024 {
		if all.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	set := func(to *unix.CPUSet) {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			tb.Fatal(err)
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err == nil {
				err = unix.SchedSetaffinity(tid, to)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) {
				tb.Fatal(err)
			}
		}
	}
	set(&one) // threads that are started from now on inherit it
	tb.Cleanup(func() { set(&all) })
}

// endSomehow exchanges messages until end is closed, and a few more, and then ends the
// connection.
func endSomehow(c, s *rawSocket, random *rand.Rand, end <-chan struct{}) (err error) {
	defer func() { err = errors.Join(err, c.close(), s.close()) }()
	ends := []*rawSocket{c, s}
	random.Shuffle(2, func(i, j int) { ends[i], ends[j] = ends[j], ends[i] })
	a, b := ends[0], ends[1]
	buf := make([]byte, 100)
	for more := 1 + random.IntN(8); more > 0; {
		select {
		case <-end:
			more--
		default:
		}
		for _, way := range [][2]*rawSocket{{a, b}, {b, a}} {
			if _, err := way[0].Write(buf); err != nil {
				return err
			}
			if _, err := io.ReadFull(way[1], buf); err != nil {
				return err
			}
		}
		time.Sleep(time.Duration(random.IntN(500)) * time.Microsecond)
	}
	switch random.IntN(4) {
	case 0: // both ways, one after the other, with an answer in between
		if err := errors.Join(a.CloseWrite(), wantEOF(b)); err != nil {
			return err
		}
		if _, err := b.Write(buf); err != nil {
			return err
		}
		if _, err := io.ReadFull(a, buf); err != nil {
			return err
		}
		return errors.Join(b.CloseWrite(), wantEOF(a))
	case 1: // at once
		return finish(a, b)
	case 2: // closed with a message under way
		if _, err := a.Write(buf); err != nil {
			return err
		}
		if err := a.close(); err != nil {
			return err
		}
		if _, err := io.ReadFull(b, buf); err != nil {
			return err
		}
		return wantEOF(b)
	default: // reset
		linger := unix.Linger{Onoff: 1}
		if err := errors.Join(unix.SetsockoptLinger(a.fd, unix.SOL_SOCKET, unix.SO_LINGER, &linger), a.close()); err != nil {
			return err
		}
		if _, err := b.Read(buf); !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("read after a reset: got %v, want ECONNRESET", err)
		}
		return nil
	}
}

// TestJoinAfterKill: an agent is killed after each of the first rounds. The connection
// goes on, and the next agent lets it join.
func TestJoinAfterKill(t *testing.T) {
	killed := errors.New("killed")
	for rounds := range 2 { // in the second they would join
		t.Run(fmt.Sprintf("after %d rounds", rounds), func(t *testing.T) {
			n := mustNode(t, atOnce)
			if !canJoin(t, n) {
				return
			}
			pods, cookies := n.MustEnrol(t, "client", "server")
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c, s := rawPair(t, pods[0], l, address)
			sandboxtest.MustPing(t, c, s, 5, 100)
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			n.KillJoin(rounds, killed)
			if _, err := n.Join(t.Context(), netnsOf(t, pods)); !errors.Is(err, killed) {
				t.Fatalf("got %v, want %v", err, killed)
			}
			sandboxtest.MustPing(t, c, s, 5, 100)
			if got := n.counts(t)["message_shortcut"]; got != 0 {
				t.Errorf("got %d messages by shortcut before it has joined, want none", got)
			}
			n.mustClose(t)
			n.MustOpen(t)
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			if got := n.mustJoin(t, pods...); got != 1 {
				t.Errorf("got %d connections that have joined, want 1", got)
			}
			n.mustBeShortcut(t, c, s)
		})
	}
}

// TestJoinThroughNAT: the two ends of a connection find each other whatever addresses they
// see, also where a handshake cannot show them (SNAT, SYN cookies). Connections of other
// pods do not join.
func TestJoinThroughNAT(t *testing.T) {
	vip := netip.MustParseAddrPort("10.96.0.10:80")
	for _, tc := range []struct {
		name    string
		prepare func(n *node, server *sandbox.Pod, address netip.AddrPort) error
		dial    netip.AddrPort // the server's own if zero
	}{
		{name: "Service", dial: vip, prepare: func(n *node, _ *sandbox.Pod, address netip.AddrPort) error { return n.DNAT(vip, address) }},
		{name: "SNAT", dial: vip, prepare: func(n *node, _ *sandbox.Pod, address netip.AddrPort) error {
			return errors.Join(n.DNAT(vip, address), n.Masquerade(vip))
		}},
		{name: "SYN cookies", prepare: func(_ *node, server *sandbox.Pod, _ netip.AddrPort) error {
			return server.Sysctl("net.ipv4.tcp_syncookies", "2")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, atOnce)
			if !canJoin(t, n) {
				return
			}
			pods, cookies := n.MustEnrol(t, "client", "server")
			outside := sandboxtest.MustAddPod(t, n, "outside", sandbox.PodOptions{})
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			if err := tc.prepare(n, pods[1], address); err != nil {
				t.Fatal(err)
			}
			dial := address
			if tc.dial.IsValid() {
				dial = tc.dial
			}
			c, s := rawPair(t, pods[0], l, dial)
			other, otherS := rawPair(t, outside, l, address)
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			if got := n.mustJoin(t, append(pods, outside)...); got != 1 {
				t.Errorf("got %d connections that have joined, want 1", got)
			}
			sandboxtest.MustPing(t, c, s, 10, 100)
			sandboxtest.MustPing(t, other, otherS, 10, 100)
			f := n.mustFlow(t)
			if f.OrigDst != dial || f.Server != address || f.ClientNetns != cookies[0] || f.ServerNetns != cookies[1] || !f.ToServer.Shortcut || !f.ToClient.Shortcut {
				t.Errorf("got %+v, want one to %v through %v, on the shortcut", f, address, dial)
			}
		})
	}
}

// TestJoinUnloads: an unload in the middle of joining takes out every socket.
func TestJoinUnloads(t *testing.T) {
	n := mustNode(t, atOnce)
	if !canJoin(t, n) {
		return
	}
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	var joined sync.WaitGroup
	defer joined.Wait()
	n.mustUnloadBusy(t, pods[0], l, address, func() {
		n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
		joined.Go(func() {
			if _, err := n.Join(t.Context(), netnsOf(t, pods)); err != nil && !errors.Is(err, datapath.ErrUnloaded) {
				t.Error(err)
			}
		})
		time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
	})
}

// mustUnloadBusy unloads, once prepare is done, while connections are busy. All sockets have to
// leave. Messages go on until then, as these show a read that was not counted (docs/limits.md).
func (n *node) mustUnloadBusy(tb testing.TB, client *sandbox.Pod, l *rawSocket, address netip.AddrPort, prepare func()) {
	tb.Helper()
	var all []func() error
	unloaded := make(chan struct{})
	for i := range 32 {
		c, s := rawPair(tb, client, l, address)
		first := traffic{seed: byte(i), bytes: 1 << 20, maxWrite: 4 << 10, maxRead: 8 << 10, writerPause: 32 << 10}
		later := traffic{seed: byte(i), bytes: 1 << 10, maxWrite: 1 << 10, maxRead: 1 << 10, writerPause: 1 << 10}
		all = append(all, func() error {
			for one := first; ; one = later {
				if err := exchange(c, s, one, one); err != nil {
					return err
				}
				select {
				case <-unloaded:
					return nil
				default:
				}
			}
		})
	}
	all = append(all, func() error {
		defer close(unloaded)
		prepare()
		ctx, cancel := context.WithTimeout(tb.Context(), deadline)
		defer cancel()
		if waiting, err := n.Unload(ctx); err != nil {
			tb.Errorf("%v: %+v", err, waiting)
		}
		if got := n.Left(); got != 0 {
			tb.Errorf("got %d sockets left, want none", got)
		}
		return nil
	})
	if err := together(all...); err != nil {
		tb.Fatal(err)
	}
}

// TestJoinAgain opts in and out under load: connections come back at once, byte by byte.
func TestJoinAgain(t *testing.T) {
	n := mustNode(t, atOnce)
	if !canJoin(t, n) {
		return
	}
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	times := 100
	if testing.Short() {
		times = 10
	}
	stop := make(chan struct{})
	var all []func() error
	for i := range 8 {
		c, s := rawPair(t, pods[0], l, address)
		all = append(all, func() error {
			for seed := byte(i); ; seed++ {
				select {
				case <-stop:
					return finish(c, s)
				default:
				}
				one := traffic{seed: seed, bytes: 64 << 10, maxWrite: 4 << 10, maxRead: 8 << 10}
				if err := exchange(c, s, one, one); err != nil {
					return fmt.Errorf("connection %d: %w", i, err)
				}
			}
		})
	}
	before := n.counts(t)
	all = append(all, func() error {
		defer close(stop)
		for range times {
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			for _, cookie := range cookies {
				if err := n.Enrol(cookie); err != nil {
					return err
				}
			}
			n.mustJoin(t, pods...)
			shortcut := n.counts(t)["message_shortcut"]
			waitUntil(t, "messages by shortcut", func() bool { return n.counts(t)["message_shortcut"] > shortcut })
			n.MustSetPolicy(t, nil)
			for _, cookie := range cookies {
				if err := n.Release(cookie); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err := together(all...); err != nil {
		t.Fatal(err)
	}
	if got := n.since(t, before)["connection_joined"]; got != 8 {
		t.Errorf("got %d connections that have joined, want 8, once each", got)
	}
}

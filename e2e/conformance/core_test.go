// SPDX-License-Identifier: Apache-2.0

// Package conformance_test compares what a program sees of a TCP connection
// with and without podshunt. A row is one behaviour of sockets, written as a
// function over the two ends of a connection. It runs on plain TCP between pods
// that do not take part, on a pair that is held on TCP, on a pair whose two
// directions are proved to be shortcut, on one that has joined when it was
// open already, and on one that was watched until it had earned to join; what it
// saw must be the same, except where the row names an entry of docs/limits.md.
package conformance_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

const (
	// deadline is for what must happen: no call of a row sleeps longer.
	deadline = 30 * time.Second
	// quiet is how long is waited for what must not happen.
	quiet = 30 * time.Millisecond
	// corkTimer is after which TCP sends what it was told to hold back, less some room.
	corkTimer = 150 * time.Millisecond
	// hang is how long a row may take on one connection.
	hang = 2 * time.Minute
	// tries is how often a row is run whose observations say nothing.
	tries = 20

	// An open connection has joined after the first round of its warm-up, and takes the
	// shortcut after three more.
	warmUpRounds, warmUpSize = 6, 100
	// maxUnproved is how many connections of a suite may stay on TCP, or go back to it:
	// the kernel does not run a program on a CPU where it has been preempted in it.
	maxUnproved = 20
)

// observer is tracepoint for what a kernel without trampolines does.
var observer = flag.String("observer", datapath.ObserverAuto, "the program that counts what is read")

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	// Rows mostly wait: more of them at a time than CPUs. A flag of the command line wins.
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(sandbox.Main(m.Run))
}

// way is how the two ends are connected.
type way string

const (
	plain    way = "plain TCP" // neither pod takes part
	held     way = "held on TCP"
	shortcut way = "shortcut"
	late     way = "shortcut since it was open"
	watched  way = "shortcut since it had earned it"
)

// redirects reports whether messages take the shortcut.
func (w way) redirects() bool { return w == shortcut || w.joinsLate() }

// joinsLate reports whether connections join in the middle of their traffic.
func (w way) joinsLate() bool { return w == late || w == watched }

// mode says which ends are in blocking mode.
type mode struct {
	name           string
	client, server bool
}

// variant is one way to run a row. The row's end a is the client's, or the
// server's if swapped.
type variant struct {
	mode
	ipv6, swapped bool
}

// variants are those of a run in which sockets in blocking mode take part, or
// of one in which they do not and which is about them alone.
func variants(blocking bool) (all []variant) {
	modes, families := []mode{{name: "non-blocking"}, {"blocking", true, true}}, []bool{false, true}
	if !blocking {
		modes = []mode{{"blocking", true, true}, {name: "blocking client", client: true}, {name: "blocking server", server: true}}
		families = families[:1]
	}
	for _, m := range modes {
		for _, ipv6 := range families {
			for _, swapped := range []bool{false, true} {
				all = append(all, variant{m, ipv6, swapped})
			}
		}
	}
	return all
}

func (v variant) String() string {
	family, first := "IPv4", "client first"
	if v.ipv6 {
		family = "IPv6"
	}
	if v.swapped {
		first = "server first"
	}
	return strings.Join([]string{v.name, family, first}, ", ")
}

// row is one behaviour of sockets.
type row struct {
	name string
	run  func(c *conn)
	// blocking rows are about calls that sleep, nonblocking ones about those
	// that do not; a row that is neither runs in all modes.
	blocking, nonblocking bool
	// listen and dial set options before the connection is made.
	listen, dial func(fd int) error
	// cold: no bytes are exchanged first.
	cold bool
	// ends: the connection does not outlive the row, which calls prove before that.
	ends bool
	// tcp says why not all bytes of the row can take the shortcut; blockingTCP why not in blocking mode.
	tcp, blockingTCP string
	differs          []difference
}

// difference is what a row is known to see differently from plain TCP.
type difference struct {
	way
	fact string
	// entry is the anchor of the explanation in docs/limits.md.
	entry string
	// value is what is seen instead; nil stands for anything.
	value any
}

// differs lists facts that are different for the same reason.
func differs(w way, entry string, facts ...string) (all []difference) {
	for _, f := range facts {
		all = append(all, difference{way: w, fact: f, entry: entry})
	}
	return all
}

// alike are facts that are different on both ways.
func alike(entry string, facts ...string) []difference {
	return append(differs(held, entry, facts...), differs(shortcut, entry, facts...)...)
}

func (r row) runsIn(m mode) bool {
	switch {
	case r.blocking:
		return m.client && m.server
	case r.nonblocking:
		return !m.client && !m.server
	default:
		return true
	}
}

// rows returns the table.
func rows() []row {
	return slices.Concat(readRows(), writeRows(), closeRows(), eventRows(), optionRows(), threadRows(), wakeRows(), bulkRows())
}

// suite is a node with a pair of pods for each way.
type suite struct {
	*sandboxtest.Loaded
	blocking bool
	// watch: connections are watched first, and join when they have earned it.
	watch bool
	// lateCallbacks is that of the kernel's version.
	lateCallbacks bool
	content       content
	// port is the last one that a row has listened on. None is used twice:
	// podshunt may remember what has been seen on it.
	port atomic.Uint32
	// unproved counts connections that were not paired or shortcut when they had to be.
	unproved atomic.Int64
	// pods are a client and a server.
	pods map[way][2]*sandbox.Pod
	// joining is held while the client of the way late takes no part, and for reading
	// while it has to.
	joining sync.RWMutex

	mu sync.Mutex
	// seen are the known differences that were met, by row and way, then by entry.
	seen map[string]map[way]map[string]bool
}

// mustSuite opens a datapath in which sockets in blocking mode take part, or do not, and in
// which connections are watched, or join at their handshake.
func mustSuite(t *testing.T, blocking, watch bool) *suite {
	t.Helper()
	s := &suite{blocking: blocking, watch: watch, content: newContent(), pods: map[way][2]*sandbox.Pod{}, seen: map[string]map[way]map[string]bool{}}
	// What a receiver does from its first message on is what rows are about.
	s.Loaded = sandboxtest.MustLoad(t, sandboxtest.MustNew(t, sandbox.Config{}), func(c *datapath.Config) {
		c.AllowBlocking = blocking
		c.Observer = *observer
		if watch {
			c.JoinAfter = 2
		}
	})
	if watch {
		sandboxtest.MustJoinWatched(t, s.Datapath)
	}
	version, err := datapath.RunningVersion()
	if err != nil {
		t.Fatal(err)
	}
	s.lateCallbacks = version.LateCallbacks()
	s.port.Store(1024)
	var rules []rule.Rule
	pairs := map[way]rule.Verdict{plain: rule.Refuse, held: rule.Hold, shortcut: rule.Allow, late: rule.Allow}
	if watch {
		pairs = map[way]rule.Verdict{plain: rule.Refuse, watched: rule.Allow}
	}
	for w, verdict := range pairs {
		var pods [2]*sandbox.Pod
		var cookies []uint64
		for i, name := range []string{"client", "server"} {
			pods[i] = sandboxtest.MustAddPod(t, s, strings.ReplaceAll(string(w), " ", "-")+"-"+name, sandbox.PodOptions{})
			if err := pods[i].Sysctl("net.ipv4.tcp_fastopen", "3"); err != nil {
				t.Fatal(err)
			}
			if w == plain {
				continue
			}
			cookie := sandboxtest.MustCookie(t, pods[i])
			if err := s.Enrol(cookie); err != nil {
				t.Fatal(err)
			}
			cookies = append(cookies, cookie)
		}
		s.pods[w] = pods
		rules = append(rules, sandbox.Between(verdict, cookies...)...)
	}
	s.MustSetPolicy(t, rules)
	return s
}

// runRows runs the whole table.
func (s *suite) runRows(t *testing.T) {
	t.Helper()
	t.Run("rows", func(t *testing.T) {
		for _, r := range rows() {
			if r.cold && s.watch {
				continue // it would not join
			}
			t.Run(r.name, func(t *testing.T) {
				t.Parallel()
				for _, v := range variants(s.blocking) {
					if !r.runsIn(v.mode) {
						continue
					}
					t.Run(v.String(), func(t *testing.T) {
						t.Parallel()
						s.compare(t, r, v)
					})
				}
			})
		}
	})
	s.mustForget(t)
}

// mustForget waits until nothing is left of the connections: closing a socket is
// finished in the background.
func (s *suite) mustForget(t *testing.T) {
	t.Helper()
	var left map[string]int
	for limit := time.Now().Add(deadline); time.Now().Before(limit); time.Sleep(10 * time.Millisecond) {
		maps, err := s.Maps()
		if err != nil {
			t.Fatal(err)
		}
		left = map[string]int{}
		for _, m := range maps {
			// A client that gives up leaves its entry in syns, until the agent sweeps.
			if m.Entries > 0 && slices.Contains([]string{"flows", "sockets", "pending"}, m.Name) {
				left[m.Name] = m.Entries
			}
		}
		if len(left) == 0 {
			return
		}
	}
	t.Errorf("got entries of maps %v after all connections, want none", left)
}

// ways are those on which a variant runs, plain first. Open connections join where the
// kernel is safe for it; in blocking mode, if they may, from Linux 6.12 on.
func (s *suite) ways(v variant) []way {
	if s.watch {
		return []way{plain, watched}
	}
	all := []way{plain, held, shortcut}
	if s.NoJoin() == nil && (!v.client && !v.server || s.blocking && s.lateCallbacks) {
		all = append(all, late)
	}
	return all
}

// compare runs a row on every way, and compares with plain TCP.
func (s *suite) compare(t *testing.T, r row, v variant) {
	for range tries {
		again := false
		seen := map[way]*conn{}
		for _, w := range s.ways(v) {
			if !t.Run(string(w), func(t *testing.T) { seen[w] = s.observe(t, r, v, w) }) {
				return
			}
			again = again || seen[w].again
		}
		if again {
			continue
		}
		t.Log(seen[plain].facts)
		for _, w := range s.ways(v)[1:] {
			s.judge(t, r, seen[w], seen[plain].facts)
		}
		return
	}
	t.Errorf("no try of %d was in time, or went where it should", tries)
}

// fact is something that a row has observed.
type fact struct {
	name  string
	value any
}

// about is a number of which the order of magnitude counts.
type about int

func sameValue(a, b any) bool {
	x, ok := a.(about)
	if !ok {
		return a == b
	}
	y, ok := b.(about)
	return ok && x <= 10*y && y <= 10*x
}

// judge compares what c has seen with what plain TCP has shown.
func (s *suite) judge(t *testing.T, r row, c *conn, want []fact) {
	for i := range max(len(want), len(c.facts)) {
		var w, g fact
		if i < len(want) {
			w = want[i]
		}
		if i < len(c.facts) {
			g = c.facts[i]
		}
		if w.name != g.name {
			t.Errorf("%s: got %v where plain TCP has %v", c.way, g, w)
			return
		}
		if sameValue(w.value, g.value) {
			continue
		}
		entry := c.known(r, g)
		if entry == "" {
			t.Errorf("%s: %s: got %v, want %v as on plain TCP", c.way, g.name, g.value, w.value)
			continue
		}
		s.note(r.name, c.way, entry)
	}
}

// known returns the entry of docs/limits.md that explains a different fact.
func (c *conn) known(r row, f fact) string {
	for _, d := range r.differs {
		if (d.way == c.resembles() || d.way == late && c.way.joinsLate()) && d.fact == f.name && (d.value == nil || d.value == f.value) {
			return d.entry
		}
	}
	return ""
}

// resembles returns the way of which c may have the known differences.
func (c *conn) resembles() way {
	switch {
	case c.way.joinsLate():
		return shortcut
	case c.blocking || !c.client && !c.server:
		return c.way
	case c.client:
		return plain // it is not paired
	default:
		return held // the client's socket stays where it is
	}
}

func (s *suite) note(row string, w way, entry string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[row] == nil {
		s.seen[row] = map[way]map[string]bool{held: {}, shortcut: {}, late: {}, watched: {}}
	}
	s.seen[row][w][entry] = true
}

// conn is a connection on which a row runs, and what the row has seen.
type conn struct {
	*suite
	variant
	t    *testing.T
	row  row
	way  way
	a, b *end
	// address is the client's own, dialled the server's.
	address, dialled netip.AddrPort
	base             map[*end]sums
	proved           bool

	// again: an observation says nothing, because it was made too late, or on a
	// connection that did not go where it should.
	again   bool
	closers []func()
	threads sync.WaitGroup

	mu    sync.Mutex
	facts []fact
}

// sums are what was sent, according to the row and to podshunt.
type sums struct{ sent, shortcut int }

// observe runs a row on one connection.
func (s *suite) observe(t *testing.T, r row, v variant, w way) *conn {
	defer lockThread(t)()
	c := &conn{suite: s, variant: v, t: t, row: r, way: w}
	defer c.close()
	hangs := make(chan []fact, 1)
	watchdog := time.AfterFunc(hang, func() {
		hangs <- c.copyFacts()
		// The test may not come to its end.
		fmt.Fprintf(os.Stderr, "%s hangs on %s\n", r.name, w)
		c.disturb()
	})
	defer func() {
		if !watchdog.Stop() {
			t.Errorf("hangs after it has seen %v", <-hangs)
		}
	}()
	for c.open(); !r.cold && !c.warmUp(); c.open() {
		if c.unproved.Add(1) > maxUnproved {
			t.Fatalf("%d connections of the suite did not go where they should", c.unproved.Load())
		}
	}
	c.base = c.sums()
	r.run(c)
	if !r.ends {
		c.prove()
	} else if !c.proved {
		t.Errorf("the row ends the connection, but does not call prove before")
	}
	return c
}

// saw records a fact.
func (c *conn) saw(name string, value any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.facts = append(c.facts, fact{name, value})
}

func (c *conn) copyFacts() []fact {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.facts)
}

// must ends the row if err is not nil: it is no observation, but a test that does not work.
func (c *conn) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%s: %v; the row has seen %v", c.way, err, c.copyFacts())
	}
}

// atEnd calls f when the connection is given up.
func (c *conn) atEnd(f func()) { c.closers = append(c.closers, f) }

func (c *conn) disturb() {
	for _, e := range []*end{c.a, c.b} {
		if e != nil {
			_ = unix.Shutdown(e.fd, unix.SHUT_RDWR) // of a socket that may be closed already
		}
	}
}

func (c *conn) close() {
	c.disturb()
	c.threads.Wait()
	for _, f := range slices.Backward(c.closers) {
		f()
	}
}

// open makes the connection.
func (c *conn) open() {
	switch c.way {
	case late:
		c.openLate()
	case watched:
		c.openWatched()
	default:
		c.connect()
	}
}

// openWatched makes the connection, and exchanges messages until it has joined.
func (c *conn) openWatched() {
	c.connect()
	for limit := time.Now().Add(deadline); !c.flow().Joined; {
		if time.Now().After(limit) {
			c.t.Fatal("the watched connection does not join")
		}
		c.exchange(c.a, c.b, 1, warmUpSize)
	}
	// What is sent from now on is what is sent on the other ways.
	c.a.sent.Store(0)
	c.b.sent.Store(0)
}

// openLate makes the connection while the client takes no part, and lets it join.
func (c *conn) openLate() {
	client := sandboxtest.MustCookie(c.t, c.pods[late][0])
	func() {
		c.joining.Lock()
		defer c.joining.Unlock()
		c.must(c.Release(client))
		c.connect()
		c.must(c.Enrol(client))
	}()
	if !c.row.cold {
		c.exchange(c.a, c.b, 1, warmUpSize)
	}
	for limit := time.Now().Add(deadline); !c.flow().Joined; {
		if time.Now().After(limit) {
			c.t.Fatal("the open connection does not join")
		}
		var all []datapath.Netns
		for _, p := range c.pods[late] {
			all = append(all, datapath.Netns{Cookie: sandboxtest.MustCookie(c.t, p), Path: p.Path})
		}
		_, err := c.Join(c.t.Context(), all)
		c.must(err)
	}
}

func (c *conn) connect() {
	pods := c.pods[c.way]
	l, dialled := c.listen(pods[1], c.freePort(), c.row.listen)
	fd, _ := c.dialNow(pods[0], dialled, c.client, c.row.dial)
	c.a = &end{c: c, fd: fd, pod: pods[0], blocking: c.client}
	c.b = &end{c: c, fd: c.accept(l, c.server), pod: pods[1], blocking: c.server}
	c.address, c.dialled = localAddress(c.t, fd), dialled
	if c.swapped {
		c.a, c.b = c.b, c.a
	}
}

// warmUp exchanges messages until both directions are shortcut, if they can be. It
// returns false if they should be and are not.
func (c *conn) warmUp() bool {
	if c.way.joinsLate() {
		rounds := warmUpRounds
		if c.way == late {
			rounds-- // it has had one to join
		}
		c.exchange(c.a, c.b, rounds, warmUpSize)
		f := c.flow()
		return f.ToServer.Shortcut && f.ToClient.Shortcut
	}
	c.exchange(c.a, c.b, warmUpRounds, warmUpSize)
	if !c.way.redirects() {
		return true
	}
	f := c.flow()
	if !c.blocking && (c.client || c.server) {
		return true
	}
	size := uint64(warmUpSize)
	want := datapath.Direction{Shortcut: true, Verdict: rule.Allow, Switches: 1, TCPBytes: size, ShortcutBytes: (warmUpRounds - 1) * size}
	for _, got := range []datapath.Direction{f.ToServer, f.ToClient} {
		got.Reason = ""
		if diff := cmp.Diff(want, got); diff != "" {
			c.t.Logf("the warmed up direction (-want +got):\n%s", diff)
			return false
		}
	}
	return true
}

// exchange sends messages to and fro and wants them to arrive.
func (c *conn) exchange(a, b *end, rounds, size int) {
	c.t.Helper()
	for range rounds {
		for _, way := range [][2]*end{{a, b}, {b, a}} {
			sent := way[0].send(size)
			if got := way[1].recvAll(size); got != sent {
				c.t.Fatalf("%s: got %s of %s", c.way, got, sent)
			}
		}
	}
}

// flow returns podshunt's record of the connection, the zero Flow if it has none.
func (c *conn) flow() datapath.Flow {
	c.t.Helper()
	return c.flowOf(c.address, c.dialled)
}

func (c *conn) flowOf(client, dialled netip.AddrPort) datapath.Flow {
	c.t.Helper()
	flows, err := c.Flows()
	c.must(err)
	for _, f := range flows {
		if f.Client == client && f.OrigDst == dialled {
			return f
		}
	}
	return datapath.Flow{}
}

// proveAnother checks one more connection of the row, which is warmed up.
func (c *conn) proveAnother(client *end, dialled netip.AddrPort) {
	c.t.Helper()
	if c.way == watched {
		return // it may not have joined yet
	}
	f := c.flowOf(localAddress(c.t, client.fd), dialled)
	want := c.way.redirects() && (c.blocking || !c.client && !c.server)
	if f.ToServer.Shortcut != want || f.ToClient.Shortcut != want {
		c.strayed(want, "got flow %+v, want both directions shortcut %v", f, want)
	}
}

// strayed is called for a connection that did not go where it should. If that is
// a stay on TCP the row runs again, unless too many of the suite have strayed.
func (c *conn) strayed(toTCP bool, format string, values ...any) {
	c.t.Helper()
	text := fmt.Sprintf("%s: "+format, append([]any{c.way}, values...)...)
	if !toTCP || c.unproved.Add(1) > maxUnproved {
		c.t.Error(text)
		return
	}
	c.t.Log(text)
	c.again = true
}

func (c *conn) sums() map[*end]sums {
	f := c.flow()
	toServer, toClient := int(f.ToServer.ShortcutBytes), int(f.ToClient.ShortcutBytes)
	if c.swapped {
		toServer, toClient = toClient, toServer
	}
	return map[*end]sums{
		c.a: {int(c.a.sent.Load()), toServer},
		c.b: {int(c.b.sent.Load()), toClient},
	}
}

// prove checks that everything that the row has sent went the way it should.
func (c *conn) prove() {
	c.t.Helper()
	c.proved = true
	f := c.flow()
	paired := c.way != plain && (c.blocking || !c.client)
	if got := f.Joined; got != paired {
		c.strayed(paired, "got paired %v, want %v", got, paired)
	}
	stays := c.way.redirects() && (c.blocking || !c.client && !c.server)
	reason := c.row.tcp
	if c.client || c.server {
		reason += c.row.blockingTCP
	}
	now := c.sums()
	for _, e := range []*end{c.a, c.b} {
		sent, got := now[e].sent-c.base[e].sent, now[e].shortcut-c.base[e].shortcut
		want := sent
		if !stays {
			want = 0
		} else if reason != "" && got < sent {
			continue
		}
		if got != want {
			c.strayed(got < want, "got %d bytes by shortcut of the %d that %s has sent, want %d; %+v", got, sent, e, want, f)
		}
	}
	if !c.blocking && c.server && !c.client && c.way == shortcut && !c.row.cold && !f.ToClient.Evicted {
		c.t.Error("the server's socket is in blocking mode and has not left")
	}
}

// lockThread gives the caller a thread of its own, which signals do not wake:
// those of the Go runtime, of children that end. Its own, such as SIGPIPE, stay
// pending. The result undoes that.
func lockThread(t testing.TB) (unlock func()) {
	runtime.LockOSThread()
	all := unix.Sigset_t{Val: [16]uint64{^uint64(0)}}
	var before unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, &before); err != nil {
		t.Error(err)
	}
	return func() {
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	}
}

func sigset(signals ...unix.Signal) unix.Sigset_t {
	var set unix.Sigset_t
	for _, s := range signals {
		set.Val[0] |= 1 << (s - 1)
	}
	return set
}

// onThread runs f on a thread of its own. The result waits for f.
func (c *conn) onThread(f func() any) (result func() any) {
	result, _, _ = c.start(f)
	return result
}

// asleep is onThread, but returns when the thread sleeps in the kernel or f is done.
func (c *conn) asleep(f func() any) (result func() any) {
	c.t.Helper()
	result, tid, ended := c.start(f)
	c.mustSleep(tid, ended)
	return result
}

func (c *conn) start(f func() any) (result func() any, tid int, ended func() bool) {
	started, done := make(chan int, 1), make(chan any, 1)
	c.threads.Go(func() {
		defer lockThread(c.t)()
		started <- unix.Gettid()
		done <- f()
	})
	result = func() any {
		c.t.Helper()
		select {
		case got := <-done:
			return got
		case <-time.After(deadline + hang):
			c.t.Fatalf("%s: a sleeping thread was not woken", c.way)
			return nil
		}
	}
	return result, <-started, func() bool { return len(done) > 0 }
}

// mustSleep waits until a thread sleeps in a system call other than those of the Go
// runtime and of page faults (-1), or ended says that it has nothing more to do.
func (c *conn) mustSleep(tid int, ended func() bool) {
	c.t.Helper()
	others := []string{"running", "-1", fmt.Sprint(unix.SYS_FUTEX), fmt.Sprint(unix.SYS_MMAP), fmt.Sprint(unix.SYS_MUNMAP), fmt.Sprint(unix.SYS_MADVISE)}
	for limit := time.Now().Add(deadline); time.Now().Before(limit); time.Sleep(200 * time.Microsecond) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		number, _, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
		if ended() || err == nil && !slices.Contains(others, number) {
			return
		}
	}
	c.t.Fatalf("%s: thread %d does not come to sleep", c.way, tid)
}

// TestConformance: no row sees a difference that docs/limits.md does not
// explain, and the table there is right for this kernel.
func TestConformance(t *testing.T) {
	s := mustSuite(t, true, false)
	s.runRows(t)
	if t.Failed() {
		return // the table would hide what failed
	}
	s.summarise(t)
	s.checkLimits(t)
}

// TestWatched: the same holds for connections that have joined once they had earned it.
func TestWatched(t *testing.T) {
	if noWatch(t) {
		return
	}
	s := mustSuite(t, true, true)
	s.runRows(t)
	s.summarise(t)
}

// noWatch reports whether the kernel of this machine refuses what watched connections need to
// join. hack/kernels has kernels that do not, on which this may not be so.
func noWatch(t *testing.T) bool {
	err := datapath.CheckWatch()
	if err != nil && *withMPTCP {
		t.Fatal(err)
	}
	return err != nil
}

// TestBlockingStaysOut: with the default settings, a socket in blocking mode
// behaves as one of plain TCP.
func TestBlockingStaysOut(t *testing.T) {
	s := mustSuite(t, false, false)
	s.runRows(t)
}

// summarise prints a line for each row.
func (s *suite) summarise(t *testing.T) {
	var text strings.Builder
	for _, r := range rows() {
		fmt.Fprintf(&text, "%-40s", r.name)
		for _, w := range s.ways(variant{})[1:] {
			entries := sorted(s.seen[r.name][w])
			verdict := "same"
			if len(entries) > 0 {
				verdict = "differs: " + strings.Join(entries, ", ")
			}
			fmt.Fprintf(&text, " | %s: %s", w, verdict)
		}
		text.WriteString("\n")
	}
	t.Logf("compared with plain TCP on Linux %s, observer %s:\n%s", release(t), s.Observer(), &text)
	t.Logf("%d connections did not go where they should, %d times a program was not run", s.unproved.Load(), sandboxtest.MustMisses(t))
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

const (
	// firstLimit is what a direction may hold before its reader has proved anything.
	firstLimit = 128 << 10
	// messageCost is what each redirected message counts for beside its bytes: the
	// kernel's struct sk_msg is a slab object of 1 KiB.
	messageCost = 1024
)

// atOnce lets messages take the shortcut as soon as a receiver has been seen to
// read, and none of them go by TCP to keep conntrack awake.
func atOnce(c *datapath.Config) {
	c.TrialReads, c.TrialBytes, c.RefreshInterval = 1, 0, 0
}

// shortcut returns how many messages took the shortcut so far, and their bytes.
func (n *node) shortcut(tb testing.TB) (messages, bytes int) {
	tb.Helper()
	outcomes, err := n.Outcomes()
	if err != nil {
		tb.Fatal(err)
	}
	for _, o := range outcomes {
		if o.String() == "message_shortcut" {
			return int(o.Count), int(o.Bytes)
		}
	}
	tb.Fatal("no counter message_shortcut")
	return 0, 0
}

// redirected returns what do has sent by the shortcut.
func (n *node) redirected(tb testing.TB, do func()) (messages, bytes int) {
	tb.Helper()
	messagesBefore, bytesBefore := n.shortcut(tb)
	do()
	messages, bytes = n.shortcut(tb)
	return messages - messagesBefore, bytes - bytesBefore
}

// backlog is a stream that only its seed decides, in pieces of any size, of
// which nothing is read for a while.
type backlog struct {
	from, to net.Conn
	seed     byte
	content  *rand.ChaCha8
	buf      [64 << 10]byte
	bytes    int
}

func newBacklog(from, to net.Conn, seed byte) *backlog {
	content, _ := traffic{seed: seed}.source()
	return &backlog{from: from, to: to, seed: seed, content: content}
}

// write writes a piece, and tells whether all of it was taken: TCP takes no more
// where nothing goes on for half a second.
func (b *backlog) write(tb testing.TB, size int) bool {
	tb.Helper()
	if err := b.from.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		tb.Fatal(err)
	}
	_, _ = b.content.Read(b.buf[:size]) // never fails
	n, err := b.from.Write(b.buf[:size])
	b.bytes += n
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		tb.Fatalf("write at %d: %v", b.bytes, err)
	}
	return err == nil
}

// read reads all of it, checks every byte and starts anew.
func (b *backlog) read(tb testing.TB) {
	tb.Helper()
	limit := time.Now().Add(deadline)
	if err := errors.Join(b.from.SetDeadline(limit), b.to.SetDeadline(limit)); err != nil {
		tb.Fatal(err)
	}
	if err := (traffic{seed: b.seed, bytes: b.bytes, maxRead: 100_000}).read(b.to); err != nil {
		tb.Fatal(err)
	}
	b.content, _ = traffic{seed: b.seed}.source()
	b.bytes = 0
}

// spills counts the messages that went by TCP because too much was unread.
func spills(counts map[string]uint64) uint64 {
	return counts["message_budget"] + counts["message_receive_buffer"] + counts["message_pod_budget"]
}

// fill writes pieces until one is spilt, or TCP takes no more.
func (n *node) fill(tb testing.TB, b *backlog, size int) {
	tb.Helper()
	for before := spills(n.counts(tb)); spills(n.counts(tb)) == before; {
		if !b.write(tb, size) {
			return
		}
	}
}

// grow makes the limit of a direction what its receiver and the budget allow: it
// is filled and read until it takes no more than the last time. It returns how
// many bytes it takes in pieces of 16 KiB. A window that is open closes by no more than
// a piece each time, so the most may still grow afterwards.
func (n *node) grow(tb testing.TB, from, to net.Conn) (most int) {
	tb.Helper()
	for range 1000 {
		b := newBacklog(from, to, 3)
		_, bytes := n.redirected(tb, func() { n.fill(tb, b, 16<<10) })
		b.read(tb)
		if bytes <= most {
			return most
		}
		most = bytes
	}
	tb.Fatalf("the limit still grows beyond %d bytes", most)
	return 0
}

// slabs is kernel memory of the whole machine, in bytes.
type slabs struct {
	// all is what cannot be reclaimed.
	all int
	// messages is the part of objects as large as a struct sk_msg (1 KiB, or 2 KiB
	// with MAX_SKB_FRAGS of 45), or 0 where the kernel does not tell.
	messages int
	// tcp is what TCP accounts for, which has limits of its own: tcp_rmem, tcp_wmem
	// and tcp_mem.
	tcp int
}

// mustReadSlabs waits until what was freed before is gone: it is freed in the background.
func mustReadSlabs(tb testing.TB) slabs {
	tb.Helper()
	last := readSlabs(tb)
	for limit := time.Now().Add(5 * time.Second); time.Now().Before(limit); {
		time.Sleep(200 * time.Millisecond)
		next := readSlabs(tb)
		if next.all >= last.all-64<<10 {
			return next
		}
		last = next
	}
	return last
}

func readSlabs(tb testing.TB) (s slabs) {
	tb.Helper()
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(meminfo)) {
		if fields := strings.Fields(line); fields[0] == "SUnreclaim:" {
			kib, err := strconv.Atoi(fields[1])
			if err != nil {
				tb.Fatal(err)
			}
			s.all = kib << 10
		}
	}
	if s.all == 0 {
		tb.Fatal("/proc/meminfo has no SUnreclaim")
	}
	s.tcp = tcpMemory(tb)
	slabinfo, err := os.ReadFile("/proc/slabinfo")
	if err != nil {
		return s
	}
	for line := range strings.Lines(string(slabinfo)) {
		fields := strings.Fields(line) // name, active_objs, num_objs, objsize
		// Kernels may spread kmalloc over several caches (kmalloc-rnd-01-1k); those
		// for memory cgroups are no messages'.
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "kmalloc-") || strings.Contains(fields[0], "-cg-") ||
			!strings.HasSuffix(fields[0], "-1k") && !strings.HasSuffix(fields[0], "-2k") {
			continue
		}
		objects, err := strconv.Atoi(fields[1])
		size, err2 := strconv.Atoi(fields[3])
		if err := errors.Join(err, err2); err != nil {
			tb.Fatal(err)
		}
		s.messages += objects * size
	}
	return s
}

// wayOf names the way of messages under a verdict.
func wayOf(verdict rule.Verdict) string {
	if verdict == rule.Allow {
		return "shortcut"
	}
	return "TCP"
}

func repeated(size, times int) iter.Seq[int] {
	return func(yield func(int) bool) {
		for range times {
			if !yield(size) {
				return
			}
		}
	}
}

// growing yields sizes from 1 byte to 64 KiB, each as often as what is unread
// may cost if all of it were messages of that size: whoever judges by the last
// message alone lets several times the limit pass.
func growing(limit int) iter.Seq[int] {
	return func(yield func(int) bool) {
		for size, unread := 1, 0; size <= 64<<10; size += 1 + size/8 {
			for ; (unread+size)*(size+messageCost) <= limit*size; unread += size {
				if !yield(size) {
					return
				}
			}
		}
	}
}

// TestUnreadMemory: what a reader leaves unread costs the kernel at most twice
// the limit in force, whatever the size of the messages, and all of it arrives.
func TestUnreadMemory(t *testing.T) {
	const budget = 1 << 20
	n := mustTwoPods(t, func(c *datapath.Config) {
		atOnce(c)
		c.Budget, c.PodBudget = budget, 64<<20
	})
	// Other processes of this machine use slabs, too: in these seconds some MiB of
	// this size, and tens of MiB of all. 500,000 messages without a limit are 500 MiB.
	// What the messages that grow would cost without one is less than the noise of a
	// machine that is not our own; there the count of messages alone tells. TCP sums
	// up its memory in steps of 1 MiB for each CPU: what it says may lack one for each
	// afterwards, and have one too many for each before.
	noise, noiseOfAll := 16<<20, 128<<20
	if *ownMachine {
		steps := 2 * runtime.NumCPU() << 20
		noise, noiseOfAll = 1<<20+steps, 2<<20+steps
	}
	for _, tc := range []struct {
		name  string
		limit int
		sizes iter.Seq[int]
	}{
		{"messages of 1 byte", firstLimit, repeated(1, 500_000)},
		{"messages of 1 byte to a proven reader", budget, repeated(1, 100_000)},
		{"messages of 100 bytes", firstLimit, repeated(100, 50_000)},
		{"messages that grow", firstLimit, growing(firstLimit)},
		{"messages that grow to a proven reader", budget, growing(budget)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, s := n.connect(t)
			n.warmUp(t, c, s)
			if tc.limit > firstLimit {
				// 16 KiB and their own cost, until no more fit.
				if got := n.grow(t, c, s); got < tc.limit*14/16 || got > tc.limit {
					t.Fatalf("got a limit of %d bytes after reading, want about %d", got, tc.limit)
				}
			}
			// What is spilt goes in segments of many messages, which takes far less time.
			if err := c.(*net.TCPConn).SetNoDelay(false); err != nil {
				t.Fatal(err)
			}
			b := newBacklog(c, s, 9)
			before := mustReadSlabs(t)
			messages, bytes := n.redirected(t, func() {
				for size := range tc.sizes {
					if !b.write(t, size) {
						return
					}
				}
			})
			after := readSlabs(t)
			cost := slabs{after.all - before.all, after.messages - before.messages, after.tcp - before.tcp}
			t.Logf("%d bytes unread, %d of them in %d messages by shortcut; slabs %+d KiB, of the size of messages %+d KiB, TCP's memory %+d KiB",
				b.bytes, bytes, messages, cost.all>>10, cost.messages>>10, cost.tcp>>10)
			b.read(t)
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
			n.closeAll(t, c, s)
			if messages == 0 {
				t.Error("nothing took the shortcut")
			}
			if got := bytes + messages*messageCost; got > tc.limit {
				t.Errorf("got %d bytes in %d messages unread by shortcut: they cost %d, want at most %d", bytes, messages, got, tc.limit)
			}
			// TCP's own segments may be of the same size (6.1).
			if got, limit := cost.messages-max(cost.tcp, 0), 2*tc.limit+noise; got > limit {
				t.Errorf("messages grew by %d KiB beside what TCP accounts for, want at most %d", got>>10, limit>>10)
			}
			if got, limit := cost.all-max(cost.tcp, 0), 2*tc.limit+noiseOfAll; got > limit {
				t.Errorf("slabs grew by %d KiB beside what TCP accounts for, want at most %d", got>>10, limit>>10)
			}
		})
	}
	if *ownMachine {
		t.Run("memory cgroup", receiverInCgroup)
	}
}

// TestLimitGrows: the limit of a direction starts small, grows to what its reader
// has read, at least to twice as much, each time that it has read all after a spill,
// and ends at the budget. It is the direction's own.
func TestLimitGrows(t *testing.T) {
	const budget = 512 << 10
	n := mustTwoPods(t, func(c *datapath.Config) {
		atOnce(c)
		c.Budget, c.PodBudget = budget, 64<<20
	})
	c, s := n.connect(t)
	n.warmUp(t, c, s)
	const size, cost = 8 << 10, 8<<10 + messageCost
	fill := func(from, to net.Conn) int {
		b := newBacklog(from, to, 5)
		_, bytes := n.redirected(t, func() { n.fill(t, b, size) })
		b.read(t)
		return bytes
	}
	for i, limit := range []int{firstLimit, 2 * firstLimit, 4 * firstLimit, budget, budget} {
		// It grows to what was read meanwhile, at least to twice as much.
		got, want, most := fill(c, s), limit/cost*size, budget/cost*size
		if got < want || got > most || i == 0 && got != want {
			t.Errorf("after %d spills: got %d bytes by shortcut until the next, want %d (a limit of %d), and with what was read by TCP at most %d", i, got, want, limit, most)
		}
	}
	if got, want := fill(s, c), firstLimit/cost*size; got != want {
		t.Errorf("the other direction: got %d bytes by shortcut, want %d", got, want)
	}
	// Reading without a spill proves nothing.
	other, otherS := n.connect(t)
	sandboxtest.MustPing(t, other, otherS, 50, 64<<10)
	if got, want := fill(other, otherS), firstLimit/cost*size; got != want {
		t.Errorf("after reading without a spill: got %d bytes by shortcut, want %d", got, want)
	}
}

// TestLimitBeginsProved: a direction begins with a limit of what its receiver has
// read in its trial, and with the limit of earlier connections to the port.
func TestLimitBeginsProved(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) {
		onTrial(c)
		c.Budget, c.PodBudget = 16<<20, 64<<20
	})
	// Room for it beside what TCP may send.
	if err := n.pods[1].Sysctl("net.ipv4.tcp_rmem", "4096 131072 67108864"); err != nil {
		t.Fatal(err)
	}
	const size, cost = 8 << 10, 8<<10 + messageCost
	talk := func() (net.Conn, net.Conn) {
		t.Helper()
		c, s := n.connect(t)
		for n.mustFlow(t).ToServer.ShortcutBytes == 0 {
			request(t, c, s, 64<<10)
		}
		return c, s
	}
	holds := func(c, s net.Conn) int {
		t.Helper()
		b := newBacklog(c, s, 5)
		_, bytes := n.redirected(t, func() { n.fill(t, b, size) })
		b.read(t)
		return bytes
	}
	end := func(c, s net.Conn) {
		t.Helper()
		if err := finish(c, s); err != nil {
			t.Error(err)
		}
		n.closeAll(t, c, s)
	}

	c, s := talk()
	proved := int(n.mustFlow(t).ToServer.TCPBytes)
	if proved < 4*firstLimit {
		t.Fatalf("got %d bytes in the trial, want many more than a direction begins with", proved)
	}
	if got, want := holds(c, s), proved/cost*size; got != want {
		t.Errorf("got %d bytes by shortcut until the first spill, want %d", got, want)
	}
	request(t, c, s, 1) // the limit grows, and is remembered
	end(c, s)

	c, s = talk()
	if got := holds(c, s); got < 2*proved/cost*size {
		t.Errorf("the next connection: got %d bytes by shortcut until a spill, want at least %d", got, 2*proved/cost*size)
	}
	end(c, s)

	// Another program, on the same port.
	if err := n.l.Close(); err != nil {
		t.Fatal(err)
	}
	n.l = sandboxtest.MustListen(t, n.pods[1], "tcp4", n.address.String())
	c, s = talk()
	proved = int(n.mustFlow(t).ToServer.TCPBytes)
	if got, want := holds(c, s), proved/cost*size; got != want {
		t.Errorf("after another listen: got %d bytes by shortcut until the first spill, want %d", got, want)
	}
	end(c, s)
}

// TestRestedReader: a reader that rests gets what is waiting for it, and what
// follows, as soon as on TCP. Where redirected bytes count as bytes of the
// receive buffer, TCP's would be dropped if they exceeded it, and sent again
// after a time about as long as the rest: the sender tries after 0.2 s, 0.6 s,
// 1.4 s, ..., 6.2 s and 12.6 s.
func TestRestedReader(t *testing.T) {
	const attempts, memory = 3, "4096 131072 6291456"
	for _, tc := range []struct {
		name    string
		receive int    // SO_RCVBUF
		memory  string // net.ipv4.tcp_rmem of the receiver's pod
		rest    time.Duration
		// open is how much TCP carries before, so that its window opens. least is what may
		// be unread by the shortcut even so.
		open, least int
		packets     bool // the sender makes segments of one packet, and each takes more than it holds
	}{
		{name: "SO_RCVBUF of 100 KB", receive: 100_000, rest: 9 * time.Second},
		{name: "tcp_rmem of 6 MiB", memory: memory, rest: 9 * time.Second, least: 1 << 20},
		{name: "window wide open", memory: memory, rest: 4 * time.Second, open: 64 << 20, least: 64 << 10},
		{name: "window wide open, segments of one packet", memory: memory, rest: 4 * time.Second, open: 64 << 20, least: 64 << 10, packets: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, func(c *datapath.Config) {
				atOnce(c)
				c.Budget, c.PodBudget = 8<<20, 64<<20
			})
			pods, cookies := n.MustEnrol(t, "client", "server")
			if tc.memory != "" {
				if err := pods[1].Sysctl("net.ipv4.tcp_rmem", tc.memory); err != nil {
					t.Fatal(err)
				}
			}
			if tc.packets {
				if err := pods[0].Do(func() error {
					link, err := netlink.LinkByName("eth0")
					if err != nil {
						return err
					}
					return netlink.LinkSetGSOMaxSegs(link, 1)
				}); err != nil {
					t.Fatal(err)
				}
			}
			l, address := mustListenOn(t, pods[1])
			if tc.receive != 0 {
				control(t, l.(*net.TCPListener), func(fd int) error {
					return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, tc.receive)
				})
			}
			// read returns how long the reader waited at most once it read again, and how
			// many segments had no room before.
			read := func(verdict rule.Verdict) (longest time.Duration, dropped int) {
				n.MustSetPolicy(t, sandbox.Between(rule.Hold, cookies...))
				c, s := connect(t, pods[0].Netns, l, "tcp4", address)
				bulk := traffic{seed: 9, bytes: tc.open, maxWrite: 64 << 10, maxRead: 256 << 10}
				if err := together(func() error { return bulk.write(c) }, func() error { return bulk.read(s) }); err != nil {
					t.Fatal(err)
				}
				sandboxtest.MustPing(t, c, s, 5, 100)
				n.MustSetPolicy(t, sandbox.Between(verdict, cookies...))
				if verdict == rule.Allow {
					waitUntil(t, fmt.Sprintf("%d bytes that may be unread by the shortcut", tc.least), func() bool {
						got := n.grow(t, c, s)
						t.Logf("%d bytes may be unread", got)
						return got >= tc.least
					})
				}
				dropsBefore := drops(t, pods[1])
				before := n.counts(t)
				// More than the budget and both buffers of TCP hold.
				all := traffic{seed: 8, bytes: 32 << 20, maxWrite: 64 << 10, maxRead: 64 << 10}
				reader := &stopwatch{Reader: s}
				err := together(
					func() error { return all.write(c) },
					func() error {
						time.Sleep(tc.rest)
						reader.last = time.Now()
						return all.read(reader)
					},
				)
				if err != nil {
					t.Fatal(err)
				}
				dropped = drops(t, pods[1]) - dropsBefore
				spilt := spills(n.since(t, before))
				t.Logf("%s: the longest wait was %v, %d segments dropped, %d messages spilt", wayOf(verdict), reader.longest, dropped, spilt)
				if verdict == rule.Allow && spilt == 0 {
					t.Error("nothing was spilt")
				}
				if err := finish(c, s); err != nil {
					t.Error(err)
				}
				n.closeAll(t, c, s)
				return reader.longest, dropped
			}
			// On a busy machine each wait may be long for another reason; the one for a
			// segment that was dropped comes every time, and is seconds long.
			var got []string
			for range attempts {
				plain, plainDropped := read(rule.Hold)
				shortcut, dropped := read(rule.Allow)
				if shortcut <= 5*plain+time.Second && dropped <= plainDropped {
					return
				}
				got = append(got, fmt.Sprintf("%v and %d dropped (TCP %v and %d)", shortcut, dropped, plain, plainDropped))
			}
			t.Errorf("got waits of %s, want them to be about as on TCP", strings.Join(got, ", "))
		})
	}
}

// stopwatch is a reader that knows how long its longest read took.
type stopwatch struct {
	io.Reader
	last    time.Time
	longest time.Duration
}

func (s *stopwatch) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	now := time.Now()
	s.longest = max(s.longest, now.Sub(s.last))
	s.last = now
	return n, err
}

// drops returns how many segments the pod's sockets had no room for.
func drops(tb testing.TB, pod *sandbox.Pod) (sum int) {
	tb.Helper()
	for _, name := range []string{"RcvPruned", "TCPRcvQDrop", "TCPOFODrop", "TCPZeroWindowDrop"} {
		n, err := strconv.Atoi(netstat(tb, pod, name))
		if err != nil {
			tb.Fatal(err)
		}
		sum += n
	}
	return sum
}

// charges returns what the pods count as unread, by netns cookie.
func (n *node) charges(tb testing.TB) map[uint64]int64 {
	tb.Helper()
	charges, err := ebpf.LoadPinnedMap(filepath.Join(n.Config.PinDir, bpf.ShortcutMapCharges), nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer charges.Close()
	var (
		all    = map[uint64]int64{}
		cookie uint64
		charge int64
	)
	entries := charges.Iterate()
	for entries.Next(&cookie, &charge) {
		all[cookie] = charge
	}
	if err := entries.Err(); err != nil {
		tb.Fatal(err)
	}
	return all
}

// TestPodBudget: what all connections of one receiving pod leave unread by the
// shortcut stays below the pod's budget. What is read, or ends unread, makes room
// again, to the byte.
func TestPodBudget(t *testing.T) {
	const podBudget, size, connections = 1 << 20, 16 << 10, 32
	for _, tc := range []struct {
		name     string
		loopback bool
	}{{"two pods", false}, {"loopback", true}} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, func(c *datapath.Config) {
				atOnce(c)
				c.Budget, c.PodBudget = podBudget, podBudget
			})
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			from, listen := pods[0], pods[1].IPv4.String()
			if tc.loopback {
				from, listen = pods[1], "127.0.0.1"
			}
			// They outlive a subtest. What is learned of a port is about its listener.
			open := func() (all []*backlog) {
				l := sandboxtest.MustListen(t, pods[1], "tcp4", net.JoinHostPort(listen, "0"))
				address := l.Addr().(*net.TCPAddr).AddrPort()
				for i := range connections {
					c, s := connect(t, from.Netns, l, "tcp4", address)
					sandboxtest.MustPing(t, c, s, 5, 100)
					all = append(all, newBacklog(c, s, byte(i)))
				}
				return all
			}
			// fill gives every connection in turn a message until each has been refused.
			fill := func(t *testing.T, all []*backlog) int {
				before := n.counts(t)
				messages, bytes := n.redirected(t, func() {
					for range firstLimit/size + 1 {
						for _, b := range all {
							b.write(t, size)
						}
					}
				})
				if got := bytes + messages*messageCost; got > podBudget || got < podBudget/2 {
					t.Errorf("got %d messages of %d bytes unread: they cost %d, want at most %d and at least half of that", messages, size, got, podBudget)
				}
				if n.since(t, before)["message_pod_budget"] == 0 {
					t.Errorf("got %v, want messages by TCP for the pod's budget", n.since(t, before))
				}
				return bytes
			}
			closeBoth := func(t *testing.T, all []*backlog) {
				var ends []net.Conn
				for _, b := range all {
					ends = append(ends, b.from, b.to)
				}
				n.closeAll(t, ends...)
			}
			readAll := func(t *testing.T, all []*backlog) {
				for _, b := range all {
					b.read(t)
				}
			}
			all := open()
			want := fill(t, all)
			uncharged := func(t *testing.T) {
				for cookie, charge := range n.charges(t) {
					if charge != 0 {
						t.Errorf("got %d bytes counted as unread in pod %d, want 0", charge, cookie)
					}
				}
			}
			for _, end := range []struct {
				name string
				do   func(t *testing.T)
			}{
				{"read", func(t *testing.T) { readAll(t, all) }},
				{"closed by the receiver unread", func(t *testing.T) {
					for _, b := range all {
						b.to.Close()
					}
					closeBoth(t, all)
					all = open()
				}},
				{"closed by the sender, then unread", func(t *testing.T) {
					for _, b := range all {
						b.from.Close()
					}
					closeBoth(t, all)
					all = open()
				}},
				{"reset by the sender", func(t *testing.T) {
					for _, b := range all {
						if err := b.from.(*net.TCPConn).SetLinger(0); err != nil {
							t.Fatal(err)
						}
						b.from.Close()
					}
					closeBoth(t, all)
					all = open()
				}},
				{"reset by the receiver", func(t *testing.T) {
					for _, b := range all {
						if err := b.to.(*net.TCPConn).SetLinger(0); err != nil {
							t.Fatal(err)
						}
						b.to.Close()
					}
					closeBoth(t, all)
					all = open()
				}},
				{"disconnected by the receiver", func(t *testing.T) {
					for _, b := range all {
						control(t, b.to.(*net.TCPConn), disconnect)
					}
					closeBoth(t, all)
					all = open()
				}},
				{"read by sockets that then leave", func(t *testing.T) {
					for _, b := range all {
						control(t, b.to.(*net.TCPConn), func(fd int) error {
							timeout := unix.NsecToTimeval(deadline.Nanoseconds())
							return errors.Join(unix.SetNonblock(fd, false), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
						})
						// Its next message says so, and TCP's acknowledgement takes it out.
						if _, err := b.to.Write([]byte("x")); err != nil {
							t.Fatal(err)
						}
						mustRead(t, b.from, "x")
					}
					before := n.counts(t)["socket_evicted"]
					for _, b := range all {
						b.read(t)
					}
					waitUntil(t, "the sockets to leave", func() bool {
						for _, b := range all {
							for _, way := range [][2]net.Conn{{b.from, b.to}, {b.to, b.from}} {
								if _, err := way[0].Write([]byte("y")); err != nil {
									t.Fatal(err)
								}
								mustRead(t, way[1], "y")
							}
						}
						return n.counts(t)["socket_evicted"]-before >= connections
					})
					closeBoth(t, all)
					all = open()
				}},
				{"read while no process owns the pins", func(t *testing.T) {
					n.mustClose(t)
					readAll(t, all)
					n.MustOpen(t)
				}},
				{"read after the pod was released and enrolled again", func(t *testing.T) {
					if err := n.Release(cookies[1]); err != nil {
						t.Fatal(err)
					}
					if err := n.Enrol(cookies[1]); err != nil {
						t.Fatal(err)
					}
					readAll(t, all)
				}},
			} {
				if !t.Run(end.name, func(t *testing.T) {
					end.do(t)
					uncharged(t)
					if got := fill(t, all); got != want {
						t.Errorf("got room for %d bytes, want %d as at first", got, want)
					}
				}) {
					return // what is left would be counted in the next one
				}
			}
			// Messages that are sent at the same time may all find the same room.
			readAll(t, all)
			var writers []func() error
			messages, bytes := n.redirected(t, func() {
				for _, b := range all {
					piece := make([]byte, size)
					writers = append(writers, func() error {
						for range firstLimit / size {
							_, _ = b.content.Read(piece)
							n, err := b.from.Write(piece)
							b.bytes += n
							if err != nil {
								return err
							}
						}
						return nil
					})
					if err := b.from.SetWriteDeadline(time.Now().Add(deadline)); err != nil {
						t.Fatal(err)
					}
				}
				if err := together(writers...); err != nil {
					t.Fatal(err)
				}
			})
			if got, limit := bytes+messages*messageCost, podBudget+runtime.NumCPU()*(size+messageCost); got > limit {
				t.Errorf("all at once: got messages unread that cost %d, want at most %d", got, limit)
			}
			readAll(t, all)
			uncharged(t)
			// Unread bytes would keep the node from being unloaded.
			closeBoth(t, all)
			uncharged(t)
		})
	}
}

// disconnect ends a connection by connecting to no address.
func disconnect(fd int) error {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere))
	if errno != 0 {
		return fmt.Errorf("connect to no address: %w", errno)
	}
	return nil
}

// TestUserTimeout: TCP_USER_TIMEOUT finds a reader that has stopped, as on TCP,
// once more is unread than the direction's limit.
func TestUserTimeout(t *testing.T) {
	n := mustNode(t, atOnce)
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustListenOn(t, pods[1])
	for _, tc := range []struct {
		name    string
		verdict rule.Verdict
	}{{"TCP", rule.Hold}, {"shortcut", rule.Allow}} {
		t.Run(tc.name, func(t *testing.T) {
			n.MustSetPolicy(t, sandbox.Between(tc.verdict, cookies...))
			c, s := connect(t, pods[0].Netns, l, "tcp4", address)
			sandboxtest.MustPing(t, c, s, 5, 100)
			if got := n.mustFlow(t).ToServer.Shortcut; got != (tc.verdict == rule.Allow) {
				t.Fatalf("got the shortcut %v", got)
			}
			control(t, c.(*net.TCPConn), func(fd int) error {
				return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 2000)
			})
			// The one that waits when it happens is told.
			err := together(
				func() error { return traffic{seed: 1, bytes: 7 << 20, maxWrite: 64 << 10}.write(c) },
				func() error {
					_, err := c.Read(make([]byte, 1))
					return err
				},
			)
			if !errors.Is(err, unix.ETIMEDOUT) {
				t.Errorf("got %v, want %v", err, unix.ETIMEDOUT)
			}
			n.closeAll(t, c, s)
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// traffic is one direction of a connection: bytes that only the seed decides,
// in pieces of random size.
type traffic struct {
	seed     byte
	bytes    int
	maxWrite int
	maxRead  int
	// pauseAfter makes the writer and the reader rest for up to 2 ms after so many bytes; 0 never.
	writerPause, readerPause int
}

// source yields the bytes of a direction, and random sizes from another seed.
func (s traffic) source() (*rand.ChaCha8, *rand.Rand) {
	return rand.NewChaCha8([32]byte{s.seed}), rand.New(rand.NewPCG(uint64(s.seed), 1))
}

func (s traffic) write(w io.Writer) error {
	content, sizes := s.source()
	buf := make([]byte, s.maxWrite)
	for sent, rest := 0, s.writerPause; sent < s.bytes; {
		n := min(1+sizes.IntN(s.maxWrite), s.bytes-sent)
		_, _ = content.Read(buf[:n]) // never fails
		if _, err := w.Write(buf[:n]); err != nil {
			return fmt.Errorf("write at %d: %w", sent, err)
		}
		sent += n
		if rest -= n; s.writerPause > 0 && rest <= 0 {
			time.Sleep(time.Duration(sizes.IntN(2000)) * time.Microsecond)
			rest = s.writerPause
		}
	}
	return nil
}

func (s traffic) read(r io.Reader) error {
	content, sizes := s.source()
	got, want := make([]byte, s.maxRead), make([]byte, s.maxRead)
	for received, rest := 0, s.readerPause; received < s.bytes; {
		n, err := r.Read(got[:min(1+sizes.IntN(s.maxRead), s.bytes-received)])
		if err != nil {
			return fmt.Errorf("read at %d: %w", received, err)
		}
		_, _ = content.Read(want[:n])
		if !bytes.Equal(got[:n], want[:n]) {
			i := 0
			for got[i] == want[i] {
				i++
			}
			return fmt.Errorf("byte %d differs", received+i)
		}
		received += n
		if rest -= n; s.readerPause > 0 && rest <= 0 {
			time.Sleep(time.Duration(sizes.IntN(2000)) * time.Microsecond)
			rest = s.readerPause
		}
	}
	return nil
}

// exchange runs both directions of a connection at once.
func exchange(a, b io.ReadWriter, toB, toA traffic) error {
	return together(
		func() error { return toB.write(a) }, func() error { return toB.read(b) },
		func() error { return toA.write(b) }, func() error { return toA.read(a) },
	)
}

// finish closes both ends' sending sides; each must then see the other's end of file.
func finish(a, b io.ReadWriter) error {
	return errors.Join(closeWrite(a), closeWrite(b), wantEOF(a), wantEOF(b))
}

func together(fs ...func() error) error {
	errs := make([]error, len(fs))
	var wg sync.WaitGroup
	for i, f := range fs {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func closeWrite(c io.Writer) error {
	if tcp, ok := c.(interface{ CloseWrite() error }); ok {
		return tcp.CloseWrite()
	}
	return nil
}

func wantEOF(r io.Reader) error {
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("after the last byte: got %d bytes and %v, want EOF", n, err)
	}
	return nil
}

// blocking puts a connection's socket into blocking mode, as programs in C use
// it: each read and write holds a thread in the kernel.
func blocking(tb testing.TB, c net.Conn) io.ReadWriter {
	tb.Helper()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	fd := int(f.Fd())
	timeout := unix.NsecToTimeval(deadline.Nanoseconds())
	if err := errors.Join(unix.SetNonblock(fd, false),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout)); err != nil {
		tb.Fatal(err)
	}
	return blockingSocket(fd)
}

type blockingSocket int

// call repeats what the Go runtime's own signals interrupt.
func (fd blockingSocket) call(f func(int, []byte) (int, error), p []byte) (int, error) {
	for {
		if n, err := f(int(fd), p); !errors.Is(err, unix.EINTR) {
			return max(n, 0), err
		}
	}
}

func (fd blockingSocket) Read(p []byte) (int, error) {
	n, err := fd.call(unix.Read, p)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (fd blockingSocket) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n, err := fd.call(unix.Write, p[sent:])
		sent += n
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

func (fd blockingSocket) CloseWrite() error { return unix.Shutdown(int(fd), unix.SHUT_WR) }

// mustListenOn listens on the pod's IPv4 address.
func mustListenOn(tb testing.TB, pod *sandbox.Pod) (net.Listener, netip.AddrPort) {
	tb.Helper()
	l := sandboxtest.MustListen(tb, pod, "tcp4", net.JoinHostPort(pod.IPv4.String(), "0"))
	return l, netip.AddrPortFrom(pod.IPv4, listenerPort(l))
}

// TestStreams: no byte is lost, changed or moved, whatever way each takes, and
// both ways are taken.
func TestStreams(t *testing.T) {
	const mib = 1 << 20
	// A writer that stays ahead of its reader stays on TCP for the rest of a round.
	// All has been read when the next begins, so that it takes the shortcut again.
	const rounds = 4
	// A large write reaches deliver in pieces of at most 17 times 32 KiB.
	n := mustTwoPods(t, func(c *datapath.Config) { c.Budget = 600 << 10 })

	for _, tc := range []struct {
		name        string
		connections int
		traffic     traffic
	}{
		{name: "256 MiB each way", connections: 1, traffic: traffic{bytes: 64 * mib, maxWrite: 100_000, maxRead: 150_000}},
		{name: "large messages", connections: 2, traffic: traffic{bytes: 16 * mib, maxWrite: 2 * mib, maxRead: 2 * mib}},
		{name: "small messages", connections: 4, traffic: traffic{bytes: mib, maxWrite: 300, maxRead: 5000}},
		{name: "slow readers", connections: 16, traffic: traffic{bytes: 4 * mib, maxWrite: 50_000, maxRead: 20_000, readerPause: 100_000}},
		{name: "slow writers", connections: 16, traffic: traffic{bytes: mib, maxWrite: 50_000, maxRead: 20_000, writerPause: 100_000}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := n.counts(t)
			var exchanges, ends []func() error
			for i := range tc.connections {
				c, s := n.connect(t)
				limit := time.Now().Add(2 * time.Minute)
				if err := errors.Join(c.SetDeadline(limit), s.SetDeadline(limit)); err != nil {
					t.Fatal(err)
				}
				toB, toA := tc.traffic, tc.traffic
				toB.seed, toA.seed = byte(2*i), byte(2*i+1)
				exchanges = append(exchanges, func() error {
					for range rounds {
						if err := exchange(c, s, toB, toA); err != nil {
							return fmt.Errorf("connection %d: %w", i, err)
						}
					}
					return nil
				})
				ends = append(ends, func() error { return finish(c, s) })
			}
			if err := together(exchanges...); err != nil {
				t.Fatal(err)
			}
			flows, err := n.Flows()
			if err != nil {
				t.Fatal(err)
			}
			var sum datapath.Direction
			for _, f := range flows {
				for _, d := range []datapath.Direction{f.ToServer, f.ToClient} {
					sum.ShortcutBytes += d.ShortcutBytes
					sum.TCPBytes += d.TCPBytes
					sum.Switches += d.Switches
				}
			}
			after := n.counts(t)
			for name := range after {
				after[name] -= before[name]
			}
			t.Logf("%d%% by shortcut, %d switches to it; %v", 100*sum.ShortcutBytes/(sum.ShortcutBytes+sum.TCPBytes), sum.Switches, after)
			if got, want := after["connection_paired"], uint64(tc.connections); got != want {
				t.Errorf("got %d connections paired, want %d", got, want)
			}
			if sum.ShortcutBytes == 0 {
				t.Error("nothing took the shortcut")
			}
			// The last write of each direction may not have met deliver in all its pieces.
			got, want, slack := sum.ShortcutBytes+sum.TCPBytes, uint64(2*tc.connections*rounds*tc.traffic.bytes), uint64(2*tc.connections*tc.traffic.maxWrite)
			if got > want || got+slack < want {
				t.Errorf("got %d bytes accounted for, want %d", got, want)
			}
			if tc.traffic.readerPause > 0 && (after["message_budget"] == 0 || int(sum.Switches) <= 2*tc.connections) {
				t.Errorf("got %d spills and %d switches to the shortcut, want both spill and resume", after["message_budget"], sum.Switches)
			}
			if err := together(ends...); err != nil {
				t.Error(err)
			}
		})
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
}

// TestBlocking: clients that sleep in write and read, with requests up to far
// more than TCP's buffers hold; a read must never return early with EAGAIN.
// Short exchanges are shortcut; a client with a large request leaves.
func TestBlocking(t *testing.T) {
	n := mustTwoPods(t, func(c *datapath.Config) { c.AllowBlocking = true })
	const connections, rounds = 20, 10
	for _, tc := range []struct {
		size      int
		wantStays bool
	}{{1, true}, {1000, true}, {300_000, false}, {1 << 20, false}, {8 << 20, false}} {
		t.Run(fmt.Sprint(tc.size), func(t *testing.T) {
			var ends []func() error
			for i := range connections {
				c, s := n.connect(t)
				socket := blocking(t, c)
				talk := func(end io.ReadWriter, isClient bool) func() error {
					return func() error {
						for round := range rounds {
							ask := traffic{seed: byte(i + round), bytes: tc.size, maxWrite: tc.size, maxRead: 200_000}
							answer := traffic{seed: byte(i + round + 100), bytes: 1000, maxWrite: 1000, maxRead: 1000}
							var err error
							if isClient {
								err = cmp.Or(ask.write(end), answer.read(end))
							} else {
								err = cmp.Or(ask.read(end), answer.write(end))
							}
							if err != nil {
								return fmt.Errorf("connection %d, round %d, client %v: %w", i, round, isClient, err)
							}
						}
						return nil
					}
				}
				ends = append(ends, onThread(talk(socket, true)), talk(s, false))
			}
			before := n.counts(t)
			if err := together(ends...); err != nil {
				t.Error(err)
			}
			after := n.counts(t)
			left, shortcut := after["socket_evicted"]-before["socket_evicted"], after["message_shortcut"]-before["message_shortcut"]
			t.Logf("%d of %d clients left, %d messages by shortcut", left, connections, shortcut)
			if tc.wantStays && (left != 0 || shortcut < connections*rounds) {
				t.Errorf("got %d clients left and %d messages by shortcut, want 0 and most", left, shortcut)
			}
			if !tc.wantStays && left < connections/2 { // a request of few small pieces may fit
				t.Errorf("got %d of %d clients left, want most", left, connections)
			}
		})
	}
}

// onThread gives f a thread of its own, which the Go runtime's signals do not
// wake: one that sleeps in recv would return EAGAIN.
func onThread(f func() error) func() error {
	return func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		urgent := unix.Sigset_t{Val: [16]uint64{1 << (unix.SIGURG - 1)}}
		if err := unix.PthreadSigmask(unix.SIG_BLOCK, &urgent, nil); err != nil {
			return err
		}
		return errors.Join(f(), unix.PthreadSigmask(unix.SIG_UNBLOCK, &urgent, nil))
	}
}

// TestBlockingKeptOut: unless it is asked for, no socket stays whose reads may
// sleep: a client's is not paired, and a server's leaves with its first message.
func TestBlockingKeptOut(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(t, pods[1])

	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, blocking(t, s), 20, 100)
	want := map[string]uint64{"connection_paired": 1, "socket_evicted": 1}
	got := n.counts(t)
	if diff := gocmp.Diff(want, map[string]uint64{"connection_paired": got["connection_paired"], "socket_evicted": got["socket_evicted"]}); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
	flows, err := n.Flows()
	if err != nil || len(flows) != 1 || !flows[0].ToClient.Evicted || flows[0].ToServer.ShortcutBytes != 0 {
		t.Errorf("got flows %+v, %v; want one whose server has left, with nothing by shortcut to it", flows, err)
	}

	// The port is known for it: the next connection is not paired, until another
	// program listens there.
	if got := n.counts(t); got["connection_paired"] != 1 {
		t.Errorf("got %v, want one connection paired", got)
	}
	c, s = connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 2, 100)
	if got := n.counts(t); got["connection_unsupported"] != 1 || got["connection_paired"] != 1 {
		t.Errorf("got %v, want connection_unsupported 1 and connection_paired still 1", got)
	}
	l.Close()
	l = sandboxtest.MustListen(t, pods[1], "tcp4", address.String())
	c, s = connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 2, 100)
	if got := n.counts(t); got["connection_unsupported"] != 1 || got["connection_paired"] != 2 {
		t.Errorf("after another listen: got %v, want connection_unsupported 1 and connection_paired 2", got)
	}

	var fd int
	err = pods[0].Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if got := n.counts(t); got["connection_blocking_client"] != 1 || got["connection_paired"] != 2 {
		t.Errorf("got %v, want connection_blocking_client 1 and connection_paired still 2", got)
	}
}

// TestShortConnections: 5,000 connections whose client sends immediately after
// connect, 16 at a time.
func TestShortConnections(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(t, pods[1])

	const connections, workers = 5000, 16
	var serve, work sync.WaitGroup
	serve.Go(func() {
		for {
			s, err := l.Accept()
			if err != nil {
				return
			}
			serve.Go(func() {
				defer s.Close()
				s.SetDeadline(time.Now().Add(deadline))
				if _, err := io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s}); err != nil { // without splice
					t.Errorf("server: %v", err)
				}
			})
		}
	})
	var next atomic.Int64
	for range workers {
		work.Go(func() {
			for i := next.Add(1); i <= connections; i = next.Add(1) {
				if err := shortConnection(pods[0].Netns, address, fmt.Appendf(nil, "message %d", i)); err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
			}
		})
	}
	work.Wait()
	l.Close()
	serve.Wait()
	counts := n.counts(t)
	t.Log(counts)
	if counts["connection_paired"] != connections || counts["message_peer_missing"] != 0 {
		t.Errorf("got %d connections paired, %d messages before that, want %d and 0", counts["connection_paired"], counts["message_peer_missing"], connections)
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
}

// shortConnection sends a message, half-closes, and wants it back and then the end.
func shortConnection(from *sandbox.Netns, address netip.AddrPort, message []byte) error {
	c, err := from.Dial("tcp4", address.String(), deadline)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(deadline))
	if _, err := c.Write(message); err != nil {
		return err
	}
	if err := closeWrite(c); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err == nil && !bytes.Equal(got, message) {
		err = fmt.Errorf("got %q, want %q", got, message)
	}
	return err
}

// TestPolicyFlips: the policy changes 1,000 times under streams, which go on
// byte for byte.
func TestPolicyFlips(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	verdicts := []rule.Verdict{rule.Allow, rule.Hold, rule.Allow, rule.Refuse}
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(t, pods[1])

	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		c, s := connect(t, pods[0].Netns, l, "tcp4", address)
		wg.Go(func() {
			// Round after round until all flips are done.
			for round := 0; !stop.Load(); round++ {
				down := traffic{seed: byte(i + round), bytes: 1 << 20, maxWrite: 30_000, maxRead: 40_000}
				up := traffic{seed: byte(i + round + 100), bytes: 1 << 20, maxWrite: 300, maxRead: 5000}
				if err := exchange(c, s, down, up); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	switches := func() (sum uint32) {
		flows, err := n.Flows()
		if err != nil || len(flows) != 4 {
			t.Fatalf("got %d flows (%v), want 4", len(flows), err)
		}
		for _, f := range flows {
			sum += f.ToServer.Switches + f.ToClient.Switches
		}
		return sum
	}
	// How many flips a stream notices depends on how often its reader catches up.
	for i := range 20_000 {
		if i >= 1000 && switches() >= 100 {
			break
		}
		n.MustSetPolicy(t, sandbox.Between(verdicts[i%len(verdicts)], cookies...))
		time.Sleep(500 * time.Microsecond)
	}
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	stop.Store(true)
	wg.Wait()
	counts := n.counts(t)
	t.Logf("%d switches to the shortcut; %v", switches(), counts)
	if switches() < 100 || counts["message_not_allowed"] == 0 || counts["message_shortcut"] == 0 {
		t.Errorf("got %d switches, %v; want hundreds of switches and messages both ways", switches(), counts)
	}
}

// ownMachine is for virtual machines, whose settings a test may change.
var ownMachine = flag.Bool("own-machine", false, "run also what changes settings of the whole machine")

// TestStalledReader: what a sender can write before it is stopped is bounded by
// what plain TCP takes and the budget, and all of it arrives.
func TestStalledReader(t *testing.T) {
	const budget = 256 << 10
	n := mustNode(t, func(c *datapath.Config) { c.Budget = budget })
	pods, cookies := n.MustEnrol(t, "client", "server")
	l, address := mustListenOn(t, pods[1])
	fill := func(verdict rule.Verdict) (accepted int) {
		n.MustSetPolicy(t, sandbox.Between(verdict, cookies...))
		c, s := connect(t, pods[0].Netns, l, "tcp4", address)
		sandboxtest.MustPing(t, c, s, 10, 100)
		accepted = writeUnread(t, c)
		readUnread(t, c, s, accepted)
		return accepted
	}
	plain := fill(rule.Refuse)
	before := n.counts(t)["message_budget"]
	shortcut := fill(rule.Allow)
	t.Logf("a stalled reader takes %d bytes on TCP, %d with the shortcut and a budget of %d", plain, shortcut, budget)
	if n.counts(t)["message_budget"] == before {
		t.Error("nothing was spilt to TCP")
	}
	// TCP's own share varies with the sizes of its buffers' growth.
	if limit := plain + plain/2 + budget; shortcut > limit {
		t.Errorf("got %d bytes accepted, want at most %d", shortcut, limit)
	}
	if *ownMachine {
		t.Run("TCP is short of memory", shortOfMemory)
	}
}

// shortOfMemory: a stalled reader that makes TCP exceed tcp_mem stops the sender
// as on TCP, and the shortcut goes on when there is memory again.
func shortOfMemory(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.Budget, c.PodBudget = 16<<20, 64<<20 })
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	// Other limits are far away.
	if err := pods[1].Sysctl("net.ipv4.tcp_rmem", "4096 131072 67108864"); err != nil {
		t.Fatal(err)
	}
	l, address := mustListenOn(t, pods[1])
	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	n.warmUp(t, c, s)
	n.grow(t, c, s)
	restore := mustLimitTCPMemory(t, 4<<20)
	before := n.counts(t)
	accepted := writeUnread(t, c)
	if got := n.since(t, before); got["message_memory"] == 0 || got["message_budget"] != 0 || got["message_redirect_refused"] != 0 {
		t.Errorf("got %v, want messages by TCP for want of memory alone", got)
	}
	restore()
	readUnread(t, c, s, accepted)
	// The server's direction is still open.
	for range 3 {
		if _, err := s.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if got := n.mustFlow(t).ToClient; !got.Shortcut {
		t.Errorf("got %+v, want the shortcut again", got)
	}
}

// mustLimitTCPMemory sets tcp_mem to room bytes more than TCP uses, and to
// twice and three times as much.
func mustLimitTCPMemory(t *testing.T, room int) (restore func()) {
	t.Helper()
	const path = "/proc/sys/net/ipv4/tcp_mem"
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	used := tcpMemory(t) / os.Getpagesize()
	pages := room / os.Getpagesize()
	limits := fmt.Sprint(used+pages, used+2*pages, used+3*pages)
	if err := os.WriteFile(path, []byte(limits), 0); err != nil {
		t.Fatal(err)
	}
	restore = func() {
		if err := os.WriteFile(path, old, 0); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(restore)
	return restore
}

// tcpMemory returns what TCP accounts for on this machine, in bytes.
func tcpMemory(tb testing.TB) int {
	tb.Helper()
	stat, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(stat)) {
		if _, mem, ok := strings.Cut(line, " mem "); ok && strings.HasPrefix(line, "TCP:") {
			pages, err := strconv.Atoi(strings.TrimSpace(mem))
			if err != nil {
				tb.Fatal(err)
			}
			return pages * os.Getpagesize()
		}
	}
	tb.Fatal("/proc/net/sockstat has no memory of TCP")
	return 0
}

// writeUnread writes until half a second passes in which nothing is accepted,
// and returns how much was.
func writeUnread(t *testing.T, c net.Conn) (accepted int) {
	t.Helper()
	content, _ := traffic{seed: 7}.source()
	buf := make([]byte, 16<<10)
	for {
		_, _ = content.Read(buf)
		if err := c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Write(buf)
		accepted += n
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return accepted
		}
		if err != nil || accepted > 256<<20 {
			t.Fatalf("after %d bytes: %v", accepted, err)
		}
	}
}

// readUnread reads what writeUnread has written. c writes no more: the reader
// has to see that nothing follows.
func readUnread(t *testing.T, c, s net.Conn, accepted int) {
	t.Helper()
	if err := closeWrite(c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join((traffic{seed: 7, bytes: accepted, maxRead: 100_000}).read(s), wantEOF(s)); err != nil {
		t.Fatal(err)
	}
}

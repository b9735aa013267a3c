// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"io"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// onTrial gives receivers the trial that the agent's defaults have.
func onTrial(c *datapath.Config) {
	c.TrialReads, c.TrialBytes = datapath.DefaultConfig().TrialReads, datapath.DefaultConfig().TrialBytes
}

// rawPair connects two sockets in non-blocking mode.
func rawPair(tb testing.TB, from *sandbox.Pod, l *rawSocket, to netip.AddrPort) (c, s *rawSocket) {
	tb.Helper()
	c = mustSocket(tb, from.Netns, unix.AF_INET, 0)
	c.mustConnect(tb, to)
	return c, l.mustAccept(tb)
}

// mustRawNode has two pods, and connect makes connections from one to the other, which may use
// the shortcut.
func mustRawNode(tb testing.TB, change func(*datapath.Config)) (n *node, connect func() (c, s *rawSocket)) {
	tb.Helper()
	n = mustNode(tb, change)
	pods, cookies := n.MustEnrol(tb, "client", "server")
	n.MustSetPolicy(tb, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(tb, pods[1].Netns, pods[1].IPv4)
	return n, func() (c, s *rawSocket) { return rawPair(tb, pods[0], l, address) }
}

// mustRawPair returns such a connection.
func mustRawPair(tb testing.TB, change func(*datapath.Config)) (n *node, c, s *rawSocket) {
	tb.Helper()
	n, connect := mustRawNode(tb, change)
	c, s = connect()
	return n, c, s
}

// mustNotDelay sets TCP_NODELAY: see TestPiggyback.
func mustNotDelay(tb testing.TB, sockets ...*rawSocket) {
	tb.Helper()
	for _, s := range sockets {
		if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			tb.Fatal(err)
		}
	}
}

// mustEnd closes both ends of the only flow, and waits until it is gone.
func (n *node) mustEnd(tb testing.TB, c, s *rawSocket) {
	tb.Helper()
	c.mustClose(tb)
	s.mustClose(tb)
	n.closeAll(tb)
}

// request sends messages in a row and wants them to be read before an answer of one byte is.
func request(tb testing.TB, c, s io.ReadWriter, messages ...int) {
	tb.Helper()
	total := 0
	for _, size := range messages {
		total += size
	}
	all := traffic{seed: byte(total), bytes: total, maxWrite: 1, maxRead: total}
	if err := together(func() error {
		content, _ := all.source()
		for _, size := range messages {
			p := make([]byte, size)
			_, _ = content.Read(p)
			if _, err := c.Write(p); err != nil {
				return err
			}
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}, func() error {
		if err := all.read(s); err != nil {
			return err
		}
		_, err := s.Write([]byte("."))
		return err
	}); err != nil {
		tb.Fatal(err)
	}
}

// toServer sends messages in a row, and returns what of them was redirected.
func (n *node) toServer(tb testing.TB, c, s io.ReadWriter, messages ...int) (redirected uint64) {
	tb.Helper()
	before := n.mustFlow(tb).ToServer.ShortcutBytes
	request(tb, c, s, messages...)
	return n.mustFlow(tb).ToServer.ShortcutBytes - before
}

// TestTrial: nothing is redirected to a receiver before it has taken enough reads
// from TCP, and no burst that is larger than those it has taken.
func TestTrial(t *testing.T) {
	n, c, s := mustRawPair(t, onTrial)
	reads, bulk := uint64(n.Config.TrialReads), uint64(n.Config.TrialBytes)
	mustNotDelay(t, c, s)

	const small = 100
	sandboxtest.MustPing(t, c, s, int(reads)+8, small)
	n.mustCount(t, nil, map[string]uint64{
		"connection_paired": 1, "message_not_seen": 2, "message_trial": 2 * (reads - 1), "message_shortcut": 2 * 8,
	})

	// Up to 4 KiB, one message of a size proves it.
	for _, size := range []int{small + 1, 1000, 4096} {
		for i, want := range []uint64{0, uint64(size), uint64(size)} {
			if got := n.toServer(t, c, s, size); got != want {
				t.Errorf("message %d of %d bytes: got %d redirected, want %d", i, size, got, want)
			}
		}
	}
	// Messages in a row are one burst: the first is as small as one before it.
	if got := n.toServer(t, c, s, 4000, 4000, 4000); got != 4000 {
		t.Errorf("three messages in a row: got %d bytes redirected, want those of the first, 4000", got)
	}
	// Above, it takes some bodies' worth, whatever their size is.
	for _, size := range []int{4097, 5000, 16 << 10, 32 << 10, 64 << 10} {
		if got := n.toServer(t, c, s, size); got != 0 {
			t.Errorf("first message of %d bytes: got %d redirected, want 0", size, got)
		}
		if got := n.toServer(t, c, s, 4096); got != 4096 {
			t.Errorf("4096 bytes after %d: got %d redirected, want all", size, got)
		}
	}
	before, taken := n.mustFlow(t).ToServer.TCPBytes, uint64(12000+4097+5000+(16+32+64)<<10)
	for n.toServer(t, c, s, 16<<10) == 0 {
		if taken += 16 << 10; taken > 2*bulk {
			t.Fatalf("got nothing redirected although %d bytes of large bursts were taken, want %d to do", taken, bulk)
		}
	}
	if taken < bulk {
		t.Errorf("got large bursts redirected after %d bytes of such (%d), want %d first", taken, n.mustFlow(t).ToServer.TCPBytes-before, bulk)
	}
	// 64 KiB stand for all sizes.
	if got := n.toServer(t, c, s, 100_000); got != 100_000 {
		t.Errorf("100000 bytes: got %d redirected, want all", got)
	}
	if got := n.mustFlow(t).ToClient; got.TCPBytes > reads*small || !got.Shortcut {
		t.Errorf("got %+v to the client, want it on the shortcut ever since its %d reads", got, reads)
	}
}

// TestTrialStream: a receiver of a stream that is never answered has its trial too.
func TestTrialStream(t *testing.T) {
	n, c, s := mustRawPair(t, onTrial)
	p := make([]byte, 8000)
	for range 200 {
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(s, p); err != nil {
			t.Fatal(err)
		}
	}
	got := n.mustFlow(t).ToServer
	if !got.Shortcut || got.TCPBytes < uint64(n.Config.TrialBytes) || got.TCPBytes > 2*uint64(n.Config.TrialBytes) {
		t.Errorf("got %+v, want %d bytes by TCP, less than twice that, and then the shortcut", got, n.Config.TrialBytes)
	}
}

// TestTrialIsLearned: what the receivers of a port have proved counts for later
// connections, of the server for all and of a client for its pod's, until another
// program listens or it is forgotten.
func TestTrialIsLearned(t *testing.T) {
	n := mustNode(t, onTrial)
	reads := uint64(n.Config.TrialReads)
	pods, cookies := n.MustEnrol(t, "client", "server", "neighbour")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	const rounds = 10
	talk := func(when string, from *sandbox.Pod, l *rawSocket, to netip.AddrPort, serverProved, clientProved bool) {
		t.Helper()
		before := n.counts(t)
		c, s := rawPair(t, from, l, to)
		mustNotDelay(t, c, s)
		sandboxtest.MustPing(t, c, s, rounds, 100)
		want := map[string]uint64{"connection_paired": 1, "message_not_seen": 2}
		for _, proved := range []bool{serverProved, clientProved} {
			if proved {
				want["message_shortcut"] += rounds - 1
			} else {
				want["message_trial"] += rounds - 1
			}
		}
		t.Log(when)
		n.mustCount(t, before, want)
		n.mustEnd(t, c, s)
	}
	prove := func(from *sandbox.Pod) {
		t.Helper()
		c, s := rawPair(t, from, l, address)
		sandboxtest.MustPing(t, c, s, int(reads)+2, 100)
		n.mustEnd(t, c, s)
	}
	talk("at first", pods[0], l, address, false, false)
	prove(pods[0])
	talk("after the trial", pods[0], l, address, true, true)
	talk("another client", pods[2], l, address, true, false)
	other, otherAddress := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	talk("another port", pods[0], other, otherAddress, false, false)

	if err := n.Datapath.Close(); err != nil {
		t.Fatal(err)
	}
	n.MustOpen(t)
	if err := n.Sweep(0); err != nil {
		t.Fatal(err)
	}
	talk("after a take-over", pods[0], l, address, true, true)

	// Another program, on the same port.
	l.mustClose(t)
	l = mustSocket(t, pods[1].Netns, unix.AF_INET, 0)
	l.mustListenOn(t, address)
	talk("after another listen", pods[0], l, address, false, true)
	prove(pods[0])
	talk("after its trial", pods[0], l, address, true, true)

	forgotten, err := n.Forget(func(server, _ uint64, port uint16) bool { return server == cookies[1] && port == address.Port() })
	if err != nil || forgotten != 0 {
		t.Errorf("got %d unsupported ports forgotten (%v), want none", forgotten, err)
	}
	talk("after it was forgotten", pods[0], l, address, false, false)
}

// TestTrialAddsUp: connections that end on trial have their trial together, so that those of a
// port whose connections are short get to the shortcut.
func TestTrialAddsUp(t *testing.T) {
	n := mustNode(t, onTrial)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	const rounds = 10
	connect := func(want string) {
		t.Helper()
		before := n.counts(t)
		c, s := rawPair(t, pods[0], l, address)
		mustNotDelay(t, c, s)
		sandboxtest.MustPing(t, c, s, rounds, 100)
		if want != "" {
			n.mustCount(t, before, map[string]uint64{"connection_paired": 1, "message_not_seen": 2, want: 2 * (rounds - 1)})
		}
		n.mustEnd(t, c, s)
	}
	connect("message_trial")
	for taken := rounds; taken < int(n.Config.TrialReads); taken += rounds {
		connect("")
	}
	connect("message_shortcut")
}

// TestTrialOfLargeBursts: a connection begins with what others have proved.
func TestTrialOfLargeBursts(t *testing.T) {
	n := mustNode(t, onTrial)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	tcpBytes := func(size int) uint64 {
		c, s := rawPair(t, pods[0], l, address)
		for range 64 {
			request(t, c, s, size)
		}
		got := n.mustFlow(t).ToServer
		n.mustEnd(t, c, s)
		if !got.Shortcut {
			t.Errorf("after 64 messages of %d bytes: got %+v, want the shortcut", size, got)
		}
		return got.TCPBytes
	}
	const size = 64 << 10
	first := tcpBytes(size)
	if want := uint64(n.Config.TrialBytes); first < want {
		t.Errorf("first connection: got %d bytes by TCP, want at least the %d of a trial", first, want)
	}
	if got := tcpBytes(size); got != size {
		t.Errorf("second connection: got %d bytes by TCP, want the first message alone, %d", got, size)
	}
}

// TestPiggyback: while requests go by TCP, as on trial, or as the first ones of a connection that has
// joined late do, answers to a client with Nagle's algorithm acknowledge them, though they could take
// the shortcut: else the next request would have to wait.
func TestPiggyback(t *testing.T) {
	for _, tc := range []struct {
		name    string
		noDelay bool
		late    bool
	}{
		{name: "on trial"},
		{name: "on trial, TCP_NODELAY", noDelay: true},
		{name: "joined late", late: true},
		{name: "joined late, TCP_NODELAY", late: true, noDelay: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.late && noWatch(t) {
				return
			}
			const reads = 32
			n, c, s := mustRawPair(t, func(c *datapath.Config) {
				atOnce(c)
				c.TrialReads = reads
				if tc.late {
					c.JoinAfter = joinAfter
				}
			})
			if tc.noDelay {
				mustNotDelay(t, c)
			}
			message := make([]byte, 100)
			pass := func(from, to *rawSocket) {
				if _, err := from.Write(message); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(to, message); err != nil {
					t.Fatal(err)
				}
			}
			ask := func() {
				pass(c, s)
				pass(s, c)
			}
			if tc.late {
				for range joinAfter { // from now on the server delays acknowledgements
					ask()
				}
				n.joinWatched(t)
				waitUntil(t, "the connection to join", func() bool {
					pass(s, c)
					return n.counts(t)["connection_paired"] == 1
				})
			} else {
				pass(c, s)
			}
			for range reads { // the client has proved itself, the server has read little
				pass(s, c)
			}
			before := n.counts(t)
			for i := range 10 {
				ask()
				info, err := unix.GetsockoptTCPInfo(c.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
				if err != nil {
					t.Fatal(err)
				}
				if !tc.noDelay && info.Unacked != 0 {
					t.Errorf("request %d: it is not acknowledged when its answer has come", i)
				}
			}
			got := n.since(t, before)
			if (got["message_piggyback"] == 0) != tc.noDelay || (got["message_shortcut"] == 0) == tc.noDelay {
				t.Errorf("got %v, want answers by TCP unless the client has TCP_NODELAY", got)
			}
			for range reads {
				ask()
			}
			n.mustBeShortcut(t, c, s)
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
		})
	}
}

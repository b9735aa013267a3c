// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// spliceNode has the guard against splice, and a connection of two sockets.
func spliceNode(tb testing.TB) (n *node, c, s *rawSocket, connect func() (c, s *rawSocket)) {
	tb.Helper()
	n, connect = mustRawNode(tb, nil)
	c, s = connect()
	return n, c, s, connect
}

func mustPipe(tb testing.TB) (read, write int) {
	tb.Helper()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = errors.Join(unix.Close(pipe[0]), unix.Close(pipe[1])) })
	return pipe[0], pipe[1]
}

// mustBeUnsupported wants the port known for splice, and what is sent from now on by TCP.
func (n *node) mustBeUnsupported(tb testing.TB, c, s *rawSocket, connect func() (c, s *rawSocket)) {
	tb.Helper()
	if got := n.unsupported(tb); len(got) != 1 || !slices.Equal(got[0].Reasons, []string{"splice"}) {
		tb.Errorf("got unsupported ports %+v, want the port for splice", got)
	}
	before := n.counts(tb)
	mustWrite(tb, c, "later")
	mustRead(tb, s, "later")
	if got := n.since(tb, before); got["message_unsupported"] != 1 {
		tb.Errorf("got %v, want the next message by TCP as unsupported", got)
	}
	before = n.counts(tb)
	connect()
	n.mustCount(tb, before, map[string]uint64{"connection_unsupported": 1})
}

// TestSpliceOfTCPBytes: splice works while all that is unread came by TCP.
func TestSpliceOfTCPBytes(t *testing.T) {
	if hazard(t, "no-trampolines") {
		t.Log("no trampolines here, so NO guard: TestGuards has the refusal")
		return
	}
	n, c, s, connect := spliceNode(t)
	r, w := mustPipe(t)
	mustWrite(t, c, "hello") // by TCP: s has not been seen to read
	if err := s.wait(unix.POLLIN); err != nil {
		t.Fatal(err)
	}
	if got, err := unix.Splice(s.fd, nil, w, nil, 5, unix.SPLICE_F_NONBLOCK); got != 5 {
		t.Errorf("splice gives %d (%v), want 5", got, err)
	}
	p := make([]byte, 5)
	if _, err := unix.Read(r, p); err != nil || string(p) != "hello" {
		t.Errorf("got %q (%v) through the pipe", p, err)
	}
	n.mustBeUnsupported(t, c, s, connect)
}

// TestSendfileFromSocket: sendfile from a socket to a pipe puts the direction on
// TCP and makes the port unsupported. What was redirected before stays for recv.
func TestSendfileFromSocket(t *testing.T) {
	if hazard(t, "no-trampolines") {
		t.Log("no trampolines here, so NO guard: TestGuards has the refusal")
		return
	}
	n, c, s, connect := spliceNode(t)
	r, w := mustPipe(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	mustWrite(t, c, "hello") // redirected
	if err := s.wait(unix.POLLIN); err != nil {
		t.Fatal(err)
	}
	// Too late to refuse: it sees nothing.
	if got, err := unix.Sendfile(w, s.fd, nil, 5); got > 0 || err == nil && got != 0 {
		t.Errorf("sendfile of redirected bytes gives %d (%v), want nothing", got, err)
	}
	mustRead(t, s, "hello")
	n.mustBeUnsupported(t, c, s, connect)
	mustWrite(t, c, "world")
	if err := s.wait(unix.POLLIN); err != nil {
		t.Fatal(err)
	}
	if got, err := unix.Sendfile(w, s.fd, nil, 5); got != 5 {
		t.Errorf("sendfile gives %d (%v), want 5", got, err)
	}
	p := make([]byte, 5)
	if _, err := unix.Read(r, p); err != nil || string(p) != "world" {
		t.Errorf("got %q (%v) through the pipe", p, err)
	}
}

// TestSpliceMarkStays: where the kernel has not run the program that ends a splice,
// what is known of the task harms no later read of another socket.
func TestSpliceMarkStays(t *testing.T) {
	if hazard(t, "no-trampolines") {
		t.Log("no trampolines here, so NO guard: TestGuards has the refusal")
		return
	}
	n, c, s, connect := spliceNode(t)
	c2, s2 := connect()
	for range 5 {
		sandboxtest.MustPing(t, c, s, 1, 100)
		sandboxtest.MustPing(t, c2, s2, 1, 100)
	}
	if err := n.DropGuardLink(datapath.GuardSplice, bpf.GuardProgSpliceEnds); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, c, "hello") // redirected
	mustWrite(t, c2, "other")
	if err := errors.Join(s.wait(unix.POLLIN), s2.wait(unix.POLLIN)); err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The kernel refuses this itself, before it asks whether the file may be read.
	if _, err := unix.Splice(s.fd, nil, int(null.Fd()), nil, 5, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("splice without a pipe: got %v, want EINVAL", err)
	}
	p := make([]byte, 5)
	if got, err := unix.Read(s2.fd, p); got != 5 || string(p) != "other" {
		t.Errorf("read of another socket gives %d, %q (%v), want 5 bytes", got, p, err)
	}
	// The mark is of this one, and is used up.
	if _, err := unix.Read(s.fd, p); !errors.Is(err, unix.EINVAL) {
		t.Errorf("read of the socket itself: got %v, want EINVAL: no mark has stayed, so the test shows nothing", err)
	}
	if got, err := unix.Read(s.fd, p); got != 5 || string(p) != "hello" {
		t.Errorf("next read of the socket itself gives %d, %q (%v)", got, p, err)
	}
}

// TestNoReads: recv from the error queue, and of an urgent byte, take nothing from
// the stream, so that what is unread stays known.
func TestNoReads(t *testing.T) {
	unread := func(t *testing.T, n *node, want uint64) {
		t.Helper()
		if got := n.mustFlow(t).ToServer; got.Unread != want {
			t.Errorf("got direction %+v, want %d bytes unread", got, want)
		}
	}
	start := func(t *testing.T) (n *node, cookies []uint64, c, s *rawSocket) {
		n = mustNode(t, nil)
		pods, cookies := n.MustEnrol(t, "client", "server")
		n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
		l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
		c, s = rawPair(t, pods[0], l, address)
		return n, cookies, c, s
	}
	t.Run("MSG_ERRQUEUE", func(t *testing.T) {
		n, _, c, s := start(t)
		const stamps = unix.SOF_TIMESTAMPING_TX_SOFTWARE | unix.SOF_TIMESTAMPING_SOFTWARE
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPING, stamps); err != nil {
			t.Fatal(err)
		}
		sandboxtest.MustPing(t, c, s, 5, 100)
		mustWrite(t, c, "hello") // redirected
		if err := s.wait(unix.POLLERR); err != nil {
			t.Fatal(err)
		}
		unread(t, n, 5)
		size, _, _, _, err := unix.Recvmsg(s.fd, make([]byte, 1000), make([]byte, 500), unix.MSG_ERRQUEUE)
		if err != nil || size <= 5 {
			t.Fatalf("got %d bytes from the error queue (%v), want those of a packet", size, err)
		}
		unread(t, n, 5)
		if got := n.mustFlow(t).ToServer; !got.Redirected {
			t.Errorf("got %+v, want redirected bytes unread", got)
		}
		mustRead(t, s, "hello")
		unread(t, n, 0)
	})
	t.Run("MSG_OOB", func(t *testing.T) {
		n, cookies, c, s := start(t)
		sandboxtest.MustPing(t, c, s, 5, 100)
		n.MustSetPolicy(t, sandbox.Between(rule.Hold, cookies...))
		if err := unix.Sendto(c.fd, []byte("!"), unix.MSG_OOB, nil); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, c, "hello")
		if err := s.wait(unix.POLLPRI); err != nil {
			t.Fatal(err)
		}
		unread(t, n, 6)
		p := make([]byte, 10)
		if size, _, err := unix.Recvfrom(s.fd, p, unix.MSG_OOB); size != 1 || p[0] != '!' {
			t.Fatalf("recv of the urgent byte gives %d, %q (%v)", size, p, err)
		}
		unread(t, n, 6)
		mustRead(t, s, "hello")
		unread(t, n, 1) // the urgent byte is in no read of the stream
	})
}

// TestSpliceBesideSends: once splice has taken bytes it goes on, whatever the sender is
// at. Go's io.Copy takes a refusal in the middle for the end of the connection.
func TestSpliceBesideSends(t *testing.T) {
	if hazard(t, "no-trampolines") {
		t.Log("no trampolines here, so NO guard: TestGuards has the refusal")
		return
	}
	n, c, s, connect := spliceNode(t)
	r, w := mustPipe(t)
	const size, messages = 100, 100_000
	want := bytes.Repeat([]byte{'x'}, size)
	sent := make(chan error, 1)
	go func() {
		for range messages {
			if _, err := c.Write(want); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	// Each splice finds the sender at another place of its work.
	got := make([]byte, size)
	for total := 0; total < size*messages; {
		if err := s.wait(unix.POLLIN); err != nil {
			t.Fatalf("wait after %d bytes: %v", total, err)
		}
		taken, err := unix.Splice(s.fd, nil, w, nil, size, unix.SPLICE_F_NONBLOCK)
		if err != nil {
			t.Fatalf("splice after %d bytes: %v", total, err)
		}
		if taken == 0 {
			t.Fatalf("the stream ends after %d bytes", total)
		}
		if k, err := unix.Read(r, got[:taken]); int64(k) != taken || !bytes.Equal(got[:k], want[:k]) {
			t.Fatalf("got %q (%v) through the pipe after %d bytes", got[:max(k, 0)], err, total)
		}
		total += int(taken)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	n.mustBeUnsupported(t, c, s, connect)
}

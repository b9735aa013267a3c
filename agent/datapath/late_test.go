// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// lateReader is a server that takes heads and small bodies by recv, and the rest
// of a body that is larger in a way of its own. The connection is in non-blocking
// mode and watched by an edge-triggered epoll, as in event loops.
type lateReader struct {
	s     *rawSocket
	epoll int
	pipe  [2]int
}

func mustLateReader(tb testing.TB, s *rawSocket) *lateReader {
	tb.Helper()
	r := &lateReader{s: s, epoll: mustWatchEdges(tb, s.fd)}
	if err := unix.Pipe2(r.pipe[:], unix.O_CLOEXEC); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(r.pipe[0]); unix.Close(r.pipe[1]) })
	return r
}

// errStalls is what a program does that waits for ever.
var errStalls = errors.New("it stalls")

// await waits for the next edge.
func (r *lateReader) await() error {
	events := make([]unix.EpollEvent, 1)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		n, err := unix.EpollWait(r.epoll, events, 1000)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
	return errStalls
}

// fill reads p whole by recv.
func (r *lateReader) fill(p []byte) error {
	for got := 0; got < len(p); {
		n, _, err := unix.Recvfrom(r.s.fd, p[got:], 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if err := r.await(); err != nil {
				return err
			}
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errors.New("the end")
		}
		got += max(n, 0)
	}
	return nil
}

// bySplice is HAProxy's HTTP multiplexer: once it splices it goes on so, and does
// not read instead if that fails.
func (r *lateReader) bySplice(p []byte) error {
	for got := 0; got < len(p); {
		n, err := unix.Splice(r.s.fd, nil, r.pipe[1], nil, min(len(p)-got, 32<<10), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if err := r.await(); err != nil {
				return err
			}
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("splice: %w: %w", err, errStalls)
		case n == 0:
			return errors.New("splice: the end")
		}
		for end := got + int(n); got < end; {
			n, err := unix.Read(r.pipe[0], p[got:end])
			if err != nil {
				return err
			}
			got += n
		}
	}
	return nil
}

// byFIONREAD is nginx: after a recv that has filled its buffer it asks how much
// there is, and reads on when the next edge comes if that is nothing.
func (r *lateReader) byFIONREAD(p []byte) error {
	const buffer = 4096
	for got := 0; got < len(p); {
		n, _, err := unix.Recvfrom(r.s.fd, p[got:min(len(p), got+buffer)], 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			n = 0
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return errors.New("the end")
		}
		got += max(n, 0)
		if got == len(p) {
			return nil
		}
		if n == buffer {
			if n, err = unix.IoctlGetInt(r.s.fd, unix.TIOCINQ); err != nil { // FIONREAD by another name
				return err
			}
		}
		if n <= 0 {
			if err := r.await(); err != nil {
				return fmt.Errorf("after %d of %d bytes: %w", got, len(p), err)
			}
		}
	}
	return nil
}

// byLowat is told when so much is there. It may be told too early.
func (r *lateReader) byLowat(p []byte) error {
	for got := 0; got < len(p); {
		want := min(len(p)-got, 20_000)
		if err := unix.SetsockoptInt(r.s.fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, want); err != nil {
			return err
		}
		if err := r.s.wait(unix.POLLIN); err != nil {
			return fmt.Errorf("%w: %w", err, errStalls)
		}
		n, _, err := unix.Recvfrom(r.s.fd, p[got:got+want], 0)
		if n <= 0 && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("recv gives %d (%w)", n, err)
		}
		got += max(n, 0)
	}
	return unix.SetsockoptInt(r.s.fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1)
}

// byWaitall reads with one call, in blocking mode.
func (r *lateReader) byWaitall(p []byte) error {
	if err := unix.SetNonblock(r.s.fd, false); err != nil {
		return err
	}
	timeout := unix.NsecToTimeval(deadline.Nanoseconds())
	if err := unix.SetsockoptTimeval(r.s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	n, _, err := unix.Recvfrom(r.s.fd, p, unix.MSG_WAITALL)
	if n != len(p) {
		return fmt.Errorf("recv of %d bytes with MSG_WAITALL gives %d (%w)", len(p), n, err)
	}
	return unix.SetNonblock(r.s.fd, true)
}

// smallBody is up to where a body is read by recv.
const smallBody = 4096

// serve answers each request with its sum.
func (r *lateReader) serve(late func(*lateReader, []byte) error, requests int) error {
	for i := range requests {
		head := make([]byte, 4)
		if err := r.fill(head); err != nil {
			return fmt.Errorf("head of request %d: %w", i, err)
		}
		body := make([]byte, binary.BigEndian.Uint32(head))
		if len(body) <= smallBody {
			if err := r.fill(body); err != nil {
				return fmt.Errorf("request %d: %w", i, err)
			}
		} else {
			// What came with the head.
			if err := r.fill(body[:1000]); err != nil {
				return fmt.Errorf("request %d: %w", i, err)
			}
			if err := late(r, body[1000:]); err != nil {
				return fmt.Errorf("request %d of %d bytes: %w", i, len(body), err)
			}
		}
		if _, err := r.s.Write(digest(body)); err != nil {
			return err
		}
	}
	return nil
}

func digest(p []byte) []byte {
	var sum uint64
	for i, b := range p {
		sum = sum*31 + uint64(b) + uint64(i)
	}
	return binary.BigEndian.AppendUint64(nil, sum)
}

// TestLate: a program that has read by recv so far, and takes its first large body
// by splice, FIONREAD, SO_RCVLOWAT or MSG_WAITALL, gets it as on TCP; so do its
// later connections.
func TestLate(t *testing.T) {
	var guards []string
	if !hazard(t, "no-trampolines") {
		guards = []string{datapath.GuardSplice, datapath.GuardFlags}
		if hazard(t, "fionread-redirected") {
			guards = append(guards, datapath.GuardFIONREAD)
		}
	}
	for _, tc := range []struct {
		name   string
		late   func(*lateReader, []byte) error
		reason string
	}{
		{"splice", (*lateReader).bySplice, "splice"},
		{"FIONREAD", (*lateReader).byFIONREAD, "FIONREAD"},
		{"SO_RCVLOWAT", (*lateReader).byLowat, "SO_RCVLOWAT"},
		{"MSG_WAITALL", (*lateReader).byWaitall, "MSG_WAITALL"},
	} {
		if tc.reason == "FIONREAD" && hazard(t, "fionread-tcp") {
			t.Log("FIONREAD counts not even TCP's bytes here, with or without us: it is NOT tried")
			continue
		}
		for _, small := range []int{1, 100} {
			t.Run(fmt.Sprintf("%s after %d small requests", tc.name, small), func(t *testing.T) {
				misses := sandboxtest.MustMisses(t)
				n := mustNode(t, func(c *datapath.Config) {
					onTrial(c)
					c.Guards = guards
					c.AllowBlocking = true
				})
				pods, cookies := n.MustEnrol(t, "client", "server")
				n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
				l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
				sizes := make([]int, small)
				for i := range sizes {
					sizes[i] = 1 + i*i%smallBody
				}
				sizes = append(sizes, 20_000, 300_000, 20, 300_000, 5000)
				for connection := range 3 {
					c, s := rawPair(t, pods[0], l, address)
					r := mustLateReader(t, s)
					if err := together(onThread(func() error {
						return r.serve(tc.late, len(sizes))
					}), func() error {
						content := rand.NewChaCha8([32]byte{byte(connection)})
						for i, size := range sizes {
							message := make([]byte, 4+size)
							binary.BigEndian.PutUint32(message, uint32(size))
							_, _ = content.Read(message[4:]) // never fails
							if _, err := c.Write(message); err != nil {
								return err
							}
							answer := make([]byte, 8)
							if _, err := io.ReadFull(c, answer); err != nil {
								return fmt.Errorf("answer %d: %w", i, err)
							}
							if !bytes.Equal(answer, digest(message[4:])) {
								return fmt.Errorf("request %d arrives with other bytes", i)
							}
						}
						return nil
					}); err != nil {
						flows, _ := n.Flows()
						t.Fatalf("connection %d: %v; flows %+v", connection, err, flows)
					}
					c.mustClose(t)
					s.mustClose(t)
					n.closeAll(t)
				}
				counts := n.counts(t)
				t.Log(counts, n.unsupported(t))
				// Without a guard that sees splice, a read that was missed means TCP for good.
				if small > 32 && counts["message_shortcut"] < 60 && (len(guards) > 0 || sandboxtest.MustMisses(t) == misses) {
					t.Errorf("got %v, want the small requests on the shortcut", counts)
				}
			})
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// loadTimeout is the deadline of every connection of a load.
const loadTimeout = 2 * time.Minute

// load is traffic that goes on until finish. An error of any connection fails
// the test there.
type load struct {
	ctx     context.Context
	cancel  context.CancelFunc
	group   errgroup.Group
	streams []*stream
	short   atomic.Int64 // connections that were made, used and closed
}

func newLoad(t testing.TB) *load {
	l := &load{}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	t.Cleanup(func() {
		l.cancel()
		_ = l.group.Wait() // finish has told
	})
	return l
}

// finish ends the traffic: what was sent must have come, to the byte.
func (l *load) finish(t testing.TB) {
	t.Helper()
	l.cancel()
	if err := l.group.Wait(); err != nil {
		t.Error(err)
	}
	for _, s := range l.streams {
		for name, w := range map[string]*way{"to server": &s.toServer, "to client": &s.toClient} {
			if got, want := w.received.Load(), w.sent.Load(); got != want || got == 0 {
				t.Errorf("%s %s: got %d bytes of %d", s.origDst, name, got, want)
			}
		}
		s.client.Close()
		s.server.Close()
	}
	t.Logf("%d streams of %d bytes, %d short connections", len(l.streams), l.received(), l.short.Load())
}

// received counts the bytes of all streams so far.
func (l *load) received() (n int64) {
	for _, s := range l.streams {
		n += s.toServer.received.Load() + s.toClient.received.Load()
	}
	return n
}

// way is one direction of a stream: bytes that only the seed decides.
type way struct {
	seed           uint64
	sent, received atomic.Int64
}

func (w *way) content() *rand.ChaCha8 { return rand.NewChaCha8([32]byte{byte(w.seed)}) }

func (w *way) write(ctx context.Context, c net.Conn) error {
	content, sizes := w.content(), rand.New(rand.NewPCG(w.seed, 1))
	buf := make([]byte, 32<<10)
	for ctx.Err() == nil {
		b := buf[:1+sizes.IntN(len(buf))]
		_, _ = content.Read(b) // never fails
		n, err := c.Write(b)
		w.sent.Add(int64(n))
		if err != nil {
			return err
		}
		// Leaves the processors to the agent, and lets the receiver catch up.
		time.Sleep(time.Duration(sizes.IntN(2000)) * time.Microsecond)
	}
	return c.(*net.TCPConn).CloseWrite()
}

func (w *way) read(c net.Conn) error {
	content := w.content()
	got, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := c.Read(got)
		_, _ = content.Read(want[:n])
		if !bytes.Equal(got[:n], want[:n]) {
			return fmt.Errorf("wrong bytes between %d and %d", w.received.Load(), w.received.Load()+int64(n))
		}
		w.received.Add(int64(n))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// stream is a connection with traffic both ways at once.
type stream struct {
	client, server     net.Conn
	origDst            netip.AddrPort
	toServer, toClient way
}

// endpoint is an address that leads to a listener.
type endpoint struct {
	netip.AddrPort
	listener net.Listener
}

// connect returns both ends of a connection.
func connect(from *sandbox.Pod, to endpoint) (client, server net.Conn, err error) {
	deadline := time.Now().Add(loadTimeout)
	if client, err = from.Dial("tcp", to.String(), loadTimeout); err != nil {
		return nil, nil, err
	}
	if err = to.listener.(*net.TCPListener).SetDeadline(deadline); err == nil {
		server, err = to.listener.Accept()
	}
	if err != nil {
		return nil, nil, errors.Join(err, client.Close())
	}
	if err := errors.Join(client.SetDeadline(deadline), server.SetDeadline(deadline)); err != nil {
		return nil, nil, errors.Join(err, client.Close(), server.Close())
	}
	return client, server, nil
}

// mustStream starts traffic on a new connection.
func (l *load) mustStream(t testing.TB, from *sandbox.Pod, to endpoint) *stream {
	t.Helper()
	s := &stream{origDst: to.AddrPort}
	var err error
	if s.client, s.server, err = connect(from, to); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = s.client.Close(), s.server.Close() }) // after a failure; finish closes them
	s.toServer.seed, s.toClient.seed = uint64(2*len(l.streams)), uint64(2*len(l.streams)+1)
	l.streams = append(l.streams, s)
	for name, run := range map[string]func() error{
		"write to server": func() error { return s.toServer.write(l.ctx, s.client) },
		"read at server":  func() error { return s.toServer.read(s.server) },
		"write to client": func() error { return s.toClient.write(l.ctx, s.server) },
		"read at client":  func() error { return s.toClient.read(s.client) },
	} {
		l.group.Go(func() error {
			if err := run(); err != nil {
				return fmt.Errorf("stream to %s: %s: %w", to, name, err)
			}
			return nil
		})
	}
	return s
}

// flow returns what the agent shows of a stream.
func (s *stream) flow(t testing.TB, flows []api.Flow) api.Flow {
	t.Helper()
	var found []api.Flow
	for _, f := range flows {
		if f.Client.Address.String() == s.client.LocalAddr().String() && f.OrigDst == s.origDst {
			found = append(found, f)
		}
	}
	if len(found) != 1 {
		t.Fatalf("got %d flows for the stream to %s: %+v", len(found), s.origDst, found)
	}
	return found[0]
}

// churn makes short connections to the endpoints in turn.
func (l *load) churn(from *sandbox.Pod, to ...endpoint) {
	l.group.Go(func() error {
		for i := 0; l.ctx.Err() == nil; i++ {
			if err := short(from, to[i%len(to)], i); err != nil {
				return fmt.Errorf("short connection %d to %s: %w", i, to[i%len(to)], err)
			}
			l.short.Add(1)
			time.Sleep(time.Millisecond)
		}
		return nil
	})
}

// short makes a connection, sends messages both ways and closes it.
func short(from *sandbox.Pod, to endpoint, seed int) error {
	client, server, err := connect(from, to)
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	random := rand.New(rand.NewPCG(uint64(seed), 2))
	for range 3 {
		for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
			want := make([]byte, 1+random.IntN(8<<10)) // fits into any socket buffer
			for i := range want {
				want[i] = byte(random.Uint32())
			}
			got := make([]byte, len(want))
			if _, err := way[0].Write(want); err != nil {
				return err
			}
			if _, err := io.ReadFull(way[1], got); err != nil {
				return err
			}
			if !bytes.Equal(got, want) {
				return errors.New("wrong bytes")
			}
		}
	}
	first, last := client, server
	if seed%2 == 1 {
		first, last = server, client
	}
	if err := first.Close(); err != nil {
		return err
	}
	if n, err := last.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last byte: got %d bytes and %v, want EOF", n, err)
	}
	return last.Close()
}

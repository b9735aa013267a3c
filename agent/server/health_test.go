// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// broken is a metric that cannot be read.
type broken struct{ *prometheus.Desc }

func (b broken) Describe(descs chan<- *prometheus.Desc) { descs <- b.Desc }
func (b broken) Collect(metrics chan<- prometheus.Metric) {
	metrics <- prometheus.NewInvalidMetric(b.Desc, errors.New("gone"))
}

// started is a server that runs until the test ends.
type started struct {
	address string
	client  http.Client
}

func mustServeTCP(t testing.TB, l net.Listener, serve func(context.Context, net.Listener) error) *started {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, l) }()
	s := &started{address: l.Addr().String(), client: http.Client{Timeout: patience}}
	t.Cleanup(func() {
		cancel()
		s.client.CloseIdleConnections()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("serve: %v", err)
			}
		case <-time.After(patience):
			t.Error("serve does not return")
		}
	})
	return s
}

// patience is how long anything may take that does not hang.
const patience = 2 * time.Minute

func mustListenTCP(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (s *started) want(t testing.TB, path string, code int, text string) {
	t.Helper()
	resp, err := s.client.Get("http://" + s.address + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != code || !strings.Contains(string(body), text) {
		t.Errorf("%s: got %d %q, want %d and %q", path, resp.StatusCode, body, code, text)
	}
}

func newMetrics() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	good := prometheus.NewCounter(prometheus.CounterOpts{Name: "good_total", Help: "A good one."})
	registry.MustRegister(good, broken{prometheus.NewDesc("broken", "One that cannot be read.", nil, nil)})
	return registry
}

func mustServeMetrics(t testing.TB, l net.Listener) *started {
	t.Helper()
	return mustServeTCP(t, l, func(ctx context.Context, l net.Listener) error {
		return ServeMetrics(ctx, l, newMetrics(), slog.New(slog.DiscardHandler))
	})
}

// mustServeHealth serves what is asked of alive and ready, which may be changed.
func mustServeHealth(t testing.TB, alive, ready *atomic.Pointer[error]) *started {
	t.Helper()
	check := func(p *atomic.Pointer[error]) func() error {
		return func() error {
			if err := p.Load(); err != nil {
				return *err
			}
			return nil
		}
	}
	return mustServeTCP(t, mustListenTCP(t), func(ctx context.Context, l net.Listener) error {
		return ServeHealth(ctx, l, check(alive), check(ready), slog.New(slog.DiscardHandler))
	})
}

func TestServeHealth(t *testing.T) {
	var alive, ready atomic.Pointer[error]
	s := mustServeHealth(t, &alive, &ready)
	s.want(t, "/healthz", 200, "ok")
	s.want(t, "/readyz", 200, "ok")
	unloaded := errors.New("unloaded")
	ready.Store(&unloaded)
	s.want(t, "/healthz", 200, "ok")
	s.want(t, "/readyz", 503, "unloaded")
	hangs := errors.New("hangs")
	alive.Store(&hangs)
	s.want(t, "/healthz", 503, "hangs")
	s.want(t, "/metrics", 404, "") // nobody's scrape keeps a probe waiting
}

func TestServeMetrics(t *testing.T) {
	s := mustServeMetrics(t, mustListenTCP(t))
	s.want(t, "/metrics", 200, "good_total 0")
	s.want(t, "/metrics", 200, "promhttp_metric_handler_errors_total")
	s.want(t, "/healthz", 404, "")
	s.want(t, "/v1/unload", 404, "") // what changes anything is on the socket alone
}

// counted counts the connections that are open at a time.
type counted struct {
	net.Listener
	now, most, accepted atomic.Int64
}

func (c *counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.accepted.Add(1)
	now := c.now.Add(1)
	for most := c.most.Load(); now > most && !c.most.CompareAndSwap(most, now); most = c.most.Load() {
	}
	return &countedConn{Conn: conn, closed: sync.OnceFunc(func() { c.now.Add(-1) })}, nil
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

// TestHostileClients: 300 clients never finish a header, some of them send a
// megabyte of it and others next to nothing. The server reads no more of it than a
// header may have, drops them all, and answers probes and metrics.
func TestHostileClients(t *testing.T) {
	const clients, megabyte = 300, 1 << 20
	var alive, ready atomic.Pointer[error]
	health := mustServeHealth(t, &alive, &ready)
	l := &counted{Listener: mustListenTCP(t)}
	metrics := mustServeMetrics(t, l)

	var dropped sync.WaitGroup
	var taken atomic.Int64 // bytes that the clients have got rid of
	for i := range clients {
		conn, err := net.Dial("tcp", metrics.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		// Small buffers, so that what is sent shows what the server has read.
		if err := conn.(*net.TCPConn).SetWriteBuffer(4 << 10); err != nil {
			t.Fatal(err)
		}
		dropped.Go(func() {
			header := "GET /metrics HTTP/1.1\r\nX: "
			if i%8 != 0 {
				header += strings.Repeat("a", megabyte)
			}
			n, err := io.WriteString(conn, header)
			taken.Add(int64(n))
			if err == nil {
				// What is left to be read is an answer such as 431.
				_, err = io.Copy(io.Discard, conn)
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("client %d was not dropped after %v", i, patience)
			}
		})
	}
	for l.accepted.Load() < clients/2 && !t.Failed() {
		health.want(t, "/healthz", 200, "ok")
	}
	dropped.Wait()
	metrics.want(t, "/metrics", 200, "good_total 0")
	if got := l.most.Load(); got > maxConnections {
		t.Errorf("got %d connections at a time, want %d at most", got, maxConnections)
	}
	if got, want := taken.Load()/clients, int64(megabyte/2); got > want {
		t.Errorf("got %d bytes of a header taken from each client, want less than %d", got, want)
	}
}

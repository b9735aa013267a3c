// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
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

func TestServeHealth(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	good := prometheus.NewCounter(prometheus.CounterOpts{Name: "good_total", Help: "A good one."})
	registry.MustRegister(good, broken{prometheus.NewDesc("broken", "One that cannot be read.", nil, nil)})
	var unready atomic.Bool
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- ServeHealth(ctx, l, registry, func() error {
			if unready.Load() {
				return errors.New("unloaded")
			}
			return nil
		}, slog.New(slog.DiscardHandler))
	}()
	client := http.Client{Timeout: 5 * time.Second}
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := client.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	want := func(path string, code int, text string) {
		t.Helper()
		if gotCode, got := get(path); gotCode != code || !strings.Contains(got, text) {
			t.Errorf("%s: got %d %q, want %d and %q", path, gotCode, got, code, text)
		}
	}
	want("/healthz", 200, "ok")
	want("/readyz", 200, "ok")
	want("/metrics", 200, "good_total 0")
	unready.Store(true)
	want("/healthz", 200, "ok")
	want("/readyz", 503, "unloaded")
	want("/metrics", 200, "promhttp_metric_handler_errors_total")
	want("/v1/unload", 404, "") // what changes anything is on the socket alone

	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("ServeHealth: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("ServeHealth does not return")
	}
}

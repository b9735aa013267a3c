// SPDX-License-Identifier: Apache-2.0

// Health and metrics over TCP.

package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

const (
	// maxConnections bounds the connections that a TCP port serves at a time.
	// Others wait in the kernel, where they cost the agent nothing.
	maxConnections = 32
	// maxHeader bounds a request's header; net/http adds 4 KiB to it.
	maxHeader = 8 << 10
)

// ServeHealth answers probes on l until ctx ends, and closes l. /healthz fails while
// alive returns an error, /readyz while ready does.
func ServeHealth(ctx context.Context, l net.Listener, alive, ready func() error, log *slog.Logger) error {
	mux := http.NewServeMux()
	for path, check := range map[string]func() error{"/healthz": alive, "/readyz": ready} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			if err := check(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		})
	}
	return serveTCP(ctx, l, mux, log)
}

// ServeMetrics serves /metrics on l until ctx ends, and closes l. A metric that
// cannot be read does not hide the others.
func ServeMetrics(ctx context.Context, l net.Listener, metrics *prometheus.Registry, log *slog.Logger) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError,
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		Registry:      metrics, // also gets the handler's own error counter
		// The port is open to the node's network, so only this many requests
		// run at a time.
		MaxRequestsInFlight: 2,
		Timeout:             10 * time.Second,
	}))
	return serveTCP(ctx, l, mux, log)
}

// serveTCP serves whoever reaches l. It bounds the memory of a connection, and
// closes connections that send nothing.
func serveTCP(ctx context.Context, l net.Listener, handler http.Handler, log *slog.Logger) error {
	return serve(ctx, netutil.LimitListener(l, maxConnections), &http.Server{
		Handler:           handler,
		MaxHeaderBytes:    maxHeader,
		ReadHeaderTimeout: 2 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       10 * time.Second,
	}, log)
}

// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podshunt/podshunt/api"
)

// fixed are counters that do not come from a kernel.
type fixed struct {
	outcomes []api.Outcome
	maps     []api.MapUsage
	err      error
}

func (f fixed) Outcomes() ([]api.Outcome, error) { return f.outcomes, f.err }
func (f fixed) Maps() ([]api.MapUsage, error)    { return f.maps, f.err }

// asked counts how often maps are counted, which takes its time.
type asked struct {
	fixed
	maps atomic.Int64
}

func (a *asked) Maps() ([]api.MapUsage, error) {
	a.maps.Add(1)
	time.Sleep(time.Second)
	return a.fixed.Maps()
}

// TestMapsAreCountedSeldom: many askers at once cost as much as one.
func TestMapsAreCountedSeldom(t *testing.T) {
	a := &asked{fixed: fixed{outcomes: []api.Outcome{{Kind: "socket", Code: "evicted"}}, maps: []api.MapUsage{{Name: "pods", Entries: 2, Max: 1024}}}}
	c := newCollector(a)
	start := time.Now()
	var askers sync.WaitGroup
	for range 20 {
		askers.Go(func() {
			if got := testutil.CollectAndCount(c, "podshunt_map_entries"); got != 1 {
				t.Errorf("got %d metrics, want 1", got)
			}
		})
	}
	askers.Wait()
	// One for each ten seconds that this has taken, and the first.
	if got, most := a.maps.Load(), 1+int64(time.Since(start)/(10*time.Second)); got > most {
		t.Errorf("maps were counted %d times, want %d at most", got, most)
	}
}

func TestCollector(t *testing.T) {
	c := newCollector(fixed{
		outcomes: []api.Outcome{
			{Kind: "message", Code: "shortcut", Count: 3, Bytes: 300},
			{Kind: "message", Code: "not_seen", Count: 1, Bytes: 10},
			{Kind: "connection", Code: "paired", Count: 2},
			{Kind: "socket", Code: "evicted", Count: 1},
		},
		maps: []api.MapUsage{{Name: "pods", Entries: 2, Max: 1024}},
	})
	want := `
# HELP podshunt_connections_total Connections of enrolled pods, by what became of them: paired, or the reason why not.
# TYPE podshunt_connections_total counter
podshunt_connections_total{outcome="paired"} 2
# HELP podshunt_map_entries Entries of a kernel map.
# TYPE podshunt_map_entries gauge
podshunt_map_entries{map="pods"} 2
# HELP podshunt_map_max_entries Size of a kernel map. What does not fit stays on TCP.
# TYPE podshunt_map_max_entries gauge
podshunt_map_max_entries{map="pods"} 1024
# HELP podshunt_message_bytes_total Bytes of the messages of podshunt_messages_total.
# TYPE podshunt_message_bytes_total counter
podshunt_message_bytes_total{outcome="not_seen"} 10
podshunt_message_bytes_total{outcome="shortcut"} 300
# HELP podshunt_messages_total Messages that senders of paired connections wrote, by the way they went: shortcut, or the reason for TCP.
# TYPE podshunt_messages_total counter
podshunt_messages_total{outcome="not_seen"} 1
podshunt_messages_total{outcome="shortcut"} 3
# HELP podshunt_sockets_total Sockets of paired connections that met the outcome before they were closed.
# TYPE podshunt_sockets_total counter
podshunt_sockets_total{outcome="evicted"} 1
`
	if err := testutil.CollectAndCompare(c, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}

// TestCollectorNames: every outcome of the kernel has a metric, and Prometheus' linter accepts all.
func TestCollectorNames(t *testing.T) {
	var all fixed
	for _, o := range outcomes() {
		all.outcomes = append(all.outcomes, api.Outcome{Kind: o.kind, Code: o.code, Count: 1})
	}
	all.maps = []api.MapUsage{{Name: "pods"}}
	problems, err := testutil.CollectAndLint(newCollector(all))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestCollectorErrors(t *testing.T) {
	for _, tc := range []struct {
		name string
		counters
	}{
		{"unreadable", fixed{err: errors.New("gone")}},
		{"unknown outcome", fixed{outcomes: []api.Outcome{{Kind: "packet", Code: "lost"}}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			registry := prometheus.NewPedanticRegistry()
			if err := registry.Register(newCollector(tc.counters)); err != nil {
				t.Fatal(err)
			}
			if _, err := registry.Gather(); err == nil {
				t.Error("got no error")
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

// The counters of the programs, and how full the maps are, for Prometheus.

package datapath

import (
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podshunt/podshunt/api"
)

// counters is the part of a Datapath that a collector reads.
type counters interface {
	Outcomes() ([]api.Outcome, error)
	Maps() ([]api.MapUsage, error)
}

// collector exports the kernel's counters to Prometheus.
type collector struct {
	counters
	messages, bytes, connections, sockets *prometheus.Desc
	mapEntries, mapMax                    *prometheus.Desc

	// The last result of Maps is used until this time, because Maps has to count
	// entries.
	mu       sync.Mutex
	maps     []api.MapUsage
	mapsErr  error
	mapsNext time.Time
}

// NewCollector returns a collector of d's counters and of how full its maps are. The
// counters start at zero when the kernel objects are created, not when an agent
// starts. After an unload it exports nothing.
func NewCollector(d *Datapath) prometheus.Collector { return newCollector(d) }

func newCollector(c counters) *collector {
	return &collector{
		counters: c,
		messages: prometheus.NewDesc("podshunt_messages_total",
			"Messages that senders of paired connections wrote, by the way they went: shortcut, or the reason for TCP.", []string{"outcome"}, nil),
		bytes: prometheus.NewDesc("podshunt_message_bytes_total",
			"Bytes of the messages of podshunt_messages_total.", []string{"outcome"}, nil),
		connections: prometheus.NewDesc("podshunt_connections_total",
			"Connections of enrolled pods, by what became of them: paired, or the reason why not.", []string{"outcome"}, nil),
		sockets: prometheus.NewDesc("podshunt_sockets_total",
			"Sockets of paired connections that met the outcome before they were closed.", []string{"outcome"}, nil),
		mapEntries: prometheus.NewDesc("podshunt_map_entries",
			"Entries of a kernel map.", []string{"map"}, nil),
		mapMax: prometheus.NewDesc("podshunt_map_max_entries",
			"Size of a kernel map. What does not fit stays on TCP.", []string{"map"}, nil),
	}
}

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.messages, c.bytes, c.connections, c.sockets, c.mapEntries, c.mapMax} {
		descs <- d
	}
}

func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	outcomes, err := c.Outcomes()
	if err != nil {
		metrics <- prometheus.NewInvalidMetric(c.messages, err)
	}
	for _, o := range outcomes {
		counter := func(desc *prometheus.Desc, value uint64) {
			metrics <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), o.Code)
		}
		switch o.Kind {
		case api.OutcomeMessage:
			counter(c.messages, o.Count)
			counter(c.bytes, o.Bytes)
		case api.OutcomeConnection:
			counter(c.connections, o.Count)
		case api.OutcomeSocket:
			counter(c.sockets, o.Count)
		default:
			metrics <- prometheus.NewInvalidMetric(c.messages, fmt.Errorf("outcome %s counts something that has no metric", o))
		}
	}
	if err == nil && len(outcomes) == 0 {
		return // nothing is loaded any more, whatever was counted a moment ago
	}
	maps, err := c.countedMaps()
	if err != nil {
		metrics <- prometheus.NewInvalidMetric(c.mapEntries, err)
	}
	for _, m := range maps {
		metrics <- prometheus.MustNewConstMetric(c.mapEntries, prometheus.GaugeValue, float64(m.Entries), m.Name)
		metrics <- prometheus.MustNewConstMetric(c.mapMax, prometheus.GaugeValue, float64(m.Max), m.Name)
	}
}

// countedMaps returns the result of Maps, which may be a little old: it calls Maps
// at most once a second, and spends at most a tenth of the time on it.
func (c *collector) countedMaps() ([]api.MapUsage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if start := time.Now(); !start.Before(c.mapsNext) {
		c.maps, c.mapsErr = c.Maps()
		end := time.Now()
		c.mapsNext = end.Add(max(time.Second, 9*end.Sub(start)))
	}
	return c.maps, c.mapsErr
}

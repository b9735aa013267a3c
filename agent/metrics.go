// SPDX-License-Identifier: Apache-2.0

// Metrics for Prometheus.

package main

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

// newMetrics returns the metrics of an agent. fixed has the parts of its status that
// do not change.
func newMetrics(d *datapath.Datapath, fixed api.Status, snapshot func() pods.Snapshot, unloaded func() bool, lease func() *api.Lease) *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		datapath.NewCollector(d),
		newStatusCollector(fixed, snapshot, unloaded, lease),
	)
	return registry
}

// statusCollector exports what `podshunt-agent status` shows to Prometheus, except
// the counters, which datapath.NewCollector exports.
type statusCollector struct {
	fixed    api.Status
	snapshot func() pods.Snapshot
	unloaded func() bool
	lease    func() *api.Lease

	info, pods, hazard, accepted, sourceError, policyError, isUnloaded, leaseLeft *prometheus.Desc
}

func newStatusCollector(fixed api.Status, snapshot func() pods.Snapshot, unloaded func() bool, lease func() *api.Lease) *statusCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("podshunt_"+name, help, labels, nil)
	}
	return &statusCollector{
		fixed: fixed, snapshot: snapshot, unloaded: unloaded, lease: lease,
		info:        desc("build_info", "Always 1; the labels say what runs here.", "version", "go_version", "kernel", "observer"),
		pods:        desc("pods", "Pods of this node that the agent knows, by state.", "state"),
		hazard:      desc("kernel_hazard", "Whether this kernel has the hazard: it does something differently on the shortcut than on TCP.", "hazard", "fatal"),
		accepted:    desc("kernel_hazards_accepted", "How many hazards this kernel has that are accepted, so that programs break (--accept-hazards)."),
		sourceError: desc("source_error", "Whether the source of what pods ask for cannot be read: the last known state stays in force."),
		policyError: desc("policy_error", "Whether the kernel's map of policies is incomplete: what is missing stays on TCP."),
		leaseLeft:   desc("policy_lease_seconds", "For how many seconds the policy in the kernel is still trusted; below 0 all connections go by TCP. Absent if it is trusted for ever."),
		isUnloaded:  desc("unloaded", "Whether podshunt was unloaded: nothing is shortcut until the agent is started again."),
	}
}

func (c *statusCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.info, c.pods, c.hazard, c.accepted, c.sourceError, c.policyError, c.isUnloaded, c.leaseLeft} {
		descs <- d
	}
}

func (c *statusCollector) Collect(metrics chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	snapshot := c.snapshot()
	gauge(c.info, 1, c.fixed.Version, runtime.Version(), c.fixed.Kernel, c.fixed.Observer)
	for state, number := range countPods(snapshot.Pods) {
		gauge(c.pods, float64(number), string(state))
	}
	for _, h := range c.fixed.Hazards {
		fatal := "false"
		if h.Fatal {
			fatal = "true"
		}
		gauge(c.hazard, number(h.Present), h.Name, fatal)
	}
	gauge(c.accepted, float64(len(acceptedHazards(c.fixed.Hazards, c.fixed.AcceptedHazards))))
	gauge(c.sourceError, number(snapshot.SourceError != nil))
	gauge(c.policyError, number(snapshot.PolicyError != nil))
	gauge(c.isUnloaded, number(c.unloaded()))
	if l := c.lease(); l != nil {
		gauge(c.leaseLeft, time.Until(l.Until).Seconds())
	}
}

// countPods counts each pod once, however many interfaces it has.
func countPods(all []pods.Pod) map[api.PodState]int {
	counts := map[api.PodState]int{}
	for _, state := range api.PodStates() {
		counts[state] = 0
	}
	counted := map[api.PodRef]bool{}
	for _, p := range all {
		if !counted[p.Pod] {
			counted[p.Pod] = true
			counts[p.State]++
		}
	}
	return counts
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// measured wraps server.Attachments and measures how long requests take.
type measured struct {
	server.Attachments
	seconds *prometheus.HistogramVec
}

// measure makes a histogram of how long the plugin's requests take.
func measure(attachments server.Attachments, registry prometheus.Registerer) measured {
	m := measured{attachments, prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "podshunt_plugin_request_duration_seconds",
		Help:    "How long requests of the CNI plugin took in the agent. A pod starts without the agent after the plugin's time-out.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .2, .5, 1},
	}, []string{"request", "result"})}
	registry.MustRegister(m.seconds)
	return m
}

func (m measured) observe(request string, start time.Time, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.seconds.WithLabelValues(request, result).Observe(time.Since(start).Seconds())
}

func (m measured) Put(a api.Attachment) (api.Admission, error) {
	start := time.Now()
	admission, err := m.Attachments.Put(a)
	m.observe("add", start, err)
	return admission, err
}

func (m measured) Remove(id api.AttachmentID) error {
	start := time.Now()
	err := m.Attachments.Remove(id)
	m.observe("del", start, err)
	return err
}

func (m measured) Collect(req api.GCRequest) error {
	start := time.Now()
	err := m.Attachments.Collect(req)
	m.observe("gc", start, err)
	return err
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"runtime"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

func TestStatusMetrics(t *testing.T) {
	pod := func(name string, state api.PodState) pods.Pod {
		return pods.Pod{PodStatus: api.PodStatus{Pod: api.PodRef{Namespace: "default", Name: name}, State: state}}
	}
	snapshot := pods.Snapshot{
		Pods: []pods.Pod{
			pod("two-interfaces", api.PodEnrolled), pod("two-interfaces", api.PodEnrolled), pod("refused", api.PodRefused), pod("out", api.PodOut),
		},
		PolicyError: errors.New("map full"),
	}
	c := newStatusCollector(api.Status{
		Version: "v1", Kernel: "6.18", Observer: "fexit",
		Hazards:         []api.Hazard{{Name: "splice", Present: true, Fatal: true}, {Name: "waitall"}, {Name: "blocking-recv", Present: true}},
		AcceptedHazards: []string{"fionread-tcp", "splice", "blocking-recv"},
	}, func() pods.Snapshot { return snapshot }, func() bool { return false }, func() *api.Lease { return nil })
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(c); err != nil {
		t.Fatal(err)
	}
	want := map[string]float64{
		"podshunt_build_info " + runtime.Version() + " 6.18 fexit v1": 1,
		"podshunt_kernel_hazard false waitall":                        0,
		"podshunt_kernel_hazard true splice":                          1,
		"podshunt_kernel_hazards_accepted":                            2,
		"podshunt_kernel_hazard false blocking-recv":                  1,
		"podshunt_pods enrolled":                                      1,
		"podshunt_pods held":                                          0,
		"podshunt_pods out":                                           1,
		"podshunt_pods refused":                                       1,
		"podshunt_pods waiting":                                       0,
		"podshunt_pods wanted":                                        0,
		"podshunt_policy_error":                                       1,
		"podshunt_source_error":                                       0,
		"podshunt_unloaded":                                           0,
	}
	wantDiff(t, "metrics", want, mustGather(t, registry))
}

// mustGather returns the values of gauges and the counts of histograms by name
// and the values of labels, in the order of the labels' names.
func mustGather(t testing.TB, registry prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, family := range families {
		for _, metric := range family.Metric {
			name := family.GetName()
			for _, l := range metric.Label {
				name += " " + l.GetValue()
			}
			values[name] = metric.GetGauge().GetValue() + float64(metric.GetHistogram().GetSampleCount())
		}
	}
	return values
}

// attachments answers with err.
type attachments struct{ err error }

var _ server.Attachments = attachments{}

func (a attachments) Put(api.Attachment) (api.Admission, error) { return api.Admission{}, a.err }
func (a attachments) Remove(api.AttachmentID) error             { return a.err }
func (a attachments) Collect(api.GCRequest) error               { return a.err }

func TestMeasure(t *testing.T) {
	registry := prometheus.NewRegistry()
	m := measure(attachments{}, registry)
	if _, err := m.Put(api.Attachment{}); err != nil {
		t.Error(err)
	}
	m.Attachments = attachments{errors.New("no")}
	if err := errors.Join(m.Remove(api.AttachmentID{}), m.Collect(api.GCRequest{})); err == nil {
		t.Error("got no error")
	}
	const name = "podshunt_plugin_request_duration_seconds "
	want := map[string]float64{name + "add ok": 1, name + "del error": 1, name + "gc error": 1}
	wantDiff(t, "requests", want, mustGather(t, registry))
}

// TestMetricNames: Prometheus' linter accepts what the agent has besides the datapath's.
func TestMetricNames(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newStatusCollector(api.Status{Hazards: []api.Hazard{{Name: "splice"}}},
		func() pods.Snapshot { return pods.Snapshot{} }, func() bool { return false }, func() *api.Lease { return &api.Lease{} }))
	if _, err := measure(attachments{}, registry).Put(api.Attachment{}); err != nil {
		t.Error(err)
	}
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

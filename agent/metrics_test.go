// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

func TestStatusMetrics(t *testing.T) {
	pod := func(name string, enrolled bool, problem pods.Problem) pods.Pod {
		return pods.Pod{PodStatus: api.PodStatus{Pod: api.PodRef{Namespace: "default", Name: name}, Enrolled: enrolled}, Problem: problem}
	}
	snapshot := pods.Snapshot{
		Pods:        []pods.Pod{pod("two-interfaces", true, ""), pod("two-interfaces", true, ""), pod("refused", false, pods.HostNetwork), pod("out", false, "")},
		PolicyError: errors.New("map full"),
	}
	c := newStatusCollector(api.Status{
		Version: "v1", Kernel: "6.18", Observer: "fexit",
		Hazards: []api.Hazard{{Name: "splice", Present: true, Fatal: true}, {Name: "waitall"}},
	}, func() pods.Snapshot { return snapshot }, func() bool { return false })
	want := `
podshunt_build_info{go_version="` + runtime.Version() + `",kernel="6.18",observer="fexit",version="v1"} 1
podshunt_kernel_hazard{fatal="false",hazard="waitall"} 0
podshunt_kernel_hazard{fatal="true",hazard="splice"} 1
podshunt_kernel_hazards_accepted 0
podshunt_pods{state="not_opted_in"} 1
podshunt_pods{state="refused"} 1
podshunt_pods{state="takes_part"} 1
podshunt_policy_error 1
podshunt_source_error 0
podshunt_unloaded 0
`
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(c); err != nil {
		t.Fatal(err)
	}
	text, err := testutil.CollectAndFormat(c, "text/plain; version=0.0.4")
	if err != nil {
		t.Fatal(err)
	}
	var samples []string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "#") {
			samples = append(samples, line)
		}
	}
	wantDiff(t, "metrics", want, "\n"+strings.Join(samples, ""))
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
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, metric := range families[0].Metric {
		labels := []string{}
		for _, l := range metric.Label {
			labels = append(labels, l.GetValue())
		}
		got[strings.Join(labels, " ")] = metric.Histogram.GetSampleCount()
	}
	wantDiff(t, "requests", map[string]uint64{"add ok": 1, "del error": 1, "gc error": 1}, got)
}

// TestMetricNames: Prometheus' linter accepts what the agent has besides the datapath's.
func TestMetricNames(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newStatusCollector(api.Status{Hazards: []api.Hazard{{Name: "splice"}}},
		func() pods.Snapshot { return pods.Snapshot{} }, func() bool { return false }))
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

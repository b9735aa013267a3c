// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sampleOf(round int, rate, p99 float64) sample {
	return sample{
		reading: reading{requests: 1000, rate: rate, latency: latency{p99 / 2, p99, 0}}, round: round,
		cpu: map[side]float64{server: 12, client: 9.5}, softirq: 3,
	}
}

// TestReport: from the first table on.
func TestReport(t *testing.T) {
	redis := &line{workload: workload{name: "redis GET"}, variants: []variant{tcp, shortcut, unixSocket}, samples: map[variant][]sample{
		tcp:        {sampleOf(0, 40000, 1900), sampleOf(1, 42000, 2000), sampleOf(2, 20000, 900)},
		unixSocket: {sampleOf(0, 80000, 700), sampleOf(1, 80000, 700), sampleOf(2, 80000, 700)},
	}}
	for i, rate := range []float64{80000, 21000, 40000} { // the second round has the worse mode
		s := sampleOf(i, rate, []float64{800, 10100, 840}[i])
		s.cpu, s.softirq, s.share = map[side]float64{server: 6, client: 5, proxy: 0}, 0, 0.9994
		redis.samples[shortcut] = append(redis.samples[shortcut], s)
	}
	iperf3 := &line{workload: workload{name: "iperf3", gbits: true}, variants: []variant{tcp, shortcut}, samples: map[variant][]sample{
		tcp: {{reading: reading{rate: 12.14}, cpu: map[side]float64{server: 1200, client: 300, proxy: 40}}},
	}, failures: []string{"shortcut: no request:\n | 0.00"}}
	b := &bench{settings: settings{rounds: 3, seconds: 2, programs: regexp.MustCompile("redis|iperf3")}, measured: []string{"redis 7.0.15", "iperf3 3.12"}, missing: map[string]error{"sockperf": errors.New("not found")}, noWatch: errors.New("refused")}
	var out bytes.Buffer
	parts := []part{{placement{name: "Not pinned"}, []*line{redis, iperf3}}}
	if err := b.report(&out, []string{"-programs", "redis|iperf3"}, parts, 61*time.Second); err != nil {
		t.Fatal(err)
	}
	head, tables, _ := strings.Cut(out.String(), "\n### ")
	if !strings.HasPrefix(head, partial+"\n## Real programs\n") {
		t.Errorf("got no mark of a run of some lines in:\n%s", head)
	}
	for _, want := range []string{
		"\n| command | `make bench-apps BENCH_ARGS=\"-programs 'redis\\|iperf3'\"` |\n", "| kernel | ", "| CPU | ", "| date | ", "3 rounds of 2 seconds", "\n| programs | redis 7.0.15, iperf3 3.12 |\n", "handshake (refused)",
	} {
		if !strings.Contains(head, want) {
			t.Errorf("got no %q in:\n%s", want, head)
		}
	}
	want := `Not pinned

|  | TCP | shortcut | ratio to TCP | p99 TCP | p99 shortcut | CPU | by shortcut | Unix socket | shortcut to Unix |
| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
| redis GET | 40.0 k/s (20.0–42.0) | 40.0 k/s (21.0–80.0) | **2.00** (0.50) | 1.90 ms (2.00 ms) | 840 µs (10.10 ms) | 21.5 µs → 11.0 µs (−49 %) | 99.9 % | 80.0 k/s (80.0–80.0) | **0.50** (0.26) |
| iperf3 | 12.1 Gbit/s (12.1–12.1) | - | - | - | - | - | - | - | - |

### Not pinned: all percentiles, and the sides

|  |  | p50 | p99 | p99.9 | CPU: server + client; softirq |
| --- | --- | --: | --: | --: | --: |
| redis GET | TCP | 950 µs (1.00 ms) | 1.90 ms (2.00 ms) | - | 12.0 µs + 9.5 µs; 3.0 µs |
|  | shortcut | 420 µs (5.05 ms) | 840 µs (10.10 ms) | - | 6.0 µs + 5.0 µs; 0 µs |
|  | Unix socket | 350 µs (350 µs) | 700 µs (700 µs) | - | 12.0 µs + 9.5 µs; 3.0 µs |
| iperf3 | TCP | - | - | - | 1.20 ms + 40.0 µs + 300 µs; 0 µs |
|  | shortcut | - | - | - | - |

### Not measured

A program that stalls with the shortcut alone meets a [hazard](limits.md) of the kernel, all of which are accepted here.

- sockperf: not found
- iperf3, not pinned: shortcut: no request: | 0.00

The run took 61 s.
`
	if diff := cmp.Diff(want, tables); diff != "" {
		t.Errorf("tables (-want +got):\n%s", diff)
	}
}

// TestRatios: only rounds that have both are compared.
func TestRatios(t *testing.T) {
	got := ratios([]sample{sampleOf(0, 30, 1), sampleOf(2, 60, 1)}, []sample{sampleOf(1, 10, 1), sampleOf(2, 20, 1)})
	if diff := cmp.Diff([]float64{3}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

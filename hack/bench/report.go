// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/measure"
)

// none fills the cell of what was not measured.
const none = "–"

func (r row) name() string {
	switch {
	case r.kind == measure.Connect:
		return "connections"
	case r.size < 1<<10:
		return fmt.Sprintf("%s %d B", r.kind, r.size)
	}
	return fmt.Sprintf("%s %d KiB", r.kind, r.size>>10)
}

// median of what get takes from each sample; 0 for none.
func median(samples []sample, get func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = get(s)
	}
	slices.Sort(values)
	n := len(values)
	if n == 0 {
		return 0
	}
	return (values[(n-1)/2] + values[n/2]) / 2
}

// ratio is the median of the ratios of each round: what happens to the machine
// over time then concerns both sides alike.
func ratio(samples, base []sample) string {
	if len(samples) == 0 {
		return none
	}
	ratios := make([]sample, len(samples))
	for i := range samples {
		ratios[i].Rate = samples[i].Rate / base[i].Rate
	}
	return fmt.Sprintf("%.2f", median(ratios, rate))
}

func rate(s sample) float64 { return s.Rate }

// value is the median in the unit of the row.
func (r row) value(samples []sample) string {
	microseconds := func(get func(sample) time.Duration) float64 {
		return median(samples, func(s sample) float64 { return float64(get(s)) / 1e3 })
	}
	switch r.kind {
	case measure.PingPong:
		return fmt.Sprintf("%.2f (%.1f) µs", microseconds(func(s sample) time.Duration { return s.P50 }),
			microseconds(func(s sample) time.Duration { return s.P99 }))
	case measure.Stream:
		return fmt.Sprintf("%.2f Gbit/s", median(samples, rate)*8/1e9)
	}
	return fmt.Sprintf("%.0f /s", median(samples, rate))
}

func writeHeader(w io.Writer, observer string, args []string, s settings) error {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return fmt.Errorf("read the kernel's release: %w", err)
	}
	sockets := "non-blocking and waited for by poll(2) in streams, waiting inside of read(2) in the others"
	if s.nonBlocking {
		sockets = "non-blocking and waited for by poll(2)"
	}
	cpu, err := cpuModel()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, `# Measurements

| | |
| --- | --- |
| date | %s |
| kernel | %s |
| CPU | %s |
| command | %s |
| tcp_rmem and congestion control of the pods | %s, %s |

Two pods on one bridge, wired by the CNI plugins bridge and host-local. Each value is the median of %d rounds
of %v; the variants take turns within a round. A ratio is the median of the rounds' ratios, and above 1 is faster.

- **ping-pong**: a message there and back; median (99th percentile) of the round trips.
- **stream**: messages one way, read with a buffer of 256 KiB; without TCP_NODELAY.
- **connections**: connect, one byte each way, close; one after the other. TIME_WAIT is off in the pods.
- **TCP**: from a cgroup without programs of podshunt. **shortcut**: both pods enrolled; **bytes by shortcut** is the
  part of the bytes sent that took it. **peer not enrolled**: TCP between an enrolled client and a server that is not,
  against TCP; for connections, the reverse (only the server enrolled) follows the slash.
- Sockets are %s.
- The receive observer (here: %s) is attached to the whole machine, so it also runs for TCP and the unix socket; the
  last table shows what that costs.
`, time.Now().Format("2006-01-02"), unix.ByteSliceToString(uname.Release[:]), cpu,
		"`"+strings.TrimSpace("hack/bench "+strings.Join(args, " "))+"`", receiveBuffer, measure.Congestion, s.rounds, s.duration, sockets, observer)
	return nil
}

func cpuModel() (string, error) {
	info, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	defer info.Close()
	lines := bufio.NewScanner(info)
	for lines.Scan() {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value), nil
		}
	}
	return "not in /proc/cpuinfo", lines.Err() // arm64 has numbers there only
}

func writeResults(w io.Writer, p placement, rows []row, results map[row]table) {
	fmt.Fprintf(w, "\n## %s\n\n", p.name)
	line(w, "", "TCP", "shortcut", "ratio to TCP", "bytes by shortcut", "unix socket", "shortcut to unix", "peer not enrolled")
	line(w, "---", "--:", "--:", "--:", "--:", "--:", "--:", "--:")
	for _, r := range rows {
		t := results[r]
		peer := ratio(t[clientOnly], t[tcp])
		if reverse := ratio(t[serverOnly], t[tcp]); reverse != none {
			peer += " / " + reverse
		}
		line(w, r.name(), r.value(t[tcp]), r.value(t[shortcut]), "**"+ratio(t[shortcut], t[tcp])+"**",
			fmt.Sprintf("%.1f %%", 100*median(t[shortcut], func(s sample) float64 { return s.share })),
			r.value(t[unixSocket]), ratio(t[shortcut], t[unixSocket]), peer)
	}
}

func writeBare(w io.Writer, rows []row, before, loaded, after map[row]table) {
	fmt.Fprint(w, "\n## Plain TCP on one core with podshunt loaded and with nothing loaded\n\n")
	line(w, "", "before loading", "loaded", "after unloading", "loaded to before", "loaded to after")
	line(w, "---", "--:", "--:", "--:", "--:", "--:")
	for _, r := range rows {
		b, l, a := before[r][tcp], loaded[r][tcp], after[r][tcp]
		line(w, r.name(), r.value(b), r.value(l), r.value(a), ratio(l, b), ratio(l, a))
	}
}

func line(w io.Writer, cells ...string) {
	fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
}

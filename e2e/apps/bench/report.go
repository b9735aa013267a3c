// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// none fills the cell of what was not measured, or what a program does not say.
const none = "-"

// of takes a value from each sample.
func of(samples []sample, get func(sample) float64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = get(s)
	}
	return values
}

// median is NaN for none.
func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	if n == 0 {
		return math.NaN()
	}
	return (values[(n-1)/2] + values[n/2]) / 2
}

func rate(s sample) float64 { return s.rate }

// allCPU is the processor time of all sides.
func allCPU(s sample) (sum float64) {
	for _, at := range sides() {
		sum += s.cpu[at]
	}
	return sum
}

// ratios are those of the rounds in which both were measured: what happens to the
// machine over time then concerns both alike.
func ratios(samples, base []sample) (found []float64) {
	for _, s := range samples {
		for _, b := range base {
			if s.round == b.round {
				found = append(found, s.rate/b.rate)
			}
		}
	}
	return found
}

// ratioCell is the median of ratios, and the worst.
func ratioCell(samples, base []sample) string {
	found := ratios(samples, base)
	if len(found) == 0 {
		return none
	}
	return fmt.Sprintf("**%.2f** (%.2f)", median(found), slices.Min(found))
}

// rateCell is the median, and the range.
func (l *line) rateCell(v variant) string {
	values := of(l.samples[v], rate)
	if len(values) == 0 {
		return none
	}
	m, unit, scale := median(values), "/s", 1.0
	switch {
	case l.gbits:
		unit = "Gbit/s"
	case m >= 1000:
		unit, scale = "k/s", 1e3
	}
	digits := 1
	if m/scale >= 100 {
		digits = 0
	}
	return fmt.Sprintf("%.*f %s (%.*f–%.*f)", digits, m/scale, unit, digits, slices.Min(values)/scale, digits, slices.Max(values)/scale)
}

// duration writes microseconds. 0 is what was not said.
func duration(us float64) string {
	switch {
	case us == 0 || math.IsNaN(us):
		return none
	case us < 99.95:
		return fmt.Sprintf("%.1f µs", us)
	case us < 999.5:
		return fmt.Sprintf("%.0f µs", us)
	case us < 99950:
		return fmt.Sprintf("%.2f ms", us/1e3)
	}
	return fmt.Sprintf("%.0f ms", us/1e3)
}

// worstCell is the median of a time, and the worst.
func (l *line) worstCell(v variant, get func(sample) float64) string {
	values := of(l.samples[v], get)
	if len(values) == 0 || slices.Max(values) == 0 {
		return none
	}
	return fmt.Sprintf("%s (%s)", duration(median(values)), duration(slices.Max(values)))
}

func p50(s sample) float64  { return s.latency.p50 }
func p99(s sample) float64  { return s.latency.p99 }
func p999(s sample) float64 { return s.latency.p999 }

// cpuCell is the processor time on TCP and with the shortcut, and what that changes.
func (l *line) cpuCell() string {
	from, to := median(of(l.samples[tcp], allCPU)), median(of(l.samples[shortcut], allCPU))
	if math.IsNaN(from) || math.IsNaN(to) {
		return none
	}
	return strings.ReplaceAll(fmt.Sprintf("%s → %s (%+.0f %%)", duration(from), duration(to), 100*(to/from-1)), "-", "−")
}

// sidesCell is the processor time of each side, and the softirqs of the machine.
func (l *line) sidesCell(v variant) string {
	samples := l.samples[v]
	if len(samples) == 0 {
		return none
	}
	var cells []string
	for _, at := range sides() {
		if us := median(of(samples, func(s sample) float64 { return s.cpu[at] })); at != proxy || us > 0 {
			cells = append(cells, duration(us))
		}
	}
	softirq := "0 µs" // less than a tick
	if us := median(of(samples, func(s sample) float64 { return s.softirq })); us > 0 {
		softirq = duration(us)
	}
	return strings.Join(cells, " + ") + "; " + softirq
}

func (l *line) shareCell() string {
	share := median(of(l.samples[shortcut], func(s sample) float64 { return s.share }))
	if math.IsNaN(share) {
		return none
	}
	return fmt.Sprintf("%.1f %%", 100*share)
}

// part is what was measured with one placement.
type part struct {
	placement
	lines []*line
}

func (b *bench) report(w io.Writer, args []string, parts []part, took time.Duration) error {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return fmt.Errorf("read the kernel's release: %w", err)
	}
	cpu, err := cpuModel()
	if err != nil {
		return err
	}
	if b.settings.partial() {
		fmt.Fprintln(w, partial)
	}
	fmt.Fprintf(w, `## Real programs

| | |
| --- | --- |
| date | %s |
| kernel | %s |
| CPU | %s |
| command | %s |
| tcp_rmem and congestion control of the pods | %s, %s |
| programs | %s |

Programs of Debian 12 in pods of their own on one bridge, wired by the CNI plugins bridge and host-local. Each value is
the median of %s of %s, with the lowest and the highest of a rate, and the worst of the others, in parentheses.
The variants take turns within a round, each with servers of its own that are started anew in every round. A ratio is the
median of the rounds' ratios, and above 1 is faster.

- **TCP**: from cgroups that podshunt does not see. **shortcut**: all pods opted in, by an agent that accepts every
  hazard of the kernel. %s **by shortcut** is the part of the bytes that connections sent since they joined which took it.
- **Unix socket**: the program's own, where both it and its client have one. podshunt is loaded all the time: its
  receive observer is attached to the whole machine, so it also runs for TCP and Unix sockets.
- **CPU** is the processor time of the cgroups of all sides together for one request (iperf3: for a MiB), by cpu.stat.
  The last tables have it for each side (server + proxy + client), and after the semicolon what all CPUs of the machine
  spent in interrupts and softirqs, by /proc/stat: what of that ran in the time of a process is counted there as well.
- A server has one thread for its clients, but for MariaDB (one for each), PostgreSQL (a process for each) and the Go
  programs. The load comes from redis-benchmark, wrk, pgbench (its percentiles are from its log), sysbench, iperf3 and
  sockperf; for memcached and gRPC from bench's own clients in Go. TIME_WAIT is off in the pods.
- wrk is not made for Unix sockets, nor are iperf3 and sockperf as Debian has them. With pipelines, a latency is that of
  the whole pipeline. The p99.9 of redis-benchmark is its 99.902 %%.
`, time.Now().Format("2006-01-02"), unix.ByteSliceToString(uname.Release[:]), cpu,
		"`"+command(args)+"`", receiveBuffer, congestion,
		strings.Join(b.measured, ", "), plural(b.settings.rounds, "round"), plural(b.settings.seconds, "second"), b.joins())
	for _, p := range parts {
		fmt.Fprintf(w, "\n### %s\n\n", p.name)
		writeRow(w, "", "TCP", "shortcut", "ratio to TCP", "p99 TCP", "p99 shortcut", "CPU", "by shortcut", "Unix socket", "shortcut to Unix")
		writeRow(w, "---", "--:", "--:", "--:", "--:", "--:", "--:", "--:", "--:", "--:")
		for _, l := range p.lines {
			writeRow(w, l.name, l.rateCell(tcp), l.rateCell(shortcut), ratioCell(l.samples[shortcut], l.samples[tcp]),
				l.worstCell(tcp, p99), l.worstCell(shortcut, p99), l.cpuCell(), l.shareCell(),
				l.rateCell(unixSocket), ratioCell(l.samples[shortcut], l.samples[unixSocket]))
		}
	}
	for _, p := range parts {
		fmt.Fprintf(w, "\n### %s: all percentiles, and the sides\n\n", p.name)
		writeRow(w, "", "", "p50", "p99", "p99.9", "CPU: server + client; softirq")
		writeRow(w, "---", "---", "--:", "--:", "--:", "--:")
		for _, l := range p.lines {
			for i, v := range l.variants {
				name := l.name
				if i > 0 {
					name = ""
				}
				writeRow(w, name, string(v), l.worstCell(v, p50), l.worstCell(v, p99), l.worstCell(v, p999), l.sidesCell(v))
			}
		}
	}
	b.writeFailures(w, parts)
	_, err = fmt.Fprintf(w, "\nThe run took %.0f s.\n", took.Seconds())
	return err
}

// joins says when connections join.
func (b *bench) joins() string {
	if b.noWatch != nil {
		return fmt.Sprintf(`This kernel lets no connection join later than at
  its handshake (%v), so that all do, those of one request included, which gain nothing from
  it; elsewhere they stay on TCP.`, b.noWatch)
	}
	return `A connection begins on TCP, and joins once it has exchanged some segments: those of one request
  never do.`
}

// command is how a run with these arguments is made, for a cell of a table.
func command(args []string) string {
	if len(args) == 0 {
		return "make bench-apps"
	}
	quoted := make([]string, len(args))
	for i, arg := range args {
		quoted[i] = arg
		if strings.ContainsAny(arg, " |()^*") { // make leaves them to a shell
			quoted[i] = "'" + arg + "'"
		}
	}
	return strings.ReplaceAll(fmt.Sprintf("make bench-apps BENCH_ARGS=%q", strings.Join(quoted, " ")), "|", `\|`)
}

// writeFailures says what was not measured.
func (b *bench) writeFailures(w io.Writer, parts []part) {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(b.missing)) {
		all = append(all, fmt.Sprintf("%s: %v", name, b.missing[name]))
	}
	for _, p := range parts {
		for _, l := range p.lines {
			for _, f := range l.failures {
				all = append(all, fmt.Sprintf("%s, %s: %s", l.name, strings.ToLower(p.name), f))
			}
		}
	}
	if len(all) == 0 {
		return
	}
	fmt.Fprint(w, "\n### Not measured\n\nA program that stalls with the shortcut alone meets a [hazard](limits.md) of the kernel, all of which are accepted here.\n\n")
	for _, text := range all {
		fmt.Fprintf(w, "- %s\n", strings.Join(strings.Fields(text), " "))
	}
}

func cpuModel() (string, error) {
	info, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	defer info.Close()
	model, cpus := "", 0
	lines := bufio.NewScanner(info)
	for lines.Scan() {
		switch key, value, _ := strings.Cut(lines.Text(), ":"); strings.TrimSpace(key) {
		case "model name":
			model = strings.TrimSpace(value)
		case "processor":
			cpus++
		}
	}
	// arm64 has numbers there only.
	return fmt.Sprintf("%s, %s", cmp.Or(model, "model not in /proc/cpuinfo"), plural(cpus, "core")), lines.Err()
}

func writeRow(w io.Writer, cells ...string) {
	fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
}

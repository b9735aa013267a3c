// SPDX-License-Identifier: Apache-2.0

// The result as Markdown.

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/measure"
)

// value is the median in the unit of the row.
func (r row) value(samples []sample) string {
	if len(samples) == 0 {
		return none
	}
	if r.kind == measure.Connect {
		return fmt.Sprintf("%.0f /s", median(samples, rate))
	}
	if p99 := median(samples, func(s sample) float64 { return s.P99.Seconds() }); p99 > 0 {
		return fmt.Sprintf("%.2f (%.1f) µs", 1e6*median(samples, func(s sample) float64 { return s.P50.Seconds() }), 1e6*p99)
	}
	return fmt.Sprintf("%.2f Gbit/s", median(samples, rate)*8/1e9)
}

func (b *bench) writeHeader(w io.Writer, args []string) error {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return fmt.Errorf("read the kernel's release: %w", err)
	}
	cpu, err := cpuModel()
	if err != nil {
		return err
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return err
	}
	command := strings.ReplaceAll(strings.Join(append([]string{"hack/bench"}, args...), " "), "|", `\|`) // else a new cell
	fmt.Fprintf(w, `## One connection

| | |
| --- | --- |
| date | %s |
| kernel | %s |
| CPU | %d of %s |
| command | %s |
| congestion control | %s |
`, time.Now().Format("2006-01-02"), unix.ByteSliceToString(uname.Release[:]), len(cpus), cpu, "`"+command+"`", measure.Congestion)
	for _, name := range []string{"tcp_rmem", "tcp_wmem", "tcp_autocorking"} {
		var value []byte
		err := b.client.Do(func() (err error) {
			value, err = os.ReadFile(filepath.Join("/proc/sys/net/ipv4", name))
			return err
		})
		if err != nil {
			return err
		}
		line(w, name, strings.Join(strings.Fields(string(value)), " "))
	}
	_, err = fmt.Fprintf(w, `
Two pods on one bridge, wired by the CNI plugins bridge and host-local. Each value is the median of %d rounds
of %v after a warm-up of %v; the variants take turns within a round. Each time is a new connection to a port of
which nothing is known, and the warm-up has its trial and the comparison of streams, in which it may be slower.

- **ping-pong**: a message there and back; median (99th percentile) of the round trips. **random to 64 KiB**: requests and
  answers of 1 byte to 64 KiB, as many small ones as large ones, the same in each run.
- **stream**: messages one way, read with a buffer of 256 KiB. **both ways**: each end writes a message and reads what has
  come, in turn; the bytes of both are counted. **replies**: each message of the stream is answered with 64 bytes.
- **connections**: connect, so many times one byte each way, close; one after the other. The p99 is of this whole time.
  TIME_WAIT is off in the pods.
- **TCP**: from a cgroup without programs of podshunt. **shortcut**: both pods enrolled; **bytes by shortcut** is the
  part of the bytes sent that took it. **TCP to TCP**: TCP once more in each round, which shows the noise of the machine.
  **peer not enrolled**: TCP between an enrolled client and a server that is not, to TCP; for connections, the reverse
  (only the server enrolled) follows the slash. **watched**: both pods enrolled, connections that are watched and do not join, to TCP.
- A ratio above 1 is faster. It is the median of the rounds' ratios, and in brackets is its 95 %% interval: from the
  k-th smallest to the k-th largest of these ratios, with the largest k that tosses of a coin allow (of %d: %d). Ratios
  of p99 are those of the 99th percentiles.
- **slower**: the whole interval is below %.2f, for the median or for the p99.
- Sockets are non-blocking and waited for by poll(2), as those in blocking mode stay on TCP by default. The tables of
  sockets in blocking mode accept [that hazard](limits.md#blocking-recv).
- The receive observer (here: %s) is attached to the whole machine, so it also runs for TCP and the unix socket; the
  last table shows what that costs. No guard is attached: [what they cost](limits.md#speed) was measured under emulation.
`, b.settings.rounds, b.settings.length, b.settings.warmUp, b.settings.rounds, intervalRank(b.settings.rounds), slower, b.observer)
	return err
}

// writeNoWatch says what differs where watched connections cannot join.
func writeNoWatch(w io.Writer, noWatch error) {
	fmt.Fprintf(w, `- **This machine lets no watched connection join** (%v).
  So the connections of ping-pongs, streams and 100 requests join at their handshake here. Once a connection has joined,
  the same programs run. Connections of 1 and 10 requests are watched, as by default, and end before they would join:
  they have a table together with what is only watched.
`, noWatch)
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

// bare lists the places of the last table.
func (r *results) bare() []place {
	return slices.DeleteFunc(slices.Clone(r.todo), func(p place) bool { return !p.row.bare || p.placement.flag != "one" })
}

func (r *results) write(w io.Writer) {
	r.writeSlower(w)
	for todo := r.todo; len(todo) > 0; {
		first := todo[0]
		n := slices.IndexFunc(todo, func(p place) bool { return p.placement != first.placement || p.row.table() != first.row.table() })
		if n < 0 {
			n = len(todo)
		}
		fmt.Fprintf(w, "\n### %s, %s\n\n", first.placement.name, first.row.table())
		r.writeTable(w, todo[:n])
		todo = todo[n:]
	}
	if bare := r.bare(); len(bare) > 0 {
		r.writeBare(w, bare)
	}
	r.writeRuns(w)
}

// slower names what of the variant is slower than TCP.
func (t table) slower(v variant) []string {
	var names []string
	if ratio(t[v], t[tcp], rate).below(slower) {
		names = append(names, "median")
	}
	if ratio(t[v], t[tcp], tail).below(slower) {
		names = append(names, "p99")
	}
	return names
}

// verdict is no if the variant is not slower than TCP, as far as is known.
func (t table) verdict(v variant) string {
	switch names := t.slower(v); {
	case len(names) > 0:
		return strings.Join(names, ", ")
	case intervalRank(len(t[v])) == 0:
		return none
	}
	return "no"
}

func (t table) share() string {
	if len(t[shortcut]) == 0 {
		return none
	}
	return fmt.Sprintf("%.1f %%", 100*median(t[shortcut], func(s sample) float64 { return s.share }))
}

// writeSlower lists the rows that are slower than TCP.
func (r *results) writeSlower(w io.Writer) {
	lines := [][]string{{"", "slower", "ratio to TCP", "p99 to TCP", "bytes by shortcut"}}
	noise := 0
	for _, p := range r.todo {
		t := r.compared[p]
		if t.slower(tcpAgain) != nil {
			noise++
		}
		if t.slower(shortcut) != nil {
			lines = append(lines, []string{
				p.placement.name + ": " + p.row.title(), t.verdict(shortcut), ratio(t[shortcut], t[tcp], rate).String(), ratio(t[shortcut], t[tcp], tail).String(), t.share(),
			})
		}
	}
	fmt.Fprintf(w, "\n### Slower than TCP\n\n%d of %d rows; of TCP to TCP, %d.\n", len(lines)-1, len(r.todo), noise)
	if len(lines) > 1 {
		fmt.Fprintln(w)
		write(w, lines)
	}
}

func (r *results) writeTable(w io.Writer, places []place) {
	lines := [][]string{{
		"", "TCP", "shortcut", "ratio to TCP", "p99 to TCP", "TCP to TCP", "p99, TCP to TCP", "slower",
		"bytes by shortcut", "unix socket", "shortcut to unix", "peer not enrolled", "watched",
	}}
	for _, p := range places {
		t := r.compared[p]
		peer := ratio(t[clientOnly], t[tcp], rate).String()
		if reverse := ratio(t[serverOnly], t[tcp], rate).String(); reverse != none {
			peer += " / " + reverse
		}
		lines = append(lines, []string{
			p.row.name(), p.row.value(t[tcp]), p.row.value(t[shortcut]),
			"**" + ratio(t[shortcut], t[tcp], rate).String() + "**", ratio(t[shortcut], t[tcp], tail).String(),
			ratio(t[tcpAgain], t[tcp], rate).String(), ratio(t[tcpAgain], t[tcp], tail).String(), t.verdict(shortcut),
			t.share(), p.row.value(t[unixSocket]), ratio(t[shortcut], t[unixSocket], rate).short(), peer,
			ratio(t[watched], t[tcp], rate).String(),
		})
	}
	write(w, lines)
}

func (r *results) writeBare(w io.Writer, places []place) {
	lines := [][]string{{"", "before loading", "loaded", "after unloading", "loaded to before", "loaded to after"}}
	for _, p := range places {
		b, l, a := r.before[p][tcp], r.loaded[p][tcp], r.after[p][tcp]
		lines = append(lines, []string{
			p.row.title(), p.row.value(b), p.row.value(l), p.row.value(a), ratio(l, b, rate).String(), ratio(l, a, rate).String(),
		})
	}
	fmt.Fprint(w, "\n### Plain TCP on one core with podshunt loaded and with nothing loaded\n\n")
	write(w, lines)
}

// write writes a table whose first line is its head, without the columns that have
// nothing but that.
func write(w io.Writer, lines [][]string) {
	kept := func(column int) bool {
		return column == 0 || slices.ContainsFunc(lines[1:], func(cells []string) bool { return cells[column] != none })
	}
	for i, cells := range lines {
		var out, rule []string
		for column, cell := range cells {
			if kept(column) {
				out, rule = append(out, cell), append(rule, "--:")
			}
		}
		line(w, out...)
		if i == 0 {
			rule[0] = "---"
			line(w, rule...)
		}
	}
}

func line(w io.Writer, cells ...string) {
	fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/measure"
)

// warmUp lets TCP open its windows and the shortcut see the receivers read.
const warmUp = 50 * time.Millisecond

// row is a line of the comparison: what is measured, and how it went.
type row struct {
	kind                          measure.Kind
	size                          int
	tcp, shortcut, service, local measure.Result
	// sent is how many bytes the pods sent in shortcut and service together,
	// and redirected how many of them took the shortcut.
	sent, redirected uint64
}

func newRows() []row {
	var rows []row
	for _, size := range []int{1, 1 << 10, 16 << 10, 64 << 10} {
		rows = append(rows, row{kind: measure.PingPong, size: size})
	}
	for _, size := range []int{128, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10} {
		rows = append(rows, row{kind: measure.Stream, size: size})
	}
	return rows
}

// compare measures with the pods opted out, opts them in, and measures again.
func (d *demo) compare(ctx context.Context) error {
	d.section("Measurements: both ends pinned to one core")
	address := d.address().String()
	local := filepath.Join(d.sandbox.Base, "server.sock")
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	cpu := 0
	for !set.IsSet(cpu) {
		cpu++
	}
	run := func(r row, listen, dial string) (measure.Result, error) {
		spec := measure.Spec{
			Kind: r.kind, Size: r.size, Duration: d.duration, WarmUp: warmUp,
			Listen: listen, Dial: dial, NonBlocking: r.kind == measure.Stream, NoDelay: r.kind == measure.PingPong,
		}
		return measure.Run(ctx, spec, end(d.server.Start, cpu), end(d.client.Start, cpu))
	}

	rows := newRows()
	d.say("the pods are opted out: %s=disabled; measuring TCP ...", api.AnnotationShortcut)
	for i := range rows {
		var err error
		if rows[i].tcp, err = run(rows[i], address, ""); err != nil {
			return err
		}
	}
	if err := d.writePods("enabled"); err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := d.agent.Await(soon, "enrol both pods", func(s api.Status) bool {
		enrolled := 0
		for _, p := range s.Pods {
			if p.Enrolled {
				enrolled++
			}
		}
		return enrolled == 2
	})
	if err != nil {
		return err
	}
	d.say("the pods file now says %s=enabled; measuring the shortcut, and a unix socket ...", api.AnnotationShortcut)
	for i := range rows {
		r := &rows[i]
		before, err := d.status(ctx)
		if err != nil {
			return err
		}
		if r.shortcut, err = run(*r, address, ""); err != nil {
			return err
		}
		if r.service, err = run(*r, address, d.service.String()); err != nil {
			return err
		}
		after, err := d.status(ctx)
		if err != nil {
			return err
		}
		r.sent = sent(after, "message_") - sent(before, "message_")
		r.redirected = sent(after, "message_shortcut") - sent(before, "message_shortcut")
		if r.local, err = run(*r, local, ""); err != nil {
			return err
		}
	}
	d.say("")
	return d.printRows(rows)
}

func end(start func(*exec.Cmd) error, cpu int) measure.End {
	return measure.End{Start: start, CPU: cpu}
}

// sent adds up the bytes of the counters whose names start with prefix.
func sent(s api.Status, prefix string) uint64 {
	var n uint64
	for _, o := range s.Outcomes {
		if strings.HasPrefix(o.String(), prefix) {
			n += o.Bytes
		}
	}
	return n
}

func (d *demo) printRows(rows []row) error {
	t := newTable(d.out, tabwriter.AlignRight)
	line := func(cells ...string) { fmt.Fprintln(t, strings.Join(cells, "\t")+"\t") }
	line("", "TCP", "shortcut", "", "via service", "", "unix socket", "", "by shortcut")
	for _, r := range rows {
		cells := []string{fmt.Sprintf("%-18s", r.name()), r.value(r.tcp)}
		for _, other := range []measure.Result{r.shortcut, r.service, r.local} {
			cells = append(cells, r.value(other), fmt.Sprintf("%.1fx", other.Rate/r.tcp.Rate))
		}
		share := "-"
		if r.sent > 0 {
			share = fmt.Sprintf("%.1f %%", 100*float64(r.redirected)/float64(r.sent))
		}
		line(append(cells, share)...)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	d.say("\nping-pong: median time of a message there and back; stream: messages one way; 2.0x: twice as fast as TCP;")
	d.say("via service: the shortcut of a connection to %s; by shortcut: the part of both shortcut columns' bytes that took it", d.service)
	return nil
}

func (r row) name() string {
	if r.size < 1<<10 {
		return fmt.Sprintf("%s %d B", r.kind, r.size)
	}
	return fmt.Sprintf("%s %d KiB", r.kind, r.size>>10)
}

func (r row) value(m measure.Result) string {
	if r.kind == measure.PingPong {
		return fmt.Sprintf("%.1f µs", float64(m.P50)/1e3)
	}
	return fmt.Sprintf("%.1f Gbit/s", m.Rate*8/1e9)
}

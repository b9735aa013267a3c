// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/e2e/measure"
)

// drawing is what a test looks at of an SVG.
type drawing struct {
	texts []string
	// lines has the points of each line by its colour.
	lines map[string][][2]float64
}

func mustRead(t *testing.T, svg []byte) drawing {
	t.Helper()
	d := drawing{lines: map[string][][2]float64{}}
	for x := xml.NewDecoder(bytes.NewReader(svg)); ; {
		token, err := x.Token()
		if errors.Is(err, io.EOF) {
			return d
		}
		if err != nil {
			t.Fatalf("%v in:\n%s", err, svg)
		}
		switch e := token.(type) {
		case xml.CharData:
			if text := strings.TrimSpace(string(e)); text != "" {
				d.texts = append(d.texts, text)
			}
		case xml.StartElement:
			attribute := map[string]string{}
			for _, a := range e.Attr {
				attribute[a.Name.Local] = a.Value
			}
			for _, pair := range strings.Fields(attribute["points"]) {
				xs, ys, _ := strings.Cut(pair, ",")
				px, err := strconv.ParseFloat(xs, 64)
				py, err2 := strconv.ParseFloat(ys, 64)
				if err := errors.Join(err, err2); err != nil {
					t.Fatal(err)
				}
				if px < marginLeft || px > chartWidth-marginRight || py < marginTop || py > chartHeight-marginBottom {
					t.Errorf("point %s lies outside of the plot", pair)
				}
				d.lines[attribute["stroke"]] = append(d.lines[attribute["stroke"]], [2]float64{px, py})
			}
		}
	}
}

func TestLatencySVG(t *testing.T) {
	us := func(n float64) time.Duration { return time.Duration(n * 1e3) }
	var out bytes.Buffer
	err := latencySVG(&out, `one <core> & "more"`, []point{
		{1, us(20.6), us(11.6), us(12.2)},
		{16 << 10, us(31.3), us(13.6), us(17.3)},
		{1 << 20, us(800), us(805), 0}, // no Unix socket
	})
	if err != nil {
		t.Fatal(err)
	}
	d := mustRead(t, out.Bytes())
	for _, want := range []string{`one <core> & "more"`, "1 B", "16 KiB", "1 MiB", "8 µs", "1024 µs", "TCP", "shortcut", "Unix socket"} {
		found := false
		for _, text := range d.texts {
			found = found || text == want
		}
		if !found {
			t.Errorf("got texts %q, want also %q", d.texts, want)
		}
	}
	lines := latencyLines()
	tcp, unix, shortcut := d.lines[lines[0].colour], d.lines[lines[1].colour], d.lines[lines[2].colour]
	if len(tcp) != 3 || len(shortcut) != 3 || len(unix) != 2 {
		t.Fatalf("got %d, %d and %d points, want 3, 3 and 2 in:\n%s", len(tcp), len(shortcut), len(unix), &out)
	}
	for i, p := range shortcut[:2] {
		if p[0] != tcp[i][0] || p[1] <= tcp[i][1] {
			t.Errorf("point %d: got %v for the shortcut and %v for TCP, want the faster one below the other", i, p, tcp[i])
		}
	}
	// One size is enough; none is not.
	if err := latencySVG(&out, "", []point{{1, us(8), us(8), us(8)}}); err != nil {
		t.Error(err)
	}
	if err := latencySVG(&out, "", []point{{size: 1}}); err == nil {
		t.Error("got no error for nothing to draw")
	}
}

// TestDrawLatency: the picture has the medians of the ping-pongs with TCP_NODELAY of the
// first placement, and the report its link.
func TestDrawLatency(t *testing.T) {
	first, second := placement{flag: "two", name: "Somewhere"}, placement{flag: "free", name: "Elsewhere"}
	ping := row{kind: measure.PingPong, size: 1, noDelay: true}
	pingAsleep, nagle := ping, ping
	pingAsleep.mode, nagle.noDelay = blocking, false
	stream := row{kind: measure.Stream, size: kib, noDelay: true}
	rounds := func(times ...time.Duration) (samples []sample) {
		for _, d := range times {
			samples = append(samples, sample{Result: measure.Result{P50: d}})
		}
		return samples
	}
	r := results{
		todo: []place{{first, stream}, {first, ping}, {first, nagle}, {first, pingAsleep}, {second, ping}},
		compared: map[place]table{{first, ping}: {
			tcp:        rounds(20*time.Microsecond, 16*time.Microsecond, 90*time.Microsecond),
			shortcut:   rounds(8*time.Microsecond, 4*time.Microsecond, 9*time.Microsecond),
			unixSocket: rounds(16 * time.Microsecond),
		}},
	}
	for _, p := range r.todo {
		if _, ok := r.compared[p]; !ok {
			r.compared[p] = table{tcp: rounds(time.Second), shortcut: rounds(time.Second)}
		}
	}
	file := filepath.Join(t.TempDir(), "latency.svg")
	var report bytes.Buffer
	if err := r.drawLatency(&report, file); err != nil {
		t.Fatal(err)
	}
	if want := "](latency.svg)\n"; !strings.HasSuffix(report.String(), want) {
		t.Errorf("got %q, want a link that ends with %q", &report, want)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	err = latencySVG(&want, "Round trip, median: somewhere", []point{{1, 20 * time.Microsecond, 8 * time.Microsecond, 16 * time.Microsecond}})
	if err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("got (error %v):\n%s\nwant:\n%s", err, got, &want)
	}
	r.todo = []place{{first, stream}, {first, nagle}}
	if err := r.drawLatency(&report, "/nowhere"); err != nil {
		t.Errorf("a run without such ping-pongs: %v", err)
	}
}

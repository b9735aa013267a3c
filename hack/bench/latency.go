// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/podshunt/podshunt/e2e/measure"
)

// point is the time of a message there and back, by its size in bytes. 0 is what was
// not measured.
type point struct {
	size                int
	tcp, shortcut, unix time.Duration
}

// drawLatency draws the ping-pongs with TCP_NODELAY of the first placement into a file
// that lies beside the report, to which it writes the link.
func (r *results) drawLatency(w io.Writer, file string) error {
	where := r.todo[0].placement
	var points []point
	for _, p := range r.todo {
		if p.placement != where || p.row.kind != measure.PingPong || !p.row.noDelay || p.row.mode != usual {
			continue
		}
		of := func(v variant) time.Duration {
			return time.Duration(median(r.compared[p][v], func(s sample) float64 { return float64(s.P50) }))
		}
		points = append(points, point{p.row.size, of(tcp), of(shortcut), of(unixSocket)})
	}
	if points == nil {
		return nil
	}
	var svg bytes.Buffer
	if err := latencySVG(&svg, "Round trip, median: "+strings.ToLower(where.name), points); err != nil {
		return err
	}
	fmt.Fprintf(w, "\n![The medians of the ping-pongs with TCP_NODELAY, by the size of the message](%s)\n", filepath.Base(file))
	return os.WriteFile(file, svg.Bytes(), 0o644)
}

// The picture's measures in pixels: the plot lies within the margins.
const (
	chartWidth, chartHeight = 760, 420
	marginLeft, marginRight = 70, 120
	marginTop, marginBottom = 50, 60
)

// latencyLines are drawn in this order. The colours have enough contrast on white and on
// GitHub's dark background; the dashes tell the lines apart without colours.
func latencyLines() []latencyLine {
	return []latencyLine{
		{"TCP", "#d1701f", "7 4", func(p point) time.Duration { return p.tcp }},
		{"Unix socket", "#2da44e", "2 4", func(p point) time.Duration { return p.unix }},
		{"shortcut", "#2f81f7", "", func(p point) time.Duration { return p.shortcut }},
	}
}

type latencyLine struct {
	name, colour, dashes string
	of                   func(point) time.Duration
}

// latencySVG draws the points, whose sizes ascend, with both scales logarithmic.
func latencySVG(w io.Writer, title string, points []point) error {
	low, high := math.Inf(1), 0.0
	for _, p := range points {
		for _, l := range latencyLines() {
			if us := microseconds(l.of(p)); us > 0 {
				low, high = min(low, us), max(high, us)
			}
		}
	}
	if high == 0 {
		return errors.New("draw the latency: no point")
	}
	// Whole powers of two, at least one apart.
	bottom, top := math.Floor(math.Log2(low)), math.Ceil(math.Log2(high))
	top = max(top, bottom+1)
	left, right := math.Log2(float64(points[0].size)), math.Log2(float64(points[len(points)-1].size))
	right = max(right, left+1)
	x := func(size int) float64 {
		return marginLeft + (math.Log2(float64(size))-left)/(right-left)*(chartWidth-marginLeft-marginRight)
	}
	y := func(us float64) float64 {
		return chartHeight - marginBottom - (math.Log2(us)-bottom)/(top-bottom)*(chartHeight-marginTop-marginBottom)
	}

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" role="img" aria-label="%s">
<style>
	text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #6e7781 }
	.title { font-size: 15px; font-weight: 600 }
	.grid { stroke: #6e7781; stroke-opacity: 0.25 }
	.line { fill: none; stroke-width: 2.5; stroke-linejoin: round }
</style>
<text class="title" x="%d" y="24">%[3]s</text>
`, chartWidth, chartHeight, escape(title), marginLeft)
	for e := bottom; e <= top; e++ {
		at := y(math.Exp2(e))
		fmt.Fprintf(&b, `<line class="grid" x1="%d" x2="%d" y1="%.1f" y2="%[3]f"/>`+"\n", marginLeft, chartWidth-marginRight, at)
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%g µs</text>`+"\n", marginLeft-8, at+4, math.Exp2(e))
	}
	lastLabel := math.Inf(-1)
	for _, p := range points {
		at := x(p.size)
		fmt.Fprintf(&b, `<line class="grid" x1="%.1f" x2="%[1]f" y1="%d" y2="%d"/>`+"\n", at, marginTop, chartHeight-marginBottom)
		if at-lastLabel < 50 { // it would be written over
			continue
		}
		lastLabel = at
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", at, chartHeight-marginBottom+20, sizeName(p.size))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">message, sent there and back</text>`+"\n",
		(marginLeft+chartWidth-marginRight)/2, chartHeight-12)
	names := map[string]float64{}
	for _, l := range latencyLines() {
		var path []string
		var end [2]float64
		for _, p := range points {
			if us := microseconds(l.of(p)); us > 0 {
				end = [2]float64{x(p.size), y(us)}
				path = append(path, fmt.Sprintf("%.1f,%.1f", end[0], end[1]))
				fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", end[0], end[1], l.colour)
			}
		}
		if path == nil {
			continue
		}
		fmt.Fprintf(&b, `<polyline class="line" stroke="%s" stroke-dasharray="%s" points="%s"/>`+"\n", l.colour, l.dashes, strings.Join(path, " "))
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" style="fill: %s">%s</text>`+"\n", chartWidth-marginRight+10, apart(names, l.name, end[1]+4), l.colour, l.name)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// apart moves the name of a line down until it lies over no other.
func apart(names map[string]float64, name string, at float64) float64 {
	for free := false; !free; {
		free = true
		for _, other := range names {
			if math.Abs(other-at) < 15 {
				at, free = other+15, false
			}
		}
	}
	names[name] = at
	return at
}

func microseconds(d time.Duration) float64 { return float64(d) / 1e3 }

func escape(text string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;").Replace(text)
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/e2e/measure"
)

// TestIntervalRank: the ranks are those of the tables of the sign test.
func TestIntervalRank(t *testing.T) {
	for n, want := range map[int]int{0: 0, 1: 0, 5: 0, 6: 1, 8: 1, 9: 2, 10: 2, 12: 3, 15: 4, 20: 6, 30: 10, 100: 40} {
		if got := intervalRank(n); got != want {
			t.Errorf("%d values: got rank %d, want %d", n, got, want)
		}
	}
}

// samples of round trips at these rates, whose p99 is twice their median.
func samples(rates ...float64) []sample {
	all := make([]sample, len(rates))
	for i, r := range rates {
		all[i] = sample{Result: measure.Result{Rate: r, P50: time.Duration(float64(time.Second) / r), P99: time.Duration(2 * float64(time.Second) / r)}}
	}
	return all
}

func TestRatio(t *testing.T) {
	for _, tc := range []struct {
		name          string
		samples, base []sample
		want          string
		slower        bool
	}{
		{"not measured", nil, samples(1, 2), none, false},
		{"rounds are compared one by one", samples(20, 30, 120), samples(10, 20, 40), "2.00", false},
		{"even number", samples(10, 20), samples(10, 10), "1.50", false},
		{"too few rounds to be sure", samples(1, 1, 1, 1, 1), samples(2, 2, 2, 2, 2), "0.50", false},
		{"slower", samples(90, 91, 92, 93, 94, 95), samples(100, 100, 100, 100, 100, 100), "0.93 (0.90–0.95)", true},
		{"perhaps slower", samples(90, 91, 92, 93, 94, 98), samples(100, 100, 100, 100, 100, 100), "0.93 (0.90–0.98)", false},
		{
			"one bad round of nine", samples(1, 101, 102, 103, 104, 105, 106, 107, 900),
			samples(100, 100, 100, 100, 100, 100, 100, 100, 100), "1.04 (1.01–1.07)", false,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for name, get := range map[string]func(sample) float64{"rate": rate, "p99": tail} {
				got := ratio(tc.samples, tc.base, get)
				if got.String() != tc.want || got.below(slower) != tc.slower {
					t.Errorf("%s: got %v, slower: %v; want %s, slower: %v", name, got, got.below(slower), tc.want, tc.slower)
				}
			}
		})
	}
	noTimes := []sample{{Result: measure.Result{Rate: 1}}}
	if got := ratio(noTimes, noTimes, tail); got.String() != none {
		t.Errorf("p99 of a stream: got %v, want %s", got, none)
	}
}

// TestIntervalHolds: of many runs of nine rounds of something that is skewed, as times
// are, the interval has the true median in 95 % and not in all.
func TestIntervalHolds(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	const runs = 4000
	held := 0
	for range runs {
		rates := make([]float64, 9)
		for i := range rates {
			rates[i] = 1 + random.ExpFloat64() // its median is 1 + ln 2
		}
		e := ratio(samples(rates...), samples(1, 1, 1, 1, 1, 1, 1, 1, 1), rate)
		if e.low <= 1.6931 && 1.6931 <= e.high {
			held++
		}
	}
	if part := float64(held) / runs; part < 0.95 || part > 0.975 {
		t.Errorf("got the true median in %.1f %% of the intervals, want 96.1 %%", 100*part)
	}
}

func TestPlacements(t *testing.T) {
	all := []string{"one", "two", "free"}
	for _, tc := range []struct {
		cpus  []int
		cores []string
		want  []string
	}{
		{[]int{3}, all, []string{"one"}},
		{[]int{3, 5}, all, all},
		{[]int{3, 5}, []string{"free", "one"}, []string{"one", "free"}},
		{[]int{3}, []string{"two"}, nil},
	} {
		got, err := placements(tc.cpus, tc.cores)
		if (err != nil) != (tc.want == nil) || len(got) != len(tc.want) {
			t.Errorf("%v on CPUs %v: got %v and error %v, want %v", tc.cores, tc.cpus, got, err, tc.want)
			continue
		}
		for i, p := range got {
			if p.flag != tc.want[i] {
				t.Errorf("%v on CPUs %v: got %v, want %v", tc.cores, tc.cpus, got, tc.want)
			}
		}
	}
}

// TestChoose: a run is whole only with all rows, wherever this machine can measure them.
func TestChoose(t *testing.T) {
	for _, tc := range []struct {
		args    []string
		cpus    []int
		partial bool
	}{
		{nil, []int{3, 5}, false},
		{nil, []int{3}, false},
		{[]string{"-rounds", "20", "-length", "1s"}, []int{3, 5}, false},
		{[]string{"-cores", "one"}, []int{3}, false},
		{[]string{"-cores", "one"}, []int{3, 5}, true},
		{[]string{"-rows", "^ping-pong"}, []int{3, 5}, true},
	} {
		s, err := parse(tc.args, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		todo, partial, err := s.choose(tc.cpus, false)
		if err != nil || len(todo) == 0 || partial != tc.partial {
			t.Errorf("%q on CPUs %v: got %d places, partial: %v and error %v, want partial: %v", tc.args, tc.cpus, len(todo), partial, err, tc.partial)
		}
	}
	s, err := parse([]string{"-rows", "^none"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if todo, _, err := s.choose([]int{3}, false); err == nil {
		t.Errorf("got %v, want an error for no row", todo)
	}
}

func TestParse(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-length", "0s"}, {"-cores", "three"}, {"-rows", "("}, {"more"}} {
		if got, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q: got %+v, want an error", args, got)
		}
	}
	got, err := parse([]string{"-rows", "^stream 64 B, nodelay$", "-cores", "one,free"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	chosen := slices.DeleteFunc(rows(false), func(r row) bool { return !got.rows.MatchString(r.title()) })
	want := []row{{kind: measure.Stream, size: 64, noDelay: true}}
	if !slices.Equal(chosen, want) || !slices.Equal(got.cores, []string{"one", "free"}) {
		t.Errorf("got rows %+v on %q, want %+v on one and free", chosen, got.cores, want)
	}
}

// TestRows: no two rows have one name, under which -rows and the tables know them. Where
// watched connections cannot join, all rows are there, too.
func TestRows(t *testing.T) {
	names := func(noWatch bool) map[string]bool {
		seen := map[string]bool{}
		for _, r := range rows(noWatch) {
			if seen[r.title()] {
				t.Errorf("%s: is there twice", r.title())
			}
			seen[r.title()] = true
		}
		return seen
	}
	seen, without := names(false), names(true)
	for title := range seen {
		watched, _ := strings.CutSuffix(title, ", nodelay")
		blocked, _ := strings.CutSuffix(title, ", blocking")
		if !without[title] && !without[watched+", watching"] && !without[blocked+", watching, blocking"] {
			t.Errorf("%s: is missing where watched connections cannot join", title)
		}
	}
	for _, r := range rows(true) {
		if joins := r.mode != watching; r.watched && joins || r.kind == measure.Connect && r.requests == 1 && (r.mode == usual || r.mode == blocking) {
			t.Errorf("%s: is measured with connections that join at their handshake", r.title())
		}
	}
	if !without["ping-pong 1 B, watching"] {
		t.Error("what is watched is missing where watched connections cannot join")
	}
	for _, want := range []string{
		"ping-pong 1 B, nodelay", "ping-pong 1 MiB, nagle", "stream 64 B, nodelay", "both ways 1 MiB, nagle",
		"ping-pong, random to 64 KiB, nodelay", "stream 64 KiB, replies, nagle", "connections, 1 request, nodelay", "connections, 100 requests, nodelay",
		"ping-pong 1 B, blocking",
	} {
		if !seen[want] {
			t.Errorf("%s: is missing", want)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/docs"
)

var (
	// anchorPattern matches where an entry of docs/limits.md begins.
	anchorPattern = regexp.MustCompile(`<a id="([a-z-]+)"></a>`)
	// linePattern matches a line of the table of what the suite sees.
	linePattern = regexp.MustCompile(`(?m)^\| \[[a-z-]+\]\(#([a-z-]+)\) \| (.*) \|$`)
)

// noRow stands in the table for an entry that no row can show.
const noRow = "no row"

// limits returns the series of kernels on which rows need each entry.
func limits() map[string][]string {
	needed := map[string][]string{}
	for _, m := range linePattern.FindAllStringSubmatch(docs.Limits, -1) {
		needed[m[1]] = strings.Split(m[2], ", ")
	}
	return needed
}

// TestLimits: every entry of docs/limits.md has its line in the table, and every
// difference that a row names has its entry.
func TestLimits(t *testing.T) {
	var anchors []string
	for _, m := range anchorPattern.FindAllStringSubmatch(docs.Limits, -1) {
		anchors = append(anchors, m[1])
	}
	slices.Sort(anchors)
	if diff := cmp.Diff(anchors, sorted(limits())); diff != "" {
		t.Errorf("entries and lines of the table (-entries +lines):\n%s", diff)
	}
	named := map[string]bool{sleepingRecv: true} // of reads that happen to sleep
	for _, r := range rows() {
		for _, d := range r.differs {
			named[d.entry] = true
		}
	}
	for entry, kernels := range limits() {
		if want := kernels[0] != noRow; named[entry] != want {
			t.Errorf("entry %s: got named by a row %v, want %v", entry, named[entry], want)
		}
		delete(named, entry)
	}
	for entry := range named {
		t.Errorf("a row names the entry %s, which docs/limits.md does not have", entry)
	}
}

// checkLimits compares the table with what this kernel has shown.
func (s *suite) checkLimits(t *testing.T) {
	series := strings.Join(strings.SplitN(release(t), ".", 3)[:2], ".")
	var want []string
	known := false
	for entry, kernels := range limits() {
		if slices.Contains(kernels, series) {
			want = append(want, entry)
			known = true
		}
	}
	if !known {
		t.Logf("docs/limits.md says nothing of Linux %s: ADD it to the table", series)
		return
	}
	got := map[string]bool{}
	for _, ways := range s.seen {
		for _, entries := range ways {
			maps.Copy(got, entries)
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, sorted(got)); diff != "" {
		t.Errorf("entries needed on Linux %s (-docs/limits.md +seen):\n%s", series, diff)
	}
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// release returns the running kernel's, such as "6.1.0-56-cloud-amd64".
func release(t *testing.T) string {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(name.Release[:])
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

// TestParts: each part is replaced by its own command, and the other stays. A run of
// some rows changes nothing.
func TestParts(t *testing.T) {
	dir := t.TempDir()
	doc, text := filepath.Join(dir, "measurements.md"), filepath.Join(dir, "text")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(doc, []byte(`# Measurements

<!-- bench-apps: made by make bench-apps -->
<!-- end of bench-apps -->

<!-- bench: made by make bench -->
old
<!-- end of bench -->
`), 0o600))
	for _, part := range []string{"bench", "bench-apps", "bench"} {
		must(os.WriteFile(text, []byte("## New "+part+"\n"), 0o600))
		must(run([]string{part, text}, doc, io.Discard))
	}
	picture := filepath.Join(t.TempDir(), "picture.svg")
	draw := func(content string) {
		must(os.WriteFile(picture, []byte(content), 0o600))
		must(run([]string{"bench", text, picture}, doc, io.Discard))
	}
	must(os.WriteFile(text, []byte("## New bench\n"), 0o600))
	draw("whole")
	must(os.WriteFile(text, []byte(partial+"## One row\n"), 0o600))
	draw("of one row")
	if got, err := os.ReadFile(filepath.Join(dir, "picture.svg")); err != nil || string(got) != "whole" {
		t.Errorf("got the picture %q and error %v, want that of the whole run", got, err)
	}
	got, err := os.ReadFile(doc)
	must(err)
	want := `# Measurements

<!-- bench-apps: made by make bench-apps -->

## New bench-apps

<!-- end of bench-apps -->

<!-- bench: made by make bench -->

## New bench

<!-- end of bench -->
`
	if diff := gocmp.Diff(want, string(got)); diff != "" {
		t.Errorf("document (-want +got):\n%s", diff)
	}
	must(os.WriteFile(text, []byte("## New another\n"), 0o600))
	if err := run([]string{"another", text}, doc, io.Discard); err == nil {
		t.Error("got no error for a part that the document has not")
	}
}

// quoted is a number that a text quotes from a table of the document, with a comment
// that says from where: **1.69**<!-- measurements: heading | row | column -->.
var quoted = regexp.MustCompile(`(?s)\*\*([0-9.]+)\*\*<!--\s+measurements: (.*?) \| (.*?) \| (.*?)\s+-->`)

// TestHeadline: the number that README begins with is what was measured last.
func TestHeadline(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../../" + document)
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(string(readme), "\n## ")
	if !quoted.MatchString(head) {
		t.Fatalf("README begins with no number like %s", quoted)
	}
	for _, q := range quoted.FindAllStringSubmatch(string(readme), -1) {
		for i := range q {
			q[i] = strings.Join(strings.Fields(q[i]), " ")
		}
		got, err := cell(string(doc), q[2], q[3], q[4])
		if err != nil {
			t.Errorf("README quotes %s: %v", q[1], err)
			continue
		}
		if number := regexp.MustCompile(`[0-9.]+`).FindString(got); number != q[1] {
			t.Errorf("README quotes %s for %s, want %s, as %s has it: %q", q[1], q[3], number, document, got)
		}
	}
}

// cell finds a cell in the first table below a heading.
func cell(doc, heading, row, column string) (string, error) {
	_, text, ok := strings.Cut(doc, "# "+heading+"\n")
	if !ok {
		return "", fmt.Errorf("no heading %q in %s", heading, document)
	}
	text, _, _ = strings.Cut(text, "\n#")
	at := -1
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		cells[0] = strings.TrimPrefix(cells[0], "| ")
		last := len(cells) - 1
		cells[last] = strings.TrimSuffix(cells[last], " |")
		if at < 0 {
			for i, name := range cells {
				if name == column {
					at = i
				}
			}
			continue
		}
		if cells[0] == row && at < len(cells) {
			return cells[at], nil
		}
	}
	return "", fmt.Errorf("no row %q with a column %q below %q in %s", row, column, heading, document)
}

func TestCell(t *testing.T) {
	doc := "# A\n\n### B\n\ntext\n\n|  | x | y |\n| --- | --: | --: |\n| r | 1 | **2.5** (1.2) |\n| s | 3 | 4 |\n\n### C\n\n|  | x |\n| --- | --: |\n| t | 5 |\n"
	for _, tc := range []struct{ heading, row, column, want string }{
		{"B", "r", "y", "**2.5** (1.2)"},
		{"B", "s", "x", "3"},
		{"C", "t", "x", "5"},
		{"B", "t", "x", ""},
		{"C", "t", "y", ""},
		{"D", "r", "x", ""},
	} {
		got, err := cell(doc, tc.heading, tc.row, tc.column)
		if got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%s, %s, %s: got %q and error %v, want %q", tc.heading, tc.row, tc.column, got, err, tc.want)
		}
	}
}

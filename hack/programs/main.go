// SPDX-License-Identifier: Apache-2.0

// Command programs makes the table of programs in docs/limits.md from what
// `make test-apps-kernels` has found: programs DIRECTORY prints it, and with
// -w FILE it is put between that file's marks.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The marks in a file, on lines of their own.
const (
	begin = "<!-- programs: made by hack/programs -->"
	end   = "<!-- end of programs -->"
)

// finding is what TestDefaults of e2e/apps prints for a program on a kernel.
type finding struct {
	Program, Version, Kernel string
	Works                    bool
	First, Again             way
}

// way is how the bytes of one run went.
type way struct {
	Sent, Shortcut uint64
	Counted        map[string]struct{ Count, Bytes uint64 }
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "programs:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("programs", flag.ContinueOnError)
	file := flags.String("w", "", "`file` to put the table into")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("accepted is one directory, such as .cache/kernels/apps/KEY")
	}
	names, findings, err := read(flags.Arg(0))
	if err != nil {
		return err
	}
	text := table(names, findings)
	if *file == "" {
		_, err := io.WriteString(stdout, text)
		return err
	}
	old, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), begin+"\n")
	_, after, ok2 := strings.Cut(rest, end+"\n")
	if !ok || !ok2 {
		return fmt.Errorf("%s: the lines %q and %q are needed", *file, begin, end)
	}
	return os.WriteFile(*file, []byte(before+begin+"\n\n"+text+"\n"+end+"\n"+after), 0o644)
}

// read returns the names of the programs in their order, and what is known of them.
func read(dir string) (names []string, findings []finding, err error) {
	text, err := os.ReadFile(filepath.Join(dir, "programs"))
	if err != nil {
		return nil, nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*", "*.json"))
	if err != nil {
		return nil, nil, err
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, nil, err
		}
		var f finding
		if err := json.Unmarshal(text, &f); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", name, err)
		}
		findings = append(findings, f)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n"), findings, nil
}

// table is in Markdown: one line for each program of which something is known.
func table(names []string, findings []finding) string {
	type cell struct{ program, kernel string }
	cells, kernels, versions := map[cell]finding{}, map[string]bool{}, map[string]string{}
	for _, f := range findings {
		cells[cell{f.Program, f.Kernel}] = f
		kernels[f.Kernel] = true
		versions[f.Program] = f.Version
	}
	columns := slices.SortedFunc(maps.Keys(kernels), compareVersions)
	var b bytes.Buffer
	fmt.Fprintf(&b, "| program | version | %s | mostly on TCP because of |\n", strings.Join(columns, " | "))
	fmt.Fprintf(&b, "|%s\n", strings.Repeat(" --- |", len(columns)+3))
	for _, name := range names {
		if _, ok := versions[name]; !ok {
			continue
		}
		var found []string
		reasons := map[string]bool{}
		for _, kernel := range columns {
			f, ok := cells[cell{name, kernel}]
			switch {
			case !ok:
				found = append(found, "not run")
				continue
			case !f.Works:
				found = append(found, "**fails**")
			case f.First.share() == f.Again.share():
				found = append(found, f.Again.share())
			default:
				found = append(found, f.First.share()+", "+f.Again.share())
			}
			if reason := f.Again.reason(); reason != "" {
				reasons["`"+reason+"`"] = true
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", name, versions[name], strings.Join(found, " | "),
			strings.Join(slices.Sorted(maps.Keys(reasons)), ", "))
	}
	return b.String()
}

// compareVersions orders 6.1.192 before 6.12.117.
func compareVersions(a, b string) int {
	numbers := func(s string) (n []int) {
		for _, part := range strings.FieldsFunc(s, func(r rune) bool { return r < '0' || r > '9' }) {
			i, _ := strconv.Atoi(part) // digits; what is too large is equal
			n = append(n, i)
		}
		return n
	}
	return cmp.Or(slices.Compare(numbers(a), numbers(b)), cmp.Compare(a, b))
}

// share is the part of the paired connections' bytes that took the shortcut.
func (w way) share() string {
	switch {
	case w.Sent == 0:
		return "on TCP"
	case w.Shortcut == w.Sent:
		return "100 %"
	default:
		return fmt.Sprintf("%d %%", 100*w.Shortcut/w.Sent)
	}
}

// reason is the counter that explains most of what went by TCP, if that is more
// than half: of connections that were not paired, else of messages.
func (w way) reason() string {
	if w.Sent > 0 && 2*w.Shortcut >= w.Sent {
		return ""
	}
	best, most := "", uint64(0)
	for _, name := range slices.Sorted(maps.Keys(w.Counted)) {
		c := w.Counted[name]
		weight := c.Bytes
		if w.Sent == 0 {
			weight = c.Count
		}
		if name != "message_shortcut" && name != "connection_paired" && name != "socket_evicted" && weight > most {
			best, most = name, weight
		}
	}
	return best
}

// SPDX-License-Identifier: Apache-2.0

// Bench measures what the shortcut is worth to real programs on this machine and
// prints it as Markdown: clients, servers and proxies in pods of their own, over plain
// TCP, with the shortcut and through the program's own Unix socket in turn. It needs
// root and touches only what it makes itself. The environment's PODSHUNT_APPS has the
// directories of programs that fetch.sh has unpacked, as PATH has its.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/apps/overlay"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

func main() {
	os.Exit(loadMain(func() int { return sandbox.Main(body) }))
}

func body() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench-apps:", err)
		return 1
	}
	return 0
}

// settings are the flags.
type settings struct {
	rounds     int
	seconds    int
	quick      bool
	programs   *regexp.Regexp
	placements []string
}

// partial is the first line of a report that lacks lines: hack/measurements leaves the
// document alone then.
const partial = "<!-- partial -->"

func (s settings) partial() bool {
	return s.quick || s.programs.String() != "" || len(s.placements) < len(placementNames())
}

func parse(args []string, stderr io.Writer) (settings, error) {
	var s settings
	names := placementNames()
	flags := flag.NewFlagSet("bench-apps", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&s.rounds, "rounds", 5, "`times` that each variant is measured")
	flags.IntVar(&s.seconds, "seconds", 2, "how long one measurement counts")
	flags.BoolVar(&s.quick, "quick", false, "only one or two lines of each program, not pinned, 2 rounds of 1 second, unless other flags say otherwise")
	programs := flags.String("programs", "", "regular `expression` for the lines to measure, such as ^redis (default all)")
	placements := flags.String("placements", "", fmt.Sprintf("where to measure, separated by commas (default %s)", strings.Join(names, ",")))
	if err := flags.Parse(args); err != nil {
		return settings{}, err
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if s.quick {
		if !given["rounds"] {
			s.rounds = 2
		}
		if !given["seconds"] {
			s.seconds = 1
		}
		names = names[:1]
	}
	s.placements = names
	if *placements != "" {
		s.placements = strings.Split(*placements, ",")
	}
	for _, name := range s.placements {
		if !slices.Contains(placementNames(), name) {
			return settings{}, fmt.Errorf("placement %q: accepted are %q", name, placementNames())
		}
	}
	var err error
	if s.programs, err = regexp.Compile(*programs); err != nil {
		return settings{}, err
	}
	if flags.NArg() > 0 || s.rounds < 1 || s.seconds < 1 {
		return settings{}, errors.New("accepted are -rounds from 1, -seconds from 1, and nothing else; see -h")
	}
	return s, nil
}

// placementNames are in the order of the tables.
func placementNames() []string { return []string{"unpinned", "one-core", "two-cores"} }

// placements makes those with these names from the CPUs there are. Two cores need two.
func placements(names []string, cpus []int) (all []placement) {
	for _, name := range names {
		switch {
		case name == "unpinned":
			all = append(all, placement{"Not pinned", nil})
		case name == "one-core":
			all = append(all, placement{"All on one core", map[side]int{server: cpus[0], proxy: cpus[0], client: cpus[0]}})
		case len(cpus) > 1:
			all = append(all, placement{"Client on another core", map[side]int{server: cpus[0], proxy: cpus[0], client: cpus[1]}})
		}
	}
	return all
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	began := time.Now()
	s, err := parse(args, stderr)
	if err != nil {
		return err
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return err
	}
	leave, err := overlay.Enter(strings.Split(cmp.Or(os.Getenv("PODSHUNT_APPS"), ".cache/apps:.cache/apps-bench"), ":")...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, leave()) }()
	n, err := newNode(ctx, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	b := &bench{
		node: n, settings: s, instances: map[string][]*instance{}, missing: map[string]error{}, noWatch: datapath.CheckWatch(),
		progress: func(p placement, what string) {
			fmt.Fprintf(stderr, "%4.0fs  %s: %s\n", time.Since(began).Seconds(), p.name, what)
		},
	}
	var parts []part
	for _, where := range placements(s.placements, cpus) {
		p := part{placement: where}
		for _, program := range programs() {
			lines, err := b.measure(ctx, program, where)
			if err != nil {
				return err
			}
			p.lines = append(p.lines, lines...)
		}
		parts = append(parts, p)
	}
	return b.report(stdout, args, parts, time.Since(began))
}

// allowedCPUs lists the CPUs that this process may run on.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read CPU affinity: %w", err)
	}
	var cpus []int
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// SPDX-License-Identifier: Apache-2.0

// Bench measures what the shortcut is worth on this machine and prints it as
// Markdown: two pods on one bridge, plain TCP, the shortcut and a unix socket in
// turn. It needs root and touches only what it makes itself.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/measure"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

func main() {
	os.Exit(measure.Main(func() int { return sandbox.Main(body) }))
}

func body() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// settings are the flags.
type settings struct {
	rounds      int
	duration    time.Duration
	kinds       []measure.Kind
	cores       int
	nonBlocking bool
	budget      uint
}

func parse(args []string, stderr io.Writer) (settings, error) {
	var s settings
	all := []measure.Kind{measure.PingPong, measure.Stream, measure.Connect}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&s.rounds, "rounds", 9, "`times` that each variant is measured")
	flags.DurationVar(&s.duration, "duration", 200*time.Millisecond, "how long one measurement counts")
	flags.IntVar(&s.cores, "cores", 0, "1: only with both ends on one core, 2: only across two; 0: both")
	flags.BoolVar(&s.nonBlocking, "non-blocking", false, "ping-pong and connections wait by poll(2), as streams always do, not inside of read(2)")
	flags.UintVar(&s.budget, "budget", uint(datapath.DefaultConfig().Budget), "`bytes` that a receiver may leave unread, as --budget of the agent")
	flags.Func("only", "kinds to measure, separated by commas (default ping-pong,stream,connect)", func(list string) error {
		for name := range strings.SplitSeq(list, ",") {
			if !slices.Contains(all, measure.Kind(name)) {
				return fmt.Errorf("%q: accepted are %q", name, all)
			}
			s.kinds = append(s.kinds, measure.Kind(name))
		}
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return settings{}, err
	}
	if s.kinds == nil {
		s.kinds = all
	}
	if flags.NArg() > 0 || s.rounds < 1 || s.duration <= 0 || s.cores < 0 || s.cores > 2 {
		return settings{}, errors.New("accepted are -rounds from 1, -duration above 0, -cores 0 to 2, and nothing else; see -h")
	}
	return s, nil
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
	b, err := newBench(s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()

	todo := slices.DeleteFunc(rows(), func(r row) bool { return !slices.Contains(s.kinds, r.kind) })
	bare := slices.DeleteFunc(slices.Clone(todo), func(r row) bool { return !r.bare })
	oneCore := placement{"Both ends on one core", cpus[0], cpus[0]}
	placements := []placement{oneCore}
	if len(cpus) > 1 && s.cores != 1 {
		placements = append(placements, placement{"Across two cores", cpus[0], cpus[1]})
	}
	if s.cores == 2 {
		placements = placements[1:]
	}

	progress := func(p placement, r row) {
		fmt.Fprintf(stderr, "%4.0fs  %s: %s\n", time.Since(began).Seconds(), p.name, r.name())
	}
	measureAll := func(p placement, rows []row, variants func(row) []variant) (map[row]table, error) {
		all := map[row]table{}
		for _, r := range rows {
			progress(p, r)
			t, err := b.alternate(ctx, r, p, variants(r), s.rounds)
			if err != nil {
				return nil, err
			}
			all[r] = t
		}
		return all, nil
	}
	onlyTCP := func(row) []variant { return []variant{tcp} }

	before, err := measureAll(oneCore, bare, onlyTCP)
	if err != nil {
		return err
	}
	if err := b.load(); err != nil {
		return err
	}
	results := make([]map[row]table, len(placements))
	for i, p := range placements {
		if results[i], err = measureAll(p, todo, row.variants); err != nil {
			return err
		}
	}
	loaded, err := measureAll(oneCore, bare, onlyTCP)
	if err != nil {
		return err
	}
	if err := b.unload(ctx); err != nil {
		return err
	}
	after, err := measureAll(oneCore, bare, onlyTCP)
	if err != nil {
		return err
	}

	if err := writeHeader(stdout, b.observer, args, s); err != nil {
		return err
	}
	for i, p := range placements {
		writeResults(stdout, p, todo, results[i])
	}
	writeBare(stdout, bare, before, loaded, after)
	_, err = fmt.Fprintf(stdout, "\nThe run took %.0f s.\n", time.Since(began).Seconds())
	return err
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

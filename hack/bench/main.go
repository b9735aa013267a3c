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
	"maps"
	"os"
	"os/signal"
	"regexp"
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
	rounds         int
	length, warmUp time.Duration
	rows           *regexp.Regexp
	cores          []string
	budget         uint
	joinAfter      uint
	svg            string
}

// allCores are the names of the placements.
func allCores() []string { return []string{"one", "two", "free"} }

func parse(args []string, stderr io.Writer) (settings, error) {
	s := settings{rows: regexp.MustCompile(""), cores: allCores()}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&s.rounds, "rounds", 9, "`times` that each variant is measured; below 6 there are no intervals")
	flags.DurationVar(&s.length, "length", 100*time.Millisecond, "how long one measurement counts")
	flags.DurationVar(&s.warmUp, "warm-up", 100*time.Millisecond, "how long each runs before, for TCP to open its windows, and for the shortcut to see the receivers read and to compare streams")
	flags.UintVar(&s.joinAfter, "join-after", uint(datapath.DefaultConfig().JoinAfter), "`segments` of data before a connection joins, as --join-after of the agent")
	flags.UintVar(&s.budget, "budget", uint(datapath.DefaultConfig().Budget), "`bytes` that a receiver may leave unread, as --budget of the agent")
	flags.StringVar(&s.svg, "svg", "", "`file` for a picture of the ping-pongs with TCP_NODELAY of the first placement")
	flags.Func("rows", "`regexp` of the rows to measure, such as '^ping-pong 1 B, nodelay' (default all)", func(value string) (err error) {
		s.rows, err = regexp.Compile(value)
		return err
	})
	flags.Func("cores", "`list` of where the ends run: one core, two, or free to run on any (default one,two,free)", func(list string) error {
		s.cores = strings.Split(list, ",")
		for _, name := range s.cores {
			if !slices.Contains(allCores(), name) {
				return fmt.Errorf("%q: accepted are %q", name, allCores())
			}
		}
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return settings{}, err
	}
	if flags.NArg() > 0 || s.rounds < 1 || s.length <= 0 || s.warmUp < 0 {
		return settings{}, errors.New("accepted are -rounds from 1, -length above 0, -warm-up from 0, and nothing else; see -h")
	}
	return s, nil
}

// place is where a row was measured.
type place struct {
	placement placement
	row       row
}

// results are of the places in which TCP is compared; before, loaded and after of the
// bare rows on one core.
type results struct {
	todo []place
	// partial is true if todo has not all that this machine can measure.
	partial               bool
	compared              map[place]table
	before, loaded, after map[place]table
	// programs are the runs on the same rows, each for so long.
	programs map[place]ofPrograms
	ran      time.Duration
}

// partial is the first line of a report that lacks rows: hack/measurements leaves the
// document alone then.
const partial = "<!-- partial -->"

// choose lists the places that were asked for, and says if there are more.
func (s settings) choose(cpus []int, noWatch bool) (todo []place, partial bool, err error) {
	asked, err := placements(cpus, s.cores)
	if err != nil {
		return nil, false, err
	}
	all, err := placements(cpus, allCores())
	if err != nil {
		return nil, false, err
	}
	for _, p := range all {
		for _, row := range rows(noWatch) {
			switch {
			case !p.has(row):
			case slices.Contains(asked, p) && s.rows.MatchString(row.title()):
				todo = append(todo, place{p, row})
			default:
				partial = true
			}
		}
	}
	if todo == nil {
		return nil, false, fmt.Errorf("rows %q: none has such a name in these placements", s.rows)
	}
	return todo, partial, nil
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
	r := results{compared: map[place]table{}, programs: map[place]ofPrograms{}}
	noWatch := datapath.CheckWatch()
	if r.todo, r.partial, err = s.choose(cpus, noWatch != nil); err != nil {
		return err
	}
	b, err := newBench(s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	progress := func(p place) {
		fmt.Fprintf(stderr, "%4.0fs  %s: %s\n", time.Since(began).Seconds(), p.placement.name, p.row.title())
	}
	if err := b.measureAll(ctx, &r, progress); err != nil {
		return err
	}
	if r.partial {
		fmt.Fprintln(stdout, partial)
	}
	if err := b.writeHeader(stdout, args); err != nil {
		return err
	}
	if noWatch != nil {
		writeNoWatch(stdout, noWatch)
	}
	if s.svg != "" {
		if err := r.drawLatency(stdout, s.svg); err != nil {
			return err
		}
	}
	r.write(stdout)
	_, err = fmt.Fprintf(stdout, "\nThe run took %.0f s.\n", time.Since(began).Seconds())
	return err
}

// measureAll fills in the results.
func (b *bench) measureAll(ctx context.Context, r *results, progress func(place)) error {
	bare := func() (map[place]table, error) {
		all := map[place]table{}
		for _, p := range r.bare() {
			progress(p)
			t, err := b.alternate(ctx, p, []variant{tcp})
			if err != nil {
				return nil, err
			}
			all[p] = t
		}
		return all, nil
	}
	var err error
	if r.before, err = bare(); err != nil {
		return err
	}
	others, err := programIDs()
	if err != nil {
		return err
	}
	r.ran = b.settings.length + b.settings.warmUp
	for _, m := range modes() {
		if err := b.load(m); err != nil {
			return err
		}
		for _, p := range r.todo {
			if p.row.mode != m {
				continue
			}
			progress(p)
			if r.compared[p], err = b.alternate(ctx, p, p.row.variants()); err != nil {
				return err
			}
		}
		if m == usual {
			if r.loaded, err = bare(); err != nil {
				return err
			}
		}
		counted, err := b.countRuns(ctx, r.bare(), m, others)
		if err != nil {
			return err
		}
		maps.Copy(r.programs, counted)
		if err := b.unload(ctx); err != nil {
			return err
		}
	}
	r.after, err = bare()
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

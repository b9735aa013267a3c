// SPDX-License-Identifier: Apache-2.0

// What a run of each kernel program takes, by the kernel's own statistics.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// runs counts the runs of a program, and the nanoseconds that they took, per round.
type runs struct{ count, ns []float64 }

// perRun is the median of the rounds' times for one run, in nanoseconds.
func (r *runs) perRun() float64 {
	each := make([]float64, len(r.ns))
	for i, ns := range r.ns {
		each[i] = ns / r.count[i]
	}
	slices.Sort(each)
	return middle(each)
}

// ofPrograms are the runs of a place by the program's name.
type ofPrograms map[string]*runs

// countRuns measures the rows of a mode among places once more, with the statistics on. These
// take time themselves, so nothing else is made of that.
func (b *bench) countRuns(ctx context.Context, places []place, m mode, before []ebpf.ProgramID) (_ map[place]ofPrograms, err error) {
	stop, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, fmt.Errorf("turn on the statistics of BPF programs: %w", err)
	}
	defer func() { err = errors.Join(err, stop.Close()) }()
	all := map[place]ofPrograms{}
	for _, p := range places {
		if p.row.mode != m {
			continue
		}
		found := ofPrograms{}
		for range b.settings.rounds {
			from, err := programStats(before)
			if err != nil {
				return nil, err
			}
			if _, err := b.measure(ctx, p.row, p.placement, shortcut); err != nil {
				return nil, err
			}
			to, err := programStats(before)
			if err != nil {
				return nil, err
			}
			for name, s := range to {
				if n := s.RunCount - from[name].RunCount; n > 0 {
					if found[name] == nil {
						found[name] = &runs{}
					}
					found[name].count = append(found[name].count, float64(n))
					found[name].ns = append(found[name].ns, float64((s.Runtime - from[name].Runtime).Nanoseconds()))
				}
			}
		}
		all[p] = found
	}
	return all, nil
}

// programIDs lists the programs of this machine.
func programIDs() (ids []ebpf.ProgramID, err error) {
	for id := ebpf.ProgramID(0); ; {
		id, err = ebpf.ProgramGetNextID(id)
		if errors.Is(err, unix.ENOENT) {
			return ids, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list BPF programs: %w", err)
		}
		ids = append(ids, id)
	}
}

// programStats are those of the programs that are not in before, by name.
func programStats(before []ebpf.ProgramID) (map[string]ebpf.ProgramStats, error) {
	ids, err := programIDs()
	if err != nil {
		return nil, err
	}
	all := map[string]ebpf.ProgramStats{}
	for _, id := range ids {
		if slices.Contains(before, id) {
			continue
		}
		name, stats, err := statsOf(id)
		if errors.Is(err, unix.ENOENT) { // another process's, and gone
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("statistics of BPF program %d: %w", id, err)
		}
		all[name] = stats
	}
	return all, nil
}

func statsOf(id ebpf.ProgramID) (string, ebpf.ProgramStats, error) {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "", ebpf.ProgramStats{}, err
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return "", ebpf.ProgramStats{}, err
	}
	stats, err := program.Stats()
	if err != nil {
		return "", ebpf.ProgramStats{}, err
	}
	return info.Name, *stats, nil
}

// writeRuns writes what the programs take.
func (r *results) writeRuns(w io.Writer) {
	lines := [][]string{{"", "program", "a run", "runs per second"}}
	for _, p := range r.bare() {
		programs := r.programs[p]
		for _, name := range slices.Sorted(maps.Keys(programs)) {
			counts := slices.Sorted(slices.Values(programs[name].count))
			perSecond := middle(counts) / r.ran.Seconds()
			lines = append(lines, []string{p.row.title(), name, fmt.Sprintf("%.0f ns", programs[name].perRun()), fmt.Sprintf("%.0f", perSecond)})
		}
	}
	if len(lines) == 1 {
		return
	}
	fmt.Fprint(w, "\n### What a run of each program takes, on one core\n\nBy the kernel's statistics (BPF_STATS_RUN_TIME), which are not on in the tables above, and take some 20 ns of each run themselves.\n\n")
	write(w, lines)
}

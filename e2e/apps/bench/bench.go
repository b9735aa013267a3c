// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/podshunt/podshunt/e2e/apps/overlay"
)

// few is the number of requests of a run that does not count.
const few = 20000

// sample is one run of a client.
type sample struct {
	reading
	// round says which samples were taken one after the other.
	round int
	// cpu is the processor time of each side in microseconds per request, softirq that
	// of the machine in interrupts and softirqs.
	cpu     map[side]float64
	softirq float64
	// share is the part of the bytes sent that took the shortcut.
	share float64
}

// line is a line of the tables: the samples of a workload by variant, one per round.
type line struct {
	workload
	variants []variant
	samples  map[variant][]sample
	// failures say why there are fewer samples than rounds.
	failures []string
}

// bench measures programs on a node.
type bench struct {
	node     *node
	settings settings
	// instances are made once, with their files.
	instances map[string][]*instance
	// measured are programs that run, with their versions.
	measured []string
	// missing are programs that cannot run here, with the reason.
	missing map[string]error
	// noWatch is why connections can only join at their handshake, or nil.
	noWatch error
	// progress is called before each workload.
	progress func(placement, string)
}

// measure measures a program with its sides placed, and returns its lines.
func (b *bench) measure(ctx context.Context, p program, where placement) ([]*line, error) {
	lines := b.lines(p)
	if len(lines) == 0 {
		return nil, nil
	}
	instances, err := b.prepare(ctx, p)
	if err != nil {
		b.missing[p.name] = err
		return nil, ctx.Err()
	}
	requests := map[*line]int{}
	for round := range b.settings.rounds {
		if err := b.round(ctx, p, instances, where, round, lines, requests); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			for _, l := range lines {
				l.failures = append(l.failures, err.Error())
			}
		}
	}
	return lines, nil
}

// lines are those that the settings ask for.
func (b *bench) lines(p program) (lines []*line) {
	for _, w := range p.workloads {
		if b.settings.quick && !w.quick || !b.settings.programs.MatchString(w.name) {
			continue
		}
		lines = append(lines, &line{workload: w, variants: p.variants(), samples: map[variant][]sample{}})
	}
	return lines
}

func (p program) variants() []variant {
	if p.hasSocket {
		return []variant{tcp, shortcut, unixSocket}
	}
	return []variant{tcp, shortcut}
}

// prepare makes the instances of a program, once.
func (b *bench) prepare(ctx context.Context, p program) ([]*instance, error) {
	if found, ok := b.instances[p.name]; ok {
		return found, nil
	}
	for _, name := range p.needs {
		if _, err := exec.LookPath(name); err != nil {
			return nil, err
		}
	}
	var made []*instance
	for i, v := range p.variants() {
		dir := filepath.Join(b.node.dir, strings.ReplaceAll(strings.ToLower(fmt.Sprint(p.name, "-", i)), " ", "-"))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if err := os.Chown(dir, overlay.AccountID, overlay.AccountID); err != nil {
			return nil, err
		}
		first := uint16(7000 + 10*i)
		in := &instance{variant: v, dir: dir, ports: [2]uint16{first, first + 1}, socket: filepath.Join(dir, "server.sock"), node: b.node}
		in.run = func(at side, stdin io.Reader, command ...string) (string, error) {
			ctx, cancel := context.WithTimeout(ctx, startTimeout)
			defer cancel()
			return b.node.run(ctx, in.dir, v, placement{}, process{side: at, command: command}, stdin)
		}
		in.address = netip.AddrPortFrom(b.node.pods[server].IPv4, in.ports[0])
		if p.fill != nil {
			if err := p.fill(in); err != nil {
				return nil, err
			}
		}
		servers := p.servers(*in)
		in.address = b.node.address(servers[len(servers)-1])
		if p.begin != nil {
			stop, err := b.start(ctx, p, in, placement{})
			if err == nil {
				err = errors.Join(p.begin(in), stop())
			}
			if err != nil {
				return nil, err
			}
		}
		made = append(made, in)
	}
	b.instances[p.name] = made
	b.measured = append(b.measured, p.named())
	return made, nil
}

// start starts the servers of an instance.
func (b *bench) start(ctx context.Context, p program, in *instance, where placement) (stop func() error, err error) {
	var stops []func() error
	stop = func() (err error) {
		for _, s := range slices.Backward(stops) {
			err = errors.Join(err, s())
		}
		return err
	}
	for _, process := range p.servers(*in) {
		s, err := b.node.serve(ctx, in.dir, in.variant, where, process)
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		stops = append(stops, s)
		if process.ready != nil {
			ctx, cancel := context.WithTimeout(ctx, startTimeout)
			err := process.ready(ctx, *in)
			cancel()
			if err != nil {
				return nil, errors.Join(err, stop())
			}
		}
	}
	return stop, nil
}

// round starts all instances, has each workload run once against each of them, and
// ends them. Every second round goes backwards, so that no variant always has the same
// one before it.
func (b *bench) round(ctx context.Context, p program, instances []*instance, where placement, round int, lines []*line, requests map[*line]int) (err error) {
	for _, in := range instances {
		stop, err2 := b.start(ctx, p, in, where)
		if err2 != nil {
			return errors.Join(err, err2)
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	if round%2 == 1 {
		instances = slices.Clone(instances)
		slices.Reverse(instances)
	}
	for _, l := range lines {
		b.progress(where, fmt.Sprintf("%s, round %d", l.name, round+1))
		for _, in := range instances {
			if l.counted && requests[l] == 0 {
				// A run that does not count says how many requests take the time.
				requests[l] = few
				if s, err := b.once(ctx, l, in, where, few); err == nil {
					requests[l] = max(few, int(s.rate)*b.settings.seconds)
				}
			}
			s, err := b.once(ctx, l, in, where, requests[l])
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				l.failures = append(l.failures, fmt.Sprintf("%s: %v", in.variant, err))
				continue
			}
			s.round = round
			l.samples[in.variant] = append(l.samples[in.variant], s)
		}
	}
	return nil
}

// once runs a workload.
func (b *bench) once(ctx context.Context, l *line, in *instance, where placement, requests int) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Duration(b.settings.seconds)*time.Second+grace)
	defer cancel()
	run := func(command []string) (string, error) {
		return b.node.run(ctx, in.dir, in.variant, where, process{side: client, command: command}, nil)
	}
	if l.before != nil {
		for _, command := range l.before(*in) {
			if _, err := run(command); err != nil {
				return sample{}, err
			}
		}
	}
	sent, err := b.node.traffic(ctx)
	if err != nil {
		return sample{}, err
	}
	before, err := b.node.count(in.variant)
	if err != nil {
		return sample{}, err
	}
	out, err := run(l.client(*in, amount{b.settings.seconds, requests}))
	after, err2 := b.node.count(in.variant)
	if err := errors.Join(err, err2); err != nil {
		return sample{}, err
	}
	r, err := l.read(*in, out)
	if err != nil {
		return sample{}, err
	}
	s := sample{reading: r, cpu: map[side]float64{}}
	perRequest := func(d time.Duration) float64 { return float64(d) / 1e3 / r.requests }
	for _, at := range sides() {
		s.cpu[at] = perRequest(after.cpu[at] - before.cpu[at])
	}
	s.softirq = perRequest(after.softirq - before.softirq)
	now, err := b.node.traffic(ctx)
	if all := now.sent - sent.sent; all > 0 {
		if in.variant != shortcut {
			return sample{}, fmt.Errorf("this is not what was to be measured: paired connections have sent %d bytes", all)
		}
		s.share = float64(now.shortcut-sent.shortcut) / float64(all)
	}
	return s, err
}

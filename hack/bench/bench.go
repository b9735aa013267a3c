// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/measure"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// port is the server's.
const port = 8000

// sample is one measurement.
type sample struct {
	measure.Result
	// share is the part of the bytes sent that took the shortcut.
	share float64
}

// table holds the samples of a row by variant, one per round.
type table map[variant][]sample

// bench is two pods and two cgroups, of which one is watched by podshunt. The
// receive observer is attached to the whole machine.
type bench struct {
	sandbox        *sandbox.Sandbox
	client, server *sandbox.Pod
	plain, watched string
	settings       settings
	datapath       *datapath.Datapath // nil while nothing is loaded
	cookies        []uint64           // of client and server
	observer       string
}

// receiveBuffer is the kernel's own tcp_rmem on machines with some gigabytes of memory.
// A machine may be tuned, as that of the tests is, but users' mostly are not.
const receiveBuffer = "4096 131072 6291456"

func newBench(s settings) (_ *bench, err error) {
	b := &bench{settings: s}
	if b.sandbox, err = sandbox.New(sandbox.Config{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	for name, dir := range map[string]*string{"plain": &b.plain, "watched": &b.watched} {
		if *dir, err = b.sandbox.AddCgroup(name); err != nil {
			return nil, err
		}
	}
	if b.client, err = b.sandbox.AddPod("client", sandbox.PodOptions{}); err != nil {
		return nil, err
	}
	if b.server, err = b.sandbox.AddPod("server", sandbox.PodOptions{}); err != nil {
		return nil, err
	}
	for _, p := range []*sandbox.Pod{b.client, b.server} {
		cookie, err := p.Cookie()
		if err != nil {
			return nil, err
		}
		b.cookies = append(b.cookies, cookie)
		if err := p.Sysctl("net.ipv4.tcp_rmem", receiveBuffer); err != nil {
			return nil, err
		}
		// Else the thousands of connections of one measurement would still be
		// around, in TIME_WAIT, to take ports and time from the next.
		if err := p.Sysctl("net.ipv4.tcp_max_tw_buckets", "0"); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// close takes everything down; the measurements have ended.
func (b *bench) close() error {
	var errs []error
	if b.datapath != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		errs = append(errs, b.unload(ctx))
	}
	return errors.Join(append(errs, b.sandbox.Close())...)
}

// load attaches podshunt to the watched cgroup, with the settings of a mode.
func (b *bench) load(m mode) error {
	cfg := datapath.DefaultConfig()
	cfg.Cgroup = b.watched
	cfg.Budget, cfg.PodBudget = uint32(b.settings.budget), max(cfg.PodBudget, uint64(b.settings.budget))
	cfg.JoinAfter = uint32(b.settings.joinAfter)
	m.change(&cfg)
	d, err := b.sandbox.OpenDatapath(cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	b.datapath, b.observer = d, d.Observer()
	go func() {
		if err := d.JoinWatched(context.Background()); err != nil { // until it is unloaded
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}()
	return nil
}

func (b *bench) unload(ctx context.Context) error {
	d := b.datapath
	b.datapath = nil
	return sandbox.UnloadDatapath(ctx, d)
}

// alternate measures the variants in turn. Every second round goes backwards,
// so that none always has the same one before it.
func (b *bench) alternate(ctx context.Context, p place, variants []variant) (table, error) {
	t := table{}
	for range b.settings.rounds {
		for _, v := range variants {
			s, err := b.measure(ctx, p.row, p.placement, v)
			if err != nil {
				return nil, err
			}
			t[v] = append(t[v], s)
		}
		variants = slices.Clone(variants)
		slices.Reverse(variants)
	}
	return t, nil
}

func (b *bench) measure(ctx context.Context, r row, p placement, v variant) (sample, error) {
	spec := measure.Spec{
		Kind: r.kind, Size: r.size, Requests: r.requests, Duration: b.settings.length, WarmUp: b.settings.warmUp,
		NonBlocking: !r.mode.blocks(), NoDelay: r.noDelay,
		Listen: netip.AddrPortFrom(b.server.IPv4, port).String(),
	}
	if v == unixSocket {
		spec.Listen = filepath.Join(b.sandbox.Base, "server.sock")
	}
	cgroup := b.watched
	if v == tcp || v == tcpAgain || v == unixSocket {
		cgroup = b.plain
	}
	if b.datapath != nil {
		if err := b.prepare(v); err != nil {
			return sample{}, err
		}
	}
	before, err := b.count()
	if err != nil {
		return sample{}, err
	}
	result, err := measure.Run(ctx, spec, in(b.server, cgroup, p.server), in(b.client, cgroup, p.client))
	if err != nil {
		return sample{}, err
	}
	after, err := b.count()
	if err != nil {
		return sample{}, err
	}
	counted := after.minus(before)
	// How much then took the shortcut is for the reader of the table to judge.
	if counted.paired > 0 && v != shortcut || counted.paired == 0 && v == shortcut && !r.mayEndEarly() {
		return sample{}, fmt.Errorf("%s: this is not what was to be measured: %d connections paired", r.title(), counted.paired)
	}
	s := sample{Result: result}
	// Connections that have not joined are not counted by podshunt.
	if sent := max(counted.sent, 2*uint64(result.Requests)); sent > 0 {
		s.share = float64(counted.shortcut) / float64(sent)
	}
	return s, nil
}

// prepare makes the pods take part as the variant wants, and forgets what was learned
// of the server's port: no measurement profits or suffers from the ones before.
func (b *bench) prepare(v variant) error {
	verdict := rule.Allow
	if v == watched {
		verdict = rule.Hold
	}
	if err := b.datapath.SetPolicy(sandbox.Between(verdict, b.cookies...)); err != nil {
		return err
	}
	for i, takesPart := range []bool{v.both() || v == clientOnly, v.both() || v == serverOnly} {
		change := b.datapath.Release
		if takesPart {
			change = b.datapath.Enrol
		}
		if err := change(b.cookies[i]); err != nil {
			return err
		}
	}
	_, err := b.datapath.Forget(func(uint64, uint64, uint16) bool { return true })
	return err
}

// in places an end in a pod, a cgroup and on a CPU.
func in(p *sandbox.Pod, cgroup string, cpu int) measure.End {
	return measure.End{CPU: cpu, Start: func(cmd *exec.Cmd) error { return sandbox.StartIn(cgroup, p.Start, cmd) }}
}

// counts are what the kernel programs have counted: connections that were paired, and
// bytes that their sockets have sent since they joined.
type counts struct {
	paired, shortcut, sent uint64
}

func (c counts) minus(o counts) counts {
	return counts{c.paired - o.paired, c.shortcut - o.shortcut, c.sent - o.sent}
}

func (b *bench) count() (counts, error) {
	var c counts
	if b.datapath == nil {
		return c, nil
	}
	outcomes, err := b.datapath.Outcomes()
	for _, o := range outcomes {
		switch {
		case o.String() == "connection_paired":
			c.paired = o.Count
		case o.String() == "message_shortcut":
			c.shortcut = o.Bytes
			c.sent += o.Bytes
		case o.Kind == api.OutcomeMessage:
			c.sent += o.Bytes
		}
	}
	return c, err
}

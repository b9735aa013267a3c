// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// BenchmarkSweep has how long a sweep of 9,000 flows takes, and how long a call that
// needs the lock which ADD needs waits meanwhile: of each sweep the longest, and of
// those the shortest, since a machine with other work to do makes them longer.
func BenchmarkSweep(b *testing.B) {
	const flows = 9000
	n := mustNode(b, nil)
	pods, cookies := n.MustEnrol(b, "client", "server")
	n.MustSetPolicy(b, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(b, pods[1].Netns, pods[1].IPv4)
	rawPair(b, pods[0], l, address)
	open := n.mustFlow(b)
	pinned := n.mustPinned(b, bpf.ShortcutMapFlows)
	// None of them is ended: each has the sockets of the one that is open.
	made := bpf.ShortcutFlow{Cookie: [2]uint64{open.ID, open.ServerID}, Netns: [2]uint64{cookies[0], cookies[1]}}
	for i := range uint64(flows - 1) {
		if err := pinned.Put(1<<60+i, made); err != nil {
			b.Fatal(err)
		}
	}
	shortest := time.Hour
	for b.Loop() {
		var longest time.Duration
		swept := make(chan error, 1)
		go func() { swept <- n.Sweep(0) }()
		for len(swept) == 0 {
			begin := time.Now()
			if _, err := n.Enrolled(); err != nil {
				b.Fatal(err)
			}
			longest = max(longest, time.Since(begin))
		}
		if err := <-swept; err != nil {
			b.Fatal(err)
		}
		shortest = min(shortest, longest)
	}
	b.ReportMetric(float64(shortest.Microseconds()), "wait-us")
	if got := n.usage(b)["flows"]; got != flows {
		b.Errorf("got %d flows after the sweeps, want %d", got, flows)
	}
	for i := range uint64(flows - 1) {
		if err := pinned.Delete(1<<60 + i); err != nil {
			b.Fatal(err)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

var (
	others    = flag.Int("others", 0, "connections that have joined before BenchmarkJoin begins, and stay open")
	otherPods = flag.Int("other-pods", 0, "pods that take part beside the two of BenchmarkJoin")
)

// BenchmarkJoin measures how soon a connection joins that has earned it, beside the others.
func BenchmarkJoin(b *testing.B) {
	if noWatch(b) {
		return
	}
	mustHaveFiles(b, *others)
	n := mustNode(b, func(c *datapath.Config) {
		watched(c)
		c.MaxFlows = max(c.MaxFlows, 4*uint32(*others)) // as no pod gets more than half
	})
	pods, cookies := n.MustEnrol(b, "client", "server")
	for i := range *otherPods {
		n.MustEnrol(b, fmt.Sprint("other", i))
	}
	n.MustSetPolicy(b, sandbox.Between(rule.Allow, cookies...))
	n.joinWatched(b)
	var l *rawSocket
	var address netip.AddrPort
	var clients, servers []*rawSocket
	before := n.counts(b)
	for i := range *others + 1 {
		if i%10_000 == 0 { // a client has some 28,000 ports for each listener
			l, address = mustRawListen(b, pods[1].Netns, pods[1].IPv4)
		}
		if i < *others {
			c, s := rawPair(b, pods[0], l, address)
			sandboxtest.MustPing(b, c, s, joinAfter, 100)
			clients, servers = append(clients, c), append(servers, s)
		}
	}
	waitUntil(b, "the others to join", func() bool {
		for i := range clients {
			sandboxtest.MustPing(b, clients[i], servers[i], 1, 100)
		}
		return n.since(b, before)["connection_paired"] == uint64(*others)
	})
	var took []time.Duration
	for b.Loop() {
		before := n.counts(b)
		c, s := rawPair(b, pods[0], l, address)
		sandboxtest.MustPing(b, c, s, joinAfter/2, 100)
		began := time.Now()
		for n.since(b, before)["connection_paired"] == 0 {
			sandboxtest.MustPing(b, c, s, 1, 100)
		}
		took = append(took, time.Since(began))
		c.mustClose(b)
		s.mustClose(b)
		waitUntil(b, "the flow to end", func() bool { return n.usage(b)["flows"] == *others })
	}
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2].Seconds()*1000, "ms/median")
	b.ReportMetric(took[len(took)*99/100].Seconds()*1000, "ms/p99")
	b.ReportMetric(0, "ns/op")
}

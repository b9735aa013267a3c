// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustJoin lets open connections join, and returns how many did.
func (n *node) mustJoin(tb testing.TB, pods ...*sandbox.Pod) int {
	tb.Helper()
	if err := n.NoJoin(); err != nil {
		tb.Skip(err)
	}
	var netns []datapath.Netns
	for _, p := range pods {
		cookie, err := p.Cookie()
		if err != nil {
			tb.Fatal(err)
		}
		netns = append(netns, datapath.Netns{Cookie: cookie, Path: p.Path})
	}
	joined, err := n.Join(tb.Context(), netns)
	if err != nil {
		tb.Fatal(err)
	}
	return joined
}

// TestJoin lets connections join in the middle of random traffic both ways, at a random
// moment, and compares every byte.
func TestJoin(t *testing.T) {
	connections := 64
	if testing.Short() {
		connections = 16
	}
	for _, tc := range []struct {
		name     string
		network  string
		loopback bool
	}{
		{"IPv4", "tcp4", false},
		{"IPv6", "tcp6", false},
		{"loopback", "tcp4", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, atOnce)
			pods, cookies := n.MustEnrol(t, "client", "server")
			from, listen := pods[0], pods[1].IPv4.String()
			switch {
			case tc.loopback:
				from, listen = pods[1], "127.0.0.1"
			case tc.network == "tcp6":
				listen = pods[1].IPv6.String()
			}
			l := sandboxtest.MustListen(t, pods[1], tc.network, net.JoinHostPort(listen, "0"))
			var all []func() error
			for i := range connections {
				c, s := sandboxtest.MustConnect(t, from.Netns, tc.network, l.Addr().String(), l)
				random := rand.New(rand.NewPCG(uint64(i), 2))
				one := func(seed byte) traffic {
					return traffic{
						seed: seed, bytes: 1<<20 + random.IntN(1<<20), maxWrite: 1 + random.IntN(32<<10), maxRead: 1 + random.IntN(64<<10),
						writerPause: 1 + random.IntN(64<<10), readerPause: 1 + random.IntN(256<<10),
					}
				}
				toServer, toClient := one(byte(i)), one(byte(i+100))
				all = append(all, func() error {
					if err := exchange(c, s, toServer, toClient); err != nil {
						return fmt.Errorf("connection %d: %w", i, err)
					}
					return finish(c, s)
				})
			}
			moment := time.Duration(rand.IntN(20)) * time.Millisecond
			before := n.counts(t)
			joined := 0
			all = append(all, func() error {
				time.Sleep(moment)
				n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
				joined = n.mustJoin(t, pods...)
				return nil
			})
			if err := together(all...); err != nil {
				t.Fatal(err)
			}
			got := n.since(t, before)
			t.Logf("%d joined after %v: %v", joined, moment, got)
			if joined < connections/2 || got["connection_joined"] != uint64(joined) {
				t.Errorf("got %d joined and a counter of %d, want most of %d", joined, got["connection_joined"], connections)
			}
			if got["message_shortcut"] == 0 {
				t.Error("nothing took the shortcut")
			}
		})
	}
}

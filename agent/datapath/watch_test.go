// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"context"
	"errors"
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

// joinAfter is how long connections are watched here, in segments.
const joinAfter = 8

func watched(c *datapath.Config) {
	atOnce(c)
	c.JoinAfter = joinAfter
}

// joinWatched runs JoinWatched until the end of the test.
func (n *node) joinWatched(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	d := n.Datapath
	go func() { ended <- d.JoinWatched(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			tb.Error(err)
		}
	})
}

// TestWatch lets watched connections join in the middle of random traffic, and compares
// every byte.
func TestWatch(t *testing.T) {
	both := func(toServer, toClient traffic) (traffic, traffic) { return toServer, toClient }
	for _, tc := range []struct {
		name     string
		network  string
		loopback bool
		oneCPU   bool
		ways     func(toServer, toClient traffic) (traffic, traffic)
	}{
		{name: "IPv4", network: "tcp4", ways: both},
		{name: "IPv4, one CPU", network: "tcp4", ways: both, oneCPU: true},
		{name: "IPv6", network: "tcp6", ways: both},
		{name: "loopback", network: "tcp4", ways: both, loopback: true},
		{name: "to the server only", network: "tcp4", ways: func(toServer, _ traffic) (traffic, traffic) { return toServer, traffic{} }},
		{name: "to the client only", network: "tcp4", ways: func(_, toClient traffic) (traffic, traffic) { return traffic{}, toClient }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.oneCPU {
				mustUseOneCPU(t)
			}
			n := mustNode(t, watched)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			from, listen := pods[0], pods[1].IPv4.String()
			switch {
			case tc.loopback:
				from, listen = pods[1], "127.0.0.1"
			case tc.network == "tcp6":
				listen = pods[1].IPv6.String()
			}
			l := sandboxtest.MustListen(t, pods[1], tc.network, net.JoinHostPort(listen, "0"))
			var all []func() error
			done := make(chan struct{})
			before := n.counts(t)
			for i := range *joins {
				c, s := sandboxtest.MustConnect(t, from.Netns, tc.network, l.Addr().String(), l)
				random := rand.New(rand.NewPCG(uint64(i), 2))
				one := func(seed byte) traffic {
					return traffic{
						seed: seed, bytes: 1 + random.IntN(1<<20), maxWrite: 1 + random.IntN(32<<10), maxRead: 1 + random.IntN(64<<10),
						writerPause: 1 + random.IntN(64<<10), readerPause: 1 + random.IntN(256<<10),
					}
				}
				all = append(all, func() error {
					for last := false; !last; {
						select {
						case <-done:
							last = true
						default:
						}
						toServer, toClient := tc.ways(one(byte(random.Uint32())), one(byte(random.Uint32())))
						if err := exchange(c, s, toServer, toClient); err != nil {
							return fmt.Errorf("connection %d: %w", i, err)
						}
					}
					return errors.Join(finish(c, s), c.Close(), s.Close())
				})
			}
			moment := time.Duration(rand.IntN(20)) * time.Millisecond
			all = append(all, func() error {
				defer close(done)
				time.Sleep(moment)
				n.joinWatched(t)
				waitUntil(t, "all connections to join", func() bool { return n.since(t, before)["connection_paired"] == uint64(*joins) })
				return nil
			})
			if err := together(all...); err != nil {
				t.Fatal(err)
			}
			got := n.since(t, before)
			t.Logf("joined after %v: %v", moment, got)
			if got["message_shortcut"] == 0 {
				t.Error("got no messages by shortcut")
			}
			for _, name := range []string{"flows", "sockets"} {
				waitUntil(t, name+" to be empty", func() bool { return n.usage(t)[name] == 0 })
			}
		})
	}
}

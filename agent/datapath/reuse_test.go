// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestReusedSocket: a socket of a flow that ends its connection, whatever state
// that is in, and is used again reads nothing of the old connection on the next,
// although redirected bytes were unread.
func TestReusedSocket(t *testing.T) {
	const (
		secret  = "SECRET OF THE OLD CONNECTION"
		finWait = 5 // TCP_FIN_WAIT2
	)
	// connectAgain connects to a pod that takes no part.
	connectAgain := func(t *testing.T, used *rawSocket, _ *sandbox.Pod, outside *sandbox.Pod) (s, peer io.ReadWriter) {
		l, address := mustRawListen(t, outside.Netns, outside.IPv4)
		used.mustConnect(t, address)
		return used, l.mustAccept(t)
	}
	// listen makes the socket a listener, then disconnects it once more and connects
	// it: no byte may wait for that.
	listen := func(t *testing.T, used *rawSocket, own, outside *sandbox.Pod) (s, peer io.ReadWriter) {
		used.mustListenOn(t, netip.AddrPortFrom(own.IPv4, 0))
		c := mustSocket(t, outside.Netns, unix.AF_INET, 0)
		c.mustConnect(t, used.mustAddress(t))
		sandboxtest.MustPing(t, c, used.mustAccept(t), 5, 100)
		if err := used.disconnect(); err != nil {
			t.Fatal(err)
		}
		return connectAgain(t, used, own, outside)
	}
	for _, tc := range []struct {
		name   string
		server bool // uses the server's socket again
		half   bool // shuts down writing before
		again  func(t *testing.T, used *rawSocket, own, outside *sandbox.Pod) (s, peer io.ReadWriter)
		reused uint64 // as counted; 0 if the socket has left when it was disconnected
	}{
		{name: "client connects", again: connectAgain},
		{name: "client listens", again: listen},
		{name: "client connects after half-close", half: true, again: connectAgain, reused: 1},
		{name: "client listens after half-close", half: true, again: listen, reused: 1},
		{name: "server connects", server: true, again: connectAgain},
		{name: "server connects after half-close", server: true, half: true, again: connectAgain, reused: 1},
		{name: "server listens after half-close", server: true, half: true, again: listen, reused: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, nil)
			pods, cookies := n.MustEnrol(t, "client", "server")
			outside := sandboxtest.MustAddPod(t, n, "outside", sandbox.PodOptions{})
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c := mustSocket(t, pods[0].Netns, unix.AF_INET, 0)
			c.mustConnect(t, address)
			s := l.mustAccept(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			n.mustCount(t, nil, paired())

			used, peer, own := c, s, pods[0]
			if tc.server {
				used, peer, own = s, c, pods[1]
			}
			if tc.half {
				if err := errors.Join(used.CloseWrite(), wantEOF(peer)); err != nil {
					t.Fatal(err)
				}
				waitUntil(t, "the end is acknowledged", func() bool { return used.state(t) == finWait })
			}
			before := n.counts(t)
			mustWrite(t, peer, secret)
			n.mustCount(t, before, map[string]uint64{"message_shortcut": 1})
			if err := used.wait(unix.POLLIN); err != nil {
				t.Fatal(err)
			}
			if err := used.disconnect(); err != nil {
				t.Fatal(err)
			}
			again, other := tc.again(t, used, own, outside)
			mustWrite(t, other, "hello")
			got := make([]byte, len(secret))
			if n, err := again.Read(got); err != nil || string(got[:n]) != "hello" {
				t.Errorf("got %q (%v) from the new connection, want %q", got[:max(n, 0)], err, "hello")
			}
			sandboxtest.MustPing(t, again, other, 5, 100)
			if got := n.since(t, before)["socket_reused"]; got != tc.reused {
				t.Errorf("got %d sockets used again, want %d", got, tc.reused)
			}
			c.mustClose(t)
			s.mustClose(t)
			n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
		})
	}
}

// TestReusedID: a client's socket that connects again has a flow with the id of its
// first one. What the server's socket of the first still reads is not taken for
// reads of the second: an unload waits for what is unread there, and nothing is lost.
func TestReusedID(t *testing.T) {
	const late, unread = "sent to the first", "sent to second"
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	c, first := rawPair(t, pods[0], l, address)
	sandboxtest.MustPing(t, c, first, 10, 100)
	id := n.mustFlow(t).ID
	mustWrite(t, c, late)
	if err := c.disconnect(); err != nil {
		t.Fatal(err)
	}
	n.closeAll(t) // the reset ends it at the server
	c.mustConnect(t, address)
	second := l.mustAccept(t)
	sandboxtest.MustPing(t, c, second, 10, 100)
	if got := n.mustFlow(t).ID; got != id {
		t.Fatalf("got a flow with id %d, want %d as before: the test shows nothing", got, id)
	}
	mustRead(t, first, late)
	mustWrite(t, c, unread)
	if got := n.mustFlow(t).ToServer; !got.Redirected || got.Unread != uint64(len(unread)) {
		t.Fatalf("got %+v, want a redirected message unread", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := n.Unload(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("unload: got %v, want a timeout", err)
	}
	mustRead(t, second, unread)
	if _, err := unix.Write(first.fd, []byte("x")); err == nil {
		t.Error("a write to the first connection gives no error")
	}
	sandboxtest.MustPing(t, c, second, 10, 100)
}

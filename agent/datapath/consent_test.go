// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// consenting is a node without consent, with a listener in blocking mode.
type consenting struct {
	*node
	pods     []*sandbox.Pod
	cookies  []uint64
	listener *rawSocket
}

func mustConsenting(tb testing.TB) *consenting {
	tb.Helper()
	n := &consenting{node: mustNode(tb, nil)}
	n.pods, n.cookies = n.MustEnrol(tb, "client", "server")
	n.mustConsent(tb, false)
	n.listener, _ = mustRawListen(tb, n.pods[1].Netns, n.pods[1].IPv4)
	if err := unix.SetNonblock(n.listener.fd, false); err != nil {
		tb.Fatal(err)
	}
	return n
}

// mustConsent lets sockets in blocking mode take part between the pods, or does not.
func (n *consenting) mustConsent(tb testing.TB, consent bool) {
	tb.Helper()
	rules := sandbox.Between(rule.Allow, n.cookies...)
	for i := range rules {
		rules[i].Blocking = consent
	}
	n.MustSetPolicy(tb, rules)
}

// mustConnect makes a connection whose server's socket is in blocking mode, and whose
// client's is, too, unless told otherwise.
func (n *consenting) mustConnect(tb testing.TB, clientBlocks bool) (c, s *rawSocket) {
	tb.Helper()
	c = mustSocket(tb, n.pods[0].Netns, unix.AF_INET, 0)
	timeout := unix.NsecToTimeval(int64(deadline))
	if err := errors.Join(unix.SetNonblock(c.fd, !clientBlocks), unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)); err != nil {
		tb.Fatal(err)
	}
	c.mustConnect(tb, n.listener.mustAddress(tb))
	s = n.listener.mustAccept(tb)
	if err := errors.Join(unix.SetNonblock(s.fd, false), unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)); err != nil {
		tb.Fatal(err)
	}
	return c, s
}

// converse sends requests that the server echoes, of sizes and bytes that the seed decides,
// until stop returns true. Each end has one thread, which sleeps in recv.
func converse(c, s *rawSocket, seed byte, stop func(round int) bool) error {
	ask := func() error {
		content, sizes := traffic{seed: seed}.source()
		for round := 0; !stop(round); round++ {
			message := make([]byte, 1+sizes.IntN(3000))
			_, _ = content.Read(message)
			if _, err := c.Write(message); err != nil {
				return err
			}
			got := make([]byte, len(message))
			if _, err := io.ReadFull(c, got); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
			if !bytes.Equal(got, message) {
				return fmt.Errorf("round %d: got another answer", round)
			}
		}
		return errors.Join(c.CloseWrite(), wantEOF(c))
	}
	echo := func() error {
		_, err := io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s})
		return errors.Join(err, s.CloseWrite())
	}
	return together(onThread(ask), onThread(echo))
}

// TestConsent: sockets in blocking mode take part where the policy lets them, whatever the
// port is known for, and nowhere else.
func TestConsent(t *testing.T) {
	n := mustConsenting(t)
	port := n.listener.mustAddress(t).Port()
	known := []datapath.UnsupportedPort{{Netns: n.cookies[1], Port: port, Reasons: []string{datapath.UnsupportedBlocking}}}
	rounds := func(round int) bool { return round == 50 }
	for _, step := range []struct {
		name                  string
		consent, clientBlocks bool
		want                  string
		shortcut              bool
		known                 []datapath.UnsupportedPort
	}{
		{"blocking client", false, true, "connection_blocking_client", false, []datapath.UnsupportedPort{}},
		{"blocking server, which is learned", false, false, "connection_blocking_server", false, known},
		{"blocking server that is known", false, false, "connection_unsupported", false, known},
		{"consent against what is known", true, true, "connection_paired", true, known},
		{"consent against what is known, non-blocking client", true, false, "connection_paired", true, known},
		{"consent taken away", false, false, "connection_unsupported", false, known},
	} {
		t.Run(step.name, func(t *testing.T) {
			n.mustConsent(t, step.consent)
			before := n.counts(t)
			c, s := n.mustConnect(t, step.clientBlocks)
			if err := converse(c, s, 1, rounds); err != nil {
				t.Fatal(err)
			}
			got := n.since(t, before)
			if got[step.want] != 1 || (got["message_shortcut"] > 50) != step.shortcut {
				t.Errorf("got %v, want %s, and by shortcut: %t", got, step.want, step.shortcut)
			}
			if diff := cmp.Diff(step.known, n.unsupported(t)); diff != "" {
				t.Errorf("unsupported ports (-want +got):\n%s", diff)
			}
			n.mustEnd(t, c, s)
		})
	}
}

// TestConsentTakenAway: flows whose sockets are in blocking mode go back to TCP in the
// middle of their traffic, without a byte lost, and their sockets are evicted.
func TestConsentTakenAway(t *testing.T) {
	n := mustConsenting(t)
	for _, tc := range []struct {
		name         string
		clientBlocks bool
		evicted      []bool // client, server
		take         func()
	}{
		{"consent", true, []bool{true, true}, func() { n.mustConsent(t, false) }},
		{"consent, non-blocking client", false, []bool{false, true}, func() { n.mustConsent(t, false) }},
		{"all rules", true, []bool{true, true}, func() { n.MustSetPolicy(t, nil) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n.mustConsent(t, true)
			c, s := n.mustConnect(t, tc.clientBlocks)
			before := n.counts(t)
			var over atomic.Bool
			ended := make(chan error, 1)
			go func() {
				rest := 20 // rounds, after all has been seen
				ended <- converse(c, s, 2, func(int) bool {
					if over.Load() {
						rest--
					}
					return rest < 0
				})
			}()
			defer func() {
				over.Store(true)
				if err := <-ended; err != nil {
					t.Error(err)
				}
				n.mustEnd(t, c, s)
			}()
			waitUntil(t, "messages by shortcut", func() bool { return n.counts(t)["message_shortcut"] > before["message_shortcut"]+200 })
			tc.take()
			waitUntil(t, fmt.Sprintf("evicted are client and server: %v", tc.evicted), func() bool {
				flow := n.mustFlow(t)
				return slices.Equal([]bool{flow.ToServer.Evicted, flow.ToClient.Evicted}, tc.evicted)
			})
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestLeave: a connection leaves the SOCKHASH when the shortcut is no faster for what it
// sends, and no byte is lost; others stay.
func TestLeave(t *testing.T) {
	stream := func(size int) func(*testing.T, *rawSocket, *rawSocket) error {
		return func(_ *testing.T, c, s *rawSocket) error {
			one := traffic{seed: 1, bytes: 20_000 * min(size, 1000), maxWrite: size, maxRead: 100_000}
			return together(func() error { return one.write(c) }, func() error { return one.read(s) })
		}
	}
	for _, tc := range []struct {
		name   string
		talk   func(t *testing.T, c, s *rawSocket) error
		leaves bool
	}{
		{name: "stream of small messages", talk: stream(100), leaves: true},
		{name: "stream of large messages", talk: stream(60_000)},
		{name: "small messages that are answered", talk: func(t *testing.T, c, s *rawSocket) error {
			sandboxtest.MustPing(t, c, s, 10_000, 100)
			return nil
		}},
		{name: "sendfile", talk: sendFiles, leaves: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, atOnce)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			c, s := rawPair(t, pods[0], l, address)
			n.mustBeShortcut(t, c, s)
			before := n.counts(t)
			if err := tc.talk(t, c, s); err != nil {
				t.Fatal(err)
			}
			if !tc.leaves {
				if got := n.since(t, before); got["message_no_gain"] != 0 || got["message_shortcut"] == 0 {
					t.Errorf("got %v, want messages by shortcut, and that the flow does not leave", got)
				}
				return
			}
			waitUntil(t, "the flow to leave", func() bool {
				sandboxtest.MustPing(t, c, s, 1, 100)
				return n.usage(t)["sockets"] == 0
			})
			f := n.mustFlow(t)
			for name, d := range map[string]struct {
				reason  string
				evicted bool
			}{"server": {f.ToServer.Reason, f.ToServer.Evicted}, "client": {f.ToClient.Reason, f.ToClient.Evicted}} {
				if d.reason != "no_gain" || !d.evicted {
					t.Errorf("to the %s: got %+v, want it evicted, since there is no gain", name, d)
				}
			}
			if err := finish(c, s); err != nil {
				t.Error(err)
			}
		})
	}
}

// sendFiles sends a file a few times, as a web server does.
func sendFiles(t *testing.T, c, s *rawSocket) error {
	const size, times = 1 << 20, 8
	path := filepath.Join(t.TempDir(), "file")
	one := traffic{seed: 2, bytes: size, maxWrite: size, maxRead: 100_000}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := one.write(f); err != nil {
		return err
	}
	for range times {
		offset := int64(0)
		if err := together(
			func() error {
				for offset < size {
					if _, err := c.call(unix.POLLOUT, func() (int, error) {
						return unix.Sendfile(c.fd, int(f.Fd()), &offset, int(size-offset))
					}); err != nil {
						return fmt.Errorf("sendfile: %w", err)
					}
				}
				return nil
			},
			func() error { return one.read(io.Reader(s)) },
		); err != nil {
			return err
		}
	}
	return nil
}

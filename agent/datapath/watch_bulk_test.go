// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
)

// TestWatchBulk: streams of large writes earn it to join, too, though the kernel calls back once
// for so many segments, which are small here, that both ends have to meet within few callbacks.
func TestWatchBulk(t *testing.T) {
	if noWatch(t) {
		return
	}
	const bytes = 2 << 20
	for name, amounts := range map[string][2]int{
		"both ways":     {bytes, bytes},
		"to the server": {bytes, 0},
		"to the client": {0, bytes},
	} {
		t.Run(name, func(t *testing.T) {
			n, pods, l, address := mustWatchPods(t, func(c *datapath.Config) { c.JoinAfter = 1000 })
			l.mustSetSegments(t)
			for range 4 {
				c := mustSocket(t, pods[0].Netns, unix.AF_INET, 0)
				c.mustSetSegments(t)
				c.mustConnect(t, address)
				s := l.mustAccept(t)
				err := together(
					func() error { return c.takeTurns(amounts[0], amounts[1]) },
					func() error { return s.takeTurns(amounts[1], amounts[0]) },
				)
				if err != nil {
					t.Fatal(err)
				}
				// Nobody inserts it, so that the two ends are candidates.
				if got := n.usage(t)["flows"]; got != 1 {
					t.Errorf("got %d flows, want 1: %v", got, n.counts(t))
				}
				n.mustEnd(t, c, s)
			}
		})
	}
}

// mustSetSegments lets a socket that is not connected yet ask for the smallest segments.
func (r *rawSocket) mustSetSegments(tb testing.TB) {
	tb.Helper()
	if err := unix.SetsockoptInt(r.fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, 88); err != nil {
		tb.Fatal(err)
	}
}

// takeTurns writes as much as the socket takes and reads what has come, in turn, until so many
// bytes were written and read.
func (r *rawSocket) takeTurns(toWrite, toRead int) error {
	buffer := make([]byte, 1<<20)
	for toWrite > 0 || toRead > 0 {
		var wrote, got int
		var events int16
		var err error
		if toWrite > 0 {
			if wrote, err = unix.Write(r.fd, buffer[:min(toWrite, len(buffer))]); errors.Is(err, unix.EAGAIN) {
				wrote, events = 0, unix.POLLOUT
			} else if err != nil {
				return err
			}
			toWrite -= wrote
		}
		if toRead > 0 {
			if got, err = unix.Read(r.fd, buffer); errors.Is(err, unix.EAGAIN) {
				got, events = 0, events|unix.POLLIN
			} else if err != nil {
				return err
			}
			toRead -= got
		}
		if wrote == 0 && got == 0 {
			if err := r.wait(events); err != nil {
				return err
			}
		}
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/hazards"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestUntraced: while kernel.ftrace_enabled is 0, the guards that are attached do nothing, and
// every message goes by TCP, where splice works. It is a setting of the whole machine.
func TestUntraced(t *testing.T) {
	if !*ownMachine || hazard(t, "no-trampolines") {
		return
	}
	enable := func(value string) error { return os.WriteFile("/proc/sys/kernel/ftrace_enabled", []byte(value), 0) }
	defer func() {
		if err := enable("1"); err != nil {
			t.Error(err)
		}
	}()
	for _, observer := range []string{datapath.ObserverFexit, datapath.ObserverTracepoint} {
		if observer == datapath.ObserverTracepoint && hazard(t, "fionread-redirected") { // a kernel without that tracepoint has it
			continue
		}
		t.Run(observer, func(t *testing.T) {
			n, connect := mustRawNode(t, func(c *datapath.Config) {
				atOnce(c)
				c.Observer, c.Guards = observer, []string{datapath.GuardSplice}
			})
			c, s := connect()
			n.mustBeShortcut(t, c, s)

			update := func(want bool) {
				t.Helper()
				untraced, err := n.UpdateTraced()
				if err != nil || (untraced != nil) != want || want && !strings.Contains(untraced.Error(), "sysctl -w kernel.ftrace_enabled=1") {
					t.Fatalf("got untraced %v and error %v, want untraced %t, and how to mend it", untraced, err, want)
				}
			}
			update(false)
			if err := enable("0"); errors.Is(err, unix.ENOTSUP) {
				t.Log("this kernel does not let it be switched off while guards are attached")
				update(false)
				return
			} else if err != nil {
				t.Fatal(err)
			}
			update(true)
			before := n.counts(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			n.mustCount(t, before, map[string]uint64{"message_untraced": 20})
			mustWrite(t, c, "hello")
			if err := s.wait(unix.POLLIN); err != nil {
				t.Fatal(err)
			}
			_, w := mustPipe(t)
			if n, err := unix.Splice(s.fd, nil, w, nil, 5, unix.SPLICE_F_NONBLOCK); n != 5 {
				t.Errorf("splice gives %d (%v), want 5", n, err)
			}
			for _, h := range hazards.Measure([]string{datapath.GuardSplice}) {
				if h.Name == "no-trampolines" && !h.Present || h.Name == "splice" && (h.Guard != "" || !strings.Contains(h.Action, "kernel.ftrace_enabled is 0")) {
					t.Errorf("got %+v, want no guard, and why", h)
				}
			}

			if err := enable("1"); err != nil {
				t.Fatal(err)
			}
			update(false)
			n.mustEnd(t, c, s)
			c, s = connect()
			n.mustBeShortcut(t, c, s)
		})
	}
}

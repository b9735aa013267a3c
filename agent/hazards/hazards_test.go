// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package hazards_test

import (
	"os"
	"strings"
	"testing"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/hazards"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestHazards: every probe can be run, and every guard works where trampolines
// are allowed. What the probes find is the kernel's affair, but for what no
// kernel serves so far.
func TestHazards(t *testing.T) {
	sandboxtest.MustNew(t, sandbox.Config{}) // for root
	found := map[string]api.Hazard{}
	for _, h := range hazards.Measure(datapath.GuardNames()) {
		t.Logf("%-20s present=%-5v fatal=%-5v guard=%q %s | %s", h.Name, h.Present, h.Fatal, h.Guard, h.Detail, h.Action)
		found[h.Name] = h
		if strings.HasPrefix(h.Detail, "not tested") {
			t.Errorf("%s: %s", h.Name, h.Detail)
		}
	}
	trampolines := !found["no-trampolines"].Present
	for name, guard := range map[string]string{
		"splice": datapath.GuardSplice, "waitall": datapath.GuardFlags, "oob": datapath.GuardFlags,
		hazards.BlockingRecv: "", "rcvlowat": "", "zerocopy": "", "unread-close": "",
	} {
		if !trampolines {
			guard = ""
		}
		if h := found[name]; !h.Present || h.Guard != guard {
			t.Errorf("%s: got present %v, guard %q, want it present with guard %q", name, h.Present, h.Guard, guard)
		}
	}
	// By version.
	if h := found["ktls"]; h.Present && trampolines && h.Guard != datapath.GuardULP {
		t.Errorf("ktls: got guard %q, want %q", h.Guard, datapath.GuardULP)
	}
	if h := found["fionread-redirected"]; h.Present && trampolines && h.Guard != datapath.GuardFIONREAD {
		t.Errorf("fionread-redirected: got guard %q, want %q", h.Guard, datapath.GuardFIONREAD)
	}
	if found["splice"].Fatal == trampolines {
		t.Errorf("splice: got fatal %v, want it so just where no guard works", found["splice"].Fatal)
	}
	if len(found) != 12 {
		t.Errorf("got %d hazards, want 12", len(found))
	}
	for _, h := range hazards.Measure(nil) {
		if h.Guard != "" {
			t.Errorf("%s: got guard %q with all of them off", h.Name, h.Guard)
		}
	}
}

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m.Run)) }

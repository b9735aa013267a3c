// SPDX-License-Identifier: Apache-2.0

package datapath_test

import (
	"strings"
	"testing"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// TestHazards: every probe can be run, and every guard works where trampolines
// are allowed. What the probes find is the kernel's affair, but for what no
// kernel serves so far.
func TestHazards(t *testing.T) {
	sandbox.MustNew(t, sandbox.Config{}) // for root
	hazards := map[string]api.Hazard{}
	for _, h := range datapath.Hazards(datapath.GuardNames()) {
		t.Logf("%-20s present=%-5v fatal=%-5v guard=%q %s | %s", h.Name, h.Present, h.Fatal, h.Guard, h.Detail, h.Action)
		hazards[h.Name] = h
		if strings.HasPrefix(h.Detail, "not tested") {
			t.Errorf("%s: %s", h.Name, h.Detail)
		}
	}
	trampolines := !hazards["no-trampolines"].Present
	for name, guard := range map[string]string{
		"splice": datapath.GuardSplice, "waitall": datapath.GuardFlags, "oob": datapath.GuardFlags,
		datapath.HazardBlockingRecv: "", "rcvlowat": "", "zerocopy": "", "unread-close": "",
	} {
		if !trampolines {
			guard = ""
		}
		if h := hazards[name]; !h.Present || h.Guard != guard {
			t.Errorf("%s: got present %v, guard %q, want it present with guard %q", name, h.Present, h.Guard, guard)
		}
	}
	// By version.
	if h := hazards["ktls"]; h.Present && trampolines && h.Guard != datapath.GuardULP {
		t.Errorf("ktls: got guard %q, want %q", h.Guard, datapath.GuardULP)
	}
	if h := hazards["fionread-redirected"]; h.Present && trampolines && h.Guard != datapath.GuardFIONREAD {
		t.Errorf("fionread-redirected: got guard %q, want %q", h.Guard, datapath.GuardFIONREAD)
	}
	if hazards["splice"].Fatal == trampolines {
		t.Errorf("splice: got fatal %v, want it so just where no guard works", hazards["splice"].Fatal)
	}
	if len(hazards) != 12 {
		t.Errorf("got %d hazards, want 12", len(hazards))
	}
	for _, h := range datapath.Hazards(nil) {
		if h.Guard != "" {
			t.Errorf("%s: got guard %q with all of them off", h.Name, h.Guard)
		}
	}
}

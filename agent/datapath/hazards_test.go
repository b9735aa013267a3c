// SPDX-License-Identifier: Apache-2.0

package datapath_test

import (
	"strings"
	"testing"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// TestHazards: every probe can be run. What it finds is the kernel's affair,
// but for what no kernel serves so far.
func TestHazards(t *testing.T) {
	sandbox.MustNew(t, sandbox.Config{}) // for root
	present := map[string]bool{}
	for _, h := range datapath.Hazards() {
		t.Logf("%-20s present=%-5v fatal=%-5v %s", h.Name, h.Present, h.Fatal, h.Detail)
		present[h.Name] = h.Present
		if strings.HasPrefix(h.Detail, "not tested") {
			t.Errorf("%s: %s", h.Name, h.Detail)
		}
	}
	for _, name := range []string{"splice", "waitall", datapath.HazardSleepingRecv} {
		if !present[name] {
			t.Errorf("%s: got absent, want present", name)
		}
	}
	if len(present) != 6 {
		t.Errorf("got %d hazards, want 6", len(present))
	}
}

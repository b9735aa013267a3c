// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"testing"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// node is a sandbox whose agent is a process.
type node struct{ sandboxtest.Agent }

func mustNode(t *testing.T) *node {
	t.Helper()
	return &node{sandboxtest.MustNewAgent(t, sandbox.Config{BinDir: cmp.Or(os.Getenv("PODSHUNT_BIN"), "../../bin")})}
}

// mustStart runs the agent, with more flags, until the test ends, and returns its
// first status. The annotations are those of pods, by namespace/name.
func (n *node) mustStart(t *testing.T, annotations map[string]string, flags ...string) api.Status {
	t.Helper()
	var entries []string
	for pod, a := range annotations {
		entries = append(entries, pod+" "+a)
	}
	n.MustWritePods(t, entries...)
	var log bytes.Buffer
	n.Log = &log
	t.Cleanup(func() { // once the agent has ended
		if t.Failed() {
			t.Logf("log of the agent:\n%s", &log)
		}
	})
	n.MustStart(t, flags...)
	return n.MustStatus(t)
}

// traffic is what the kernel programs have counted in a time.
type traffic struct {
	// sent is in bytes of paired connections; shortcut is what of them took the shortcut.
	sent, shortcut uint64
	// paired counts connections.
	paired uint64
}

func between(before, after api.Status) traffic {
	counted := func(s api.Status) (t traffic) {
		for _, o := range s.Outcomes {
			if o.Kind == api.OutcomeMessage {
				t.sent += o.Bytes
			}
			switch o.String() {
			case "message_shortcut":
				t.shortcut = o.Bytes
			case "connection_paired":
				t.paired = o.Count
			}
		}
		return t
	}
	a, b := counted(after), counted(before)
	return traffic{a.sent - b.sent, a.shortcut - b.shortcut, a.paired - b.paired}
}

// share is what part of the bytes took the shortcut.
func (t traffic) share() string {
	if t.sent == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(t.shortcut)/float64(t.sent))
}

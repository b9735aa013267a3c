// SPDX-License-Identifier: Apache-2.0

// Package e2e_test runs the whole chain as it is installed: a conflist with
// bridge, host-local and podshunt through libcni, and podshunt-agent as a
// process.
package e2e_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

func TestMain(m *testing.M) {
	if task := os.Getenv(holdEnv); task != "" {
		if err := hold(task); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(sandbox.Main(m.Run))
}

const (
	// inForce is how long a change may take on a machine that has other things to
	// do: make test-cluster prints how long it takes.
	inForce = 2 * time.Minute

	on = "podshunt.io/shortcut: enabled"
)

// node is a sandbox whose agent is a process.
type node struct{ sandboxtest.Agent }

func mustNode(t testing.TB) *node {
	t.Helper()
	return &node{sandboxtest.MustNewAgent(t, sandbox.Config{})}
}

// mustStart returns when the agent answers.
func (n *node) mustStart(t testing.TB, flags ...string) {
	t.Helper()
	n.MustStart(t, slices.Concat([]string{sandboxtest.AcceptFatal}, sandboxtest.Soon(), flags)...)
}

// entries returns how many entries each of the named maps has.
func (n *node) entries(t testing.TB, names ...string) map[string]int {
	t.Helper()
	entries := map[string]int{}
	for _, m := range n.MustStatus(t).Maps {
		if slices.Contains(names, m.Name) {
			entries[m.Name] = m.Entries
		}
	}
	return entries
}

// mustBecome waits until get returns want.
func mustBecome[T any](t testing.TB, what string, want T, get func() T) {
	t.Helper()
	for deadline := time.Now().Add(inForce); ; time.Sleep(20 * time.Millisecond) {
		late := time.Now().After(deadline)
		diff := gocmp.Diff(want, get())
		if diff == "" {
			return
		}
		if late {
			t.Fatalf("%s: not after %v (-want +got):\n%s", what, inForce, diff)
		}
	}
}

func wantDiff(t testing.TB, what string, want, got any) {
	t.Helper()
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

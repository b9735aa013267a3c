// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustHang puts a listener in the agent's place that never answers, and lets the
// plugin wait as long as it does by default.
func (n *node) mustHang(t testing.TB) {
	t.Helper()
	n.AgentTimeout = api.PluginTimeout
	l, err := net.Listen("unix", n.AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// normal returns a result without what differs each time.
func normal(r *types100.Result) *types100.Result {
	c := *r
	c.Interfaces = nil
	for _, i := range r.Interfaces {
		i := *i
		i.Mac = ""
		if strings.HasPrefix(i.Name, "veth") {
			i.Name = "veth"
		}
		if i.Sandbox != "" {
			i.Sandbox = "netns"
		}
		c.Interfaces = append(c.Interfaces, &i)
	}
	return &c
}

// leftovers lists what pods have left on the node.
func (n *node) leftovers(t testing.TB) (left []string) {
	t.Helper()
	if err := n.Node.Do(func() error {
		interfaces, err := net.Interfaces()
		for _, i := range interfaces {
			if i.Name != "lo" && i.Name != "podshunt0" {
				left = append(left, i.Name)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{
		filepath.Join(n.AttachmentsDir, "*"), filepath.Join(filepath.Dir(n.Node.Path), "*"),
		filepath.Join(n.Base, "ipam/podshunt/*[.:]*"), filepath.Join(n.Base, "cni/results/*"),
	} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if f != n.Node.Path && !strings.HasPrefix(filepath.Base(f), "last_reserved_ip.") {
				left = append(left, f)
			}
		}
	}
	return left
}

// TestVerbs runs every verb in each state that the agent can be in.
func TestVerbs(t *testing.T) {
	plain := sandboxtest.MustAddPod(t, sandboxtest.MustNew(t, sandbox.Config{}), "web", sandbox.PodOptions{})
	for _, tc := range []struct {
		name string
		// before runs before ADD, after after it.
		before, after func(testing.TB, *node)
	}{
		{name: "up", before: func(t testing.TB, n *node) { n.mustStart(t) }},
		{name: "down"},
		{name: "hanging", before: func(t testing.TB, n *node) { n.mustHang(t) }},
		{
			name: "killed", before: func(t testing.TB, n *node) { n.mustStart(t) },
			after: func(t testing.TB, n *node) { n.Kill() },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t)
			n.MustWritePods(t, "web "+on)
			if err := n.Status(""); err != nil {
				t.Errorf("STATUS before: %v", err)
			}
			if tc.before != nil {
				tc.before(t, n)
			}
			p := sandboxtest.MustAddPod(t, n, "web", sandbox.PodOptions{})
			wantDiff(t, "result", normal(plain.Result), normal(p.Result))
			if tc.after != nil {
				tc.after(t, n)
			}
			up := n.Running()
			if up {
				wantDiff(t, "pods", []string{"web: takes part"}, n.MustStates(t))
			}
			steps := []struct {
				name string
				run  func() error
			}{
				{"STATUS", func() error { return n.Status("") }},
				{"CHECK", func() error { return n.Check(p) }},
				{"GC of others", func() error { return n.GC("", p) }},
				{"CHECK after GC", func() error { return n.Check(p) }},
				{"GC", func() error { return n.GC("") }},
				{"DEL", func() error { return n.DelPod(p) }},
				{"second DEL", func() error { return n.DelPod(p) }},
			}
			for _, step := range steps {
				if err := step.run(); err != nil {
					t.Errorf("%s: %v", step.name, err)
				}
				if up && step.name == "GC of others" {
					wantDiff(t, "pods", []string{"web: takes part"}, n.MustStates(t))
				}
				if up && step.name == "GC" {
					wantDiff(t, "pods", []string(nil), n.MustStates(t))
					wantDiff(t, "entries", map[string]int{"pods": 0, "policies": 0}, n.entries(t, "pods", "policies"))
				}
			}
			wantDiff(t, "leftovers", []string(nil), n.leftovers(t))
		})
	}
}

// TestHangingAgent: an agent that does not answer costs a pod the agentTimeout.
func TestHangingAgent(t *testing.T) {
	n := mustNode(t)
	fastest := func() time.Duration {
		var times []time.Duration
		for range 3 {
			start := time.Now()
			sandboxtest.MustAddPod(t, n, "web", sandbox.PodOptions{})
			times = append(times, time.Since(start))
		}
		return slices.Min(times)
	}
	down := fastest()
	n.mustHang(t)
	hanging := fastest()
	if hanging < n.AgentTimeout || hanging > down+n.AgentTimeout+10*time.Second {
		t.Errorf("ADD took %v without an agent and %v with one that hangs, want about %v more", down, hanging, n.AgentTimeout)
	}
}

// TestMissedVerbs: an agent that comes back learns what it has missed.
func TestMissedVerbs(t *testing.T) {
	n := mustNode(t)
	n.MustWritePods(t, "kept "+on, "gone "+on, "late "+on)
	n.mustStart(t)
	kept, gone := sandboxtest.MustAddPod(t, n, "kept", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "gone", sandbox.PodOptions{})
	wantDiff(t, "pods", []string{"gone: takes part", "kept: takes part"}, n.MustStates(t))
	n.Kill()
	if err := n.DelPod(gone); err != nil {
		t.Errorf("DEL: %v", err)
	}
	late := sandboxtest.MustAddPod(t, n, "late", sandbox.PodOptions{})
	n.mustStart(t)
	mustBecome(t, "pods", []string{"kept: takes part", "late: takes part"}, func() []string { return n.MustStates(t) })
	wantDiff(t, "entries", map[string]int{"pods": 2, "policies": 4}, n.entries(t, "pods", "policies"))

	l := newLoad(t)
	listener := sandboxtest.MustListen(t, kept, "tcp", ":7000")
	n.mustShortcut(t, l.mustStream(t, late, endpoint{netip.AddrPortFrom(kept.IPv4, 7000), listener}))
	l.finish(t)
}

// TestMalformedSection: a key of ours that is not known fails ADD with the
// keys that are, and DEL takes the rest away.
func TestMalformedSection(t *testing.T) {
	n := mustNode(t)
	_, err := n.AddPod("web", sandbox.PodOptions{Conflist: strings.Replace(n.Conflist(), `"agentSocket"`, `"socket"`, 1)})
	want := `"socket": unknown key; accepted are agentSocket, agentTimeout and attachmentsDir`
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want %s", err, want)
	}
	mustBecome(t, "leftovers", nil, func() []string { return n.leftovers(t) })
	if _, err := os.Stat(n.AttachmentsDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("attachments: got %v, want none", err)
	}
}

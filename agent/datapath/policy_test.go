// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// generation reads that of the policy in the kernel.
func (n *node) generation(tb testing.TB) uint32 {
	tb.Helper()
	control, err := ebpf.LoadPinnedMap(filepath.Join(n.Config.PinDir, bpf.ShortcutMapControl), nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer control.Close()
	var s bpf.ShortcutSettings
	if err := control.Lookup(uint32(0), &s); err != nil {
		tb.Fatal(err)
	}
	return s.Generation
}

// TestUpdatePolicy: an update is about the pairs that it names, for new
// connections and for live ones, and about no others.
func TestUpdatePolicy(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "first", "second", "third")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	newRule := func(client, server int, first, last uint16, verdict rule.Verdict) rule.Rule {
		return rule.Rule{Client: cookies[client], Server: cookies[server], First: first, Last: last, Verdict: verdict}
	}
	pair := func(client, server int, rules ...rule.Rule) rule.PairRules {
		return rule.PairRules{Client: cookies[client], Server: cookies[server], Rules: rules}
	}
	base := newRule(0, 1, 0, 65535, rule.Allow)
	l, address := mustListenOn(t, pods[1])
	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 10, 100)
	port := address.Port()

	for _, tc := range []struct {
		name     string
		changed  []rule.PairRules
		policies int  // entries in the map
		raised   bool // the generation
		// paired connections from the first pod to port 80 and to others of the second, and whether the live one is shortcut
		web, other, live bool
	}{
		{"the same rules", []rule.PairRules{pair(0, 1, base)}, 9, false, true, true, true},
		{"nothing", nil, 9, false, true, true, true},
		{"an override", []rule.PairRules{pair(0, 1, base, newRule(0, 1, 80, 80, rule.Refuse))}, 10, true, false, true, true},
		{"the pair refused", []rule.PairRules{pair(0, 1)}, 8, true, false, false, false},
		{"refused again", []rule.PairRules{pair(0, 1)}, 8, false, false, false, false},
		{"ports without a base", []rule.PairRules{pair(0, 1, newRule(0, 1, 80, 81, rule.Allow), newRule(0, 1, port, port, rule.Allow))}, 10, true, true, false, true},
		{"from ports to a base with overrides", []rule.PairRules{pair(0, 1, base, newRule(0, 1, 80, 80, rule.Refuse), newRule(0, 1, port, port, rule.Refuse))}, 11, true, false, true, false},
		{"two pairs", []rule.PairRules{pair(2, 2), pair(0, 1, base)}, 8, true, true, true, true},
		{"held", []rule.PairRules{pair(0, 1, newRule(0, 1, 0, 65535, rule.Hold)), pair(2, 2, newRule(2, 2, 0, 65535, rule.Allow))}, 9, true, true, true, false},
		{"allowed again", []rule.PairRules{pair(0, 1, base)}, 9, true, true, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			generation := n.generation(t)
			if err := n.UpdatePolicy(tc.changed); err != nil {
				t.Fatal(err)
			}
			if got := n.generation(t) != generation; got != tc.raised {
				t.Errorf("got the generation raised: %v, want %v", got, tc.raised)
			}
			sandboxtest.MustPing(t, c, s, 5, 100) // comes to rest on the way that the policy says
			before := n.counts(t)
			sandboxtest.MustPing(t, c, s, 10, 100)
			want := map[string]uint64{"message_not_allowed": 20}
			if tc.live {
				want = map[string]uint64{"message_shortcut": 20}
			}
			n.mustCount(t, before, want)
			if got := n.usage(t)["policies"]; got != tc.policies {
				t.Errorf("got %d entries in the policy map, want %d", got, tc.policies)
			}
			if tc.name == "held" {
				return // isPaired wants the shortcut
			}
			for port, want := range map[uint16]bool{80: tc.web, 5000: tc.other} {
				if got := n.isPaired(t, pods[0], pods[1], port); got != want {
					t.Errorf("port %d: got paired %v, want %v", port, got, want)
				}
			}
			if !n.isPaired(t, pods[1], pods[0], 80) || !n.isPaired(t, pods[0], pods[2], 80) {
				t.Error("a pair that was not named is refused")
			}
		})
	}

	t.Run("by the next process", func(t *testing.T) {
		if err := n.Datapath.Close(); err != nil {
			t.Fatal(err)
		}
		n.MustOpen(t)
		if err := n.UpdatePolicy([]rule.PairRules{pair(0, 1)}); err != nil {
			t.Fatal(err)
		}
		if n.isPaired(t, pods[0], pods[1], 80) || !n.isPaired(t, pods[1], pods[0], 80) {
			t.Error("want the named pair refused and the reverse one left alone")
		}
		if got := n.usage(t)["policies"]; got != 8 {
			t.Errorf("got %d entries in the policy map, want 8", got)
		}
	})
	t.Run("then the whole policy", func(t *testing.T) {
		n.MustSetPolicy(t, []rule.Rule{base})
		if !n.isPaired(t, pods[0], pods[1], 80) || n.isPaired(t, pods[1], pods[0], 80) {
			t.Error("want the one pair of the policy allowed, and no other")
		}
		if got := n.usage(t)["policies"]; got != 1 {
			t.Errorf("got %d entries in the policy map, want 1", got)
		}
	})
}

// TestUpdatePolicyFull: of an update that does not fit, what fits is in force;
// pairs that do not stay on TCP until there is room.
func TestUpdatePolicyFull(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.MaxPolicies = 2 })
	pods, cookies := n.MustEnrol(t, "first", "second")
	all := sandbox.Between(rule.Allow, cookies...) // first to itself, first to second, back, second to itself
	pair := func(r rule.Rule, more ...rule.Rule) rule.PairRules {
		for i := range more {
			more[i].Client, more[i].Server = r.Client, r.Server
		}
		return rule.PairRules{Client: r.Client, Server: r.Server, Rules: append([]rule.Rule{r}, more...)}
	}
	none := func(r rule.Rule) rule.PairRules {
		return rule.PairRules{Client: r.Client, Server: r.Server}
	}
	refused := rule.Rule{First: 80, Last: 80}
	for _, tc := range []struct {
		name              string
		changed           []rule.PairRules
		wantErr           bool
		there, back, self bool // between the two, and within the second
	}{
		{"fits", []rule.PairRules{pair(all[1]), pair(all[2])}, false, true, true, false},
		{"one more", []rule.PairRules{pair(all[3])}, true, true, true, false},
		{"one comes and one goes", []rule.PairRules{pair(all[3]), none(all[2])}, false, true, false, true},
		{"an override that does not fit", []rule.PairRules{pair(all[1], refused)}, true, false, false, true},
		{"room for it", []rule.PairRules{none(all[3]), pair(all[1], refused)}, false, true, false, false},
		{"room by an override that goes", []rule.PairRules{pair(all[3]), pair(all[1])}, false, true, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := n.UpdatePolicy(tc.changed)
			if tc.wantErr {
				wantAdvice(t, err, "--max-policies")
			} else if err != nil {
				t.Error(err)
			}
			for _, connection := range []struct {
				from, to int
				want     bool
			}{{0, 1, tc.there}, {1, 0, tc.back}, {1, 1, tc.self}} {
				if got := n.isPaired(t, pods[connection.from], pods[connection.to], 5000); got != connection.want {
					t.Errorf("%s to %s: got paired %v, want %v", pods[connection.from].Name, pods[connection.to].Name, got, connection.want)
				}
			}
		})
	}
}

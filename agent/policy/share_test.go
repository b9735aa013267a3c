// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// naiveEntries counts prefixes by halving.
func naiveEntries(in *[1 << 16]bool, first, size int) int {
	some, all := false, true
	for _, b := range in[first : first+size] {
		some, all = some || b, all && b
	}
	switch {
	case all:
		return 1
	case !some:
		return 0
	}
	return naiveEntries(in, first, size/2) + naiveEntries(in, first+size/2, size/2)
}

func TestEntries(t *testing.T) {
	const seed = 1
	r := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		var in [1 << 16]bool
		var ranges []api.PortRange
		for range r.IntN(20) {
			first := 1 + r.IntN(65535)
			last := min(65535, first+r.IntN(1<<r.IntN(16)))
			ranges = append(ranges, api.PortRange{First: uint16(first), Last: uint16(last)})
			for port := first; port <= last; port++ {
				in[port] = true
			}
		}
		set := newPortSet(ranges)
		if got, want := set.entries(), naiveEntries(&in, 0, 1<<16); got != want {
			t.Fatalf("%v: got %d entries, want %d", set, got, want)
		}
	}
}

// oddPorts returns a number of ports that cannot be joined.
func oddPorts(number int) (ranges []api.PortRange) {
	for i := range number {
		ranges = append(ranges, api.PortRange{First: uint16(2*i + 1), Last: uint16(2*i + 1)})
	}
	return ranges
}

// policyOfPorts allows a number of ports that cannot be joined, with all pods.
func policyOfPorts(tb testing.TB, name, direction string, number int) *networkingv1.NetworkPolicy {
	tb.Helper()
	var ports []string
	for _, r := range oddPorts(number) {
		ports = append(ports, fmt.Sprintf("{port: %d}", r.First))
	}
	return mustPolicy(tb, "shop", name, fmt.Sprintf("{podSelector: {matchLabels: {app: web}}, policyTypes: [%s], %s: [{ports: [%s]}]}",
		direction, strings.ToLower(direction), strings.Join(ports, ", ")))
}

func TestShare(t *testing.T) {
	now := time.Now()
	pod := func(id uint64, name string, change func(*Pod)) Pod {
		p := Pod{ID: id, Namespace: "shop", Name: name, Labels: map[string]string{"app": name}, Settings: api.Settings{Enabled: true}}
		if change != nil {
			change(&p)
		}
		return p
	}
	const tooMany = "the ports that may be shortcut are too many ranges: join neighbours to ranges in "
	const raise = ", or raise --max-policies"
	for _, tc := range []struct {
		name     string
		web      func(*Pod)
		policies []*networkingv1.NetworkPolicy
		share    int
		want     string // of api to web's port 1, "" for allowed
		reverse  string // of web to api's port 1
	}{
		{name: "any number", web: func(p *Pod) { p.Settings.Ports = oddPorts(64) }},
		{name: "as many as there may be", web: func(p *Pod) { p.Settings.Ports = oddPorts(64) }, share: 64},
		{name: "one more", web: func(p *Pod) { p.Settings.Ports = oddPorts(64) }, share: 63, want: tooMany + "podshunt.io/ports of pod shop/web" + raise},
		{
			name: "a few that are excluded", web: func(p *Pod) { p.Settings.ExcludePorts = []api.PortRange{{First: 2, Last: 2}} },
			share: 2,
		},
		{
			name: "many that are excluded", web: func(p *Pod) {
				p.Settings.ExcludePorts = oddPorts(40)[1:]
				p.Settings.Ports = []api.PortRange{{First: 1, Last: 32768}}
			},
			share: 30, want: tooMany + "podshunt.io/exclude-ports of pod shop/web, podshunt.io/ports of pod shop/web" + raise,
		},
		{
			name:     "of a policy into the server",
			policies: []*networkingv1.NetworkPolicy{policyOfPorts(t, "in", "Ingress", 100)},
			share:    99, want: tooMany + "NetworkPolicy shop/in" + raise,
		},
		{
			name:     "of a policy out of the client",
			policies: []*networkingv1.NetworkPolicy{policyOfPorts(t, "out", "Egress", 100)},
			share:    99, reverse: tooMany + "NetworkPolicy shop/out" + raise,
		},
		{
			name:     "of a policy that is too large to be looked at",
			policies: []*networkingv1.NetworkPolicy{policyOfPorts(t, "in", "Ingress", 5000)},
			want: "NetworkPolicy does not allow it into the server: NetworkPolicy shop/in (its spec.ingress has 5000 ports and ranges, " +
				"at most 1024 are looked at: join neighbours by endPort)",
		},
		{
			name: "of policies that together are too large to be looked at",
			policies: []*networkingv1.NetworkPolicy{
				policyOfPorts(t, "a", "Ingress", 1000), policyOfPorts(t, "b", "Ingress", 1000), policyOfPorts(t, "c", "Ingress", 1000),
				policyOfPorts(t, "d", "Ingress", 1000), policyOfPorts(t, "e", "Ingress", 1000),
			},
			want: tooMany + "NetworkPolicies shop/a, shop/b, shop/c and 2 more" + raise,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			web, client := pod(1, "web", tc.web), pod(2, "api", nil)
			cluster := Cluster{Policies: tc.policies, Share: tc.share}
			var c Compiler
			c.Update([]Pod{web, client}, cluster, now)
			rules := map[pair][]rule.Rule{}
			for _, r := range c.Rules() {
				key := pair{r.Client, r.Server}
				rules[key] = append(rules[key], r)
			}
			for _, way := range []struct {
				client, server Pod
				want           string
			}{{client, web, tc.want}, {web, client, tc.reverse}} {
				want := way.want
				if want == "" {
					want = "allowed"
				}
				got := Explain(way.client, way.server, 1, cluster, now)
				if diff := cmp.Diff(want, got.String()); diff != "" {
					t.Errorf("%s to %s (-want +got)\n%s", way.client.Name, way.server.Name, diff)
				}
				if found := lookUp(rules[pair{way.client.ID, way.server.ID}], 1); found.Verdict != got.Verdict {
					t.Errorf("%s to %s: the rule says %v, Explain %v", way.client.Name, way.server.Name, found, got)
				}
			}
		})
	}
}

// The share of a pair changes with the number of pods: the compiler judges all pairs again.
func TestShareChanges(t *testing.T) {
	pods := []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: oddPorts(64)}}}
	var c Compiler
	for _, step := range []struct{ share, pairs, rules int }{{64, 1, 64}, {64, 0, 64}, {63, 1, 0}, {0, 1, 64}} {
		changed, _ := c.Update(pods, Cluster{Share: step.share}, time.Now())
		if len(changed) != step.pairs || len(c.Rules()) != step.rules {
			t.Errorf("share %d: got %d pairs changed and %d rules, want %d and %d", step.share, len(changed), len(c.Rules()), step.pairs, step.rules)
		}
	}
	for _, tc := range []struct{ entries, pods, want int }{
		{131072, 0, 2048}, {131072, 16, 2048}, {131072, 17, 1024}, {131072, 128, 256}, {131072, 1024, 32}, {16, 1024, 1},
	} {
		if got := Share(tc.entries, tc.pods); got != tc.want {
			t.Errorf("Share(%d, %d): got %d, want %d", tc.entries, tc.pods, got, tc.want)
		}
	}
}

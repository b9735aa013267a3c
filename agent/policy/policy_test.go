// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

func ports(bounds ...uint16) []api.PortRange {
	var ranges []api.PortRange
	for i := 0; i < len(bounds); i += 2 {
		ranges = append(ranges, api.PortRange{First: bounds[i], Last: bounds[i+1]})
	}
	return ranges
}

func TestRules(t *testing.T) {
	now := time.Date(2026, 1, 31, 18, 0, 0, 0, time.UTC)
	later, latest := now.Add(time.Minute), now.Add(time.Hour)
	all, port22 := api.PortRange{First: 0, Last: 65535}, api.PortRange{First: 22, Last: 22}
	on := api.Settings{Enabled: true}
	allow := Decision{Verdict: rule.Allow, Reason: Allowed}
	refuse := Decision{Verdict: rule.Refuse}
	hold := func(reason Reason) Decision { return Decision{Verdict: rule.Hold, Reason: reason} }
	newRule := func(client, server uint64, ports api.PortRange, d Decision) rule.Rule {
		return rule.Rule{
			Client: client, Server: server, First: ports.First, Last: ports.Last, Verdict: d.Verdict, Reason: uint32(d.Reason),
		}
	}
	// pair has a rule for each range.
	pair := func(client, server uint64, d Decision, ranges ...api.PortRange) rule.PairRules {
		p := rule.PairRules{Client: client, Server: server}
		for _, r := range ranges {
			p.Rules = append(p.Rules, newRule(client, server, r, d))
		}
		return p
	}
	blocking := func(p rule.PairRules) rule.PairRules {
		for i := range p.Rules {
			p.Rules[i].Blocking = true
		}
		return p
	}

	for _, tc := range []struct {
		name  string
		pods  []Pod
		rules []rule.PairRules
		until time.Time
	}{
		{name: "no pods"},
		{
			name: "not opted in",
			pods: []Pod{{ID: 1}, {ID: 2, Settings: on}, {ID: 3, Settings: api.Settings{PausedUntil: later}}},
			rules: []rule.PairRules{
				pair(2, 2, allow, all),
			},
		},
		{
			name: "every ordered pair and loopback",
			pods: []Pod{{ID: 1, Settings: on}, {ID: 2, Settings: on}},
			rules: []rule.PairRules{
				pair(1, 1, allow, all),
				pair(2, 1, allow, all),
				pair(1, 2, allow, all),
				pair(2, 2, allow, all),
			},
		},
		{
			name:  "listed ports",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(8000, 8010, 80, 80)}}},
			rules: []rule.PairRules{pair(1, 1, allow, ports(80, 80, 8000, 8010)...)},
		},
		{
			name: "excluded ports",
			pods: []Pod{{ID: 1, Settings: api.Settings{Enabled: true, ExcludePorts: ports(22, 22)}}},
			rules: []rule.PairRules{{Client: 1, Server: 1, Rules: []rule.Rule{
				newRule(1, 1, all, allow),
				newRule(1, 1, port22, refuse),
			}}},
		},
		{
			name:  "exclusion wins over the list",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(10, 20), ExcludePorts: ports(15, 30)}}},
			rules: []rule.PairRules{pair(1, 1, allow, ports(10, 14)...)},
		},
		{
			name: "the shorter list",
			pods: []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(1, 10, 12, 20, 22, 65535)}}},
			rules: []rule.PairRules{{Client: 1, Server: 1, Rules: []rule.Rule{
				newRule(1, 1, all, allow),
				newRule(1, 1, api.PortRange{First: 11, Last: 11}, refuse),
				newRule(1, 1, api.PortRange{First: 21, Last: 21}, refuse),
			}}},
		},
		{
			name:  "overlapping and adjacent ranges are one",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(10, 20, 15, 30, 31, 40)}}},
			rules: []rule.PairRules{pair(1, 1, allow, ports(10, 40)...)},
		},
		{
			name:  "all ports listed",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(1, 65535)}}},
			rules: []rule.PairRules{pair(1, 1, allow, all)},
		},
		{
			name: "all ports excluded",
			pods: []Pod{{ID: 1, Settings: api.Settings{Enabled: true, ExcludePorts: ports(1, 65535)}}},
		},
		{
			name:  "last port",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(65535, 65535)}}},
			rules: []rule.PairRules{pair(1, 1, allow, ports(65535, 65535)...)},
		},
		{
			name: "pause holds both roles and the earliest end counts",
			pods: []Pod{
				{ID: 1, Settings: api.Settings{Enabled: true, PausedUntil: latest}},
				{ID: 2, Settings: api.Settings{Enabled: true, PausedUntil: later}},
			},
			rules: []rule.PairRules{
				pair(1, 1, hold(ClientPaused), all),
				pair(2, 1, hold(ClientPaused), all),
				pair(1, 2, hold(ClientPaused), all),
				pair(2, 2, hold(ClientPaused), all),
			},
			until: later,
		},
		{
			name: "a refusal is none less during a pause",
			pods: []Pod{
				{ID: 1, Settings: on, Bandwidth: "kubernetes.io/egress-bandwidth"},
				{ID: 2, Settings: api.Settings{Enabled: true, PausedUntil: later, Ports: ports(80, 80)}},
				{ID: 3, Settings: on},
			},
			rules: []rule.PairRules{
				pair(2, 2, hold(ClientPaused), ports(80, 80)...),
				pair(3, 2, hold(ServerPaused), ports(80, 80)...),
				pair(2, 3, hold(ClientPaused), all),
				pair(3, 3, allow, all),
			},
			until: later,
		},
		{
			name: "blocking sockets where both pods accept them, not on refused ports",
			pods: []Pod{
				{ID: 1, Settings: api.Settings{Enabled: true, AcceptBlocking: true, PausedUntil: later}},
				{ID: 2, Settings: api.Settings{Enabled: true, AcceptBlocking: true, ExcludePorts: ports(22, 22)}},
				{ID: 3, Settings: on},
			},
			rules: []rule.PairRules{
				blocking(pair(1, 1, hold(ClientPaused), all)),
				blocking(pair(2, 1, hold(ServerPaused), all)),
				pair(3, 1, hold(ServerPaused), all),
				{Client: 1, Server: 2, Rules: append(blocking(pair(1, 2, hold(ClientPaused), all)).Rules, newRule(1, 2, port22, refuse))},
				{Client: 2, Server: 2, Rules: append(blocking(pair(2, 2, allow, all)).Rules, newRule(2, 2, port22, refuse))},
				{Client: 3, Server: 2, Rules: append(pair(3, 2, allow, all).Rules, newRule(3, 2, port22, refuse))},
				pair(1, 3, hold(ClientPaused), all),
				pair(2, 3, allow, all),
				pair(3, 3, allow, all),
			},
			until: later,
		},
		{
			name:  "a pause that is over",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, PausedUntil: now}}},
			rules: []rule.PairRules{pair(1, 1, allow, all)},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var c Compiler
			rules, until := c.Update(tc.pods, Cluster{}, now)
			if diff := cmp.Diff(tc.rules, rules); diff != "" {
				t.Errorf("rules (-want +got)\n%s", diff)
			}
			if !until.Equal(tc.until) {
				t.Errorf("until: got %v, want %v", until, tc.until)
			}
			if rules, _ := c.Update(tc.pods, Cluster{}, now); rules != nil {
				t.Errorf("the same again: got %v, want no change", rules)
			}
		})
	}
}

// TestChanges: an update returns the pairs that a change is about, and no others.
func TestChanges(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	on := api.Settings{Enabled: true}
	pod := func(id uint64, name string) Pod {
		return Pod{
			ID: id, Namespace: "default", Name: name, Settings: on,
			Labels: map[string]string{"app": name},
		}
	}
	web, db, job := pod(1, "web"), pod(2, "db"), pod(3, "job")
	closed := mustPolicy(t, "default", "db", "podSelector: {matchLabels: {app: db}}")
	open := mustPolicy(t, "default", "db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: a}}}]}]}`)
	with := func(labels map[string]string, policies ...*networkingv1.NetworkPolicy) Cluster {
		return Cluster{Namespaces: map[string]map[string]string{"default": labels}, Policies: policies}
	}
	teamA := map[string]string{"team": "a"}
	renamed, paused, blocking, out := web, web, web, web
	blocking.Settings.AcceptBlocking, db.Settings.AcceptBlocking = true, true
	renamed.Labels = map[string]string{"app": "other"}
	paused.Settings.PausedUntil = now.Add(time.Second)
	out.Settings = api.Settings{}

	var c Compiler
	for _, step := range []struct {
		name    string
		pods    []Pod
		cluster Cluster
		after   time.Duration
		want    []string // client-server=number of rules
	}{
		{"pods come", []Pod{web, db}, with(nil), 0, []string{"1-1=1", "2-1=1", "1-2=1", "2-2=1"}},
		{"one more", []Pod{web, db, job}, with(nil), 0, []string{"3-1=1", "3-2=1", "1-3=1", "2-3=1", "3-3=1"}},
		{"a policy", []Pod{web, db, job}, with(nil, closed), 0, []string{"1-2=0", "3-2=0"}},
		{"it is replaced by one that comes to the same", []Pod{web, db, job}, with(nil, open), 0, nil},
		{"the namespace gets a label", []Pod{web, db, job}, with(teamA, open), 0, []string{"1-2=1", "3-2=1"}},
		{"labels that no policy asks for", []Pod{renamed, db, job}, with(teamA, open), 0, nil},
		{"a pause", []Pod{paused, db, job}, with(teamA, open), 0, []string{"1-1=1", "2-1=1", "3-1=1", "1-2=1", "1-3=1"}},
		{"its end", []Pod{paused, db, job}, with(teamA, open), time.Second, []string{"1-1=1", "2-1=1", "3-1=1", "1-2=1", "1-3=1"}},
		{"both of a pair accept blocking sockets", []Pod{blocking, db, job}, with(teamA, open), time.Second, []string{"1-1=1", "2-1=1", "1-2=1"}},
		{"only one does", []Pod{web, db, job}, with(teamA, open), time.Second, []string{"1-1=1", "2-1=1", "1-2=1"}},
		{"opted out", []Pod{out, db, job}, with(teamA, open), 0, []string{"1-1=0", "1-2=0", "1-3=0", "2-1=0", "3-1=0"}},
		{"a pod goes", []Pod{out, db}, with(teamA, open), 0, []string{"2-3=0", "3-2=0", "3-3=0"}},
		{"all go", nil, Cluster{}, 0, []string{"2-2=0"}},
	} {
		changed, _ := c.Update(step.pods, step.cluster, now.Add(step.after))
		var got []string
		for _, p := range changed {
			got = append(got, sprintPair(p))
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("%s: changed pairs (-want +got):\n%s", step.name, diff)
		}
	}
}

// TestReasons: of several reasons, users are told the first.
func TestReasons(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	client := Pod{ID: 1, Namespace: "shop", Name: "web", Bandwidth: "kubernetes.io/egress-bandwidth"}
	server := Pod{ID: 2, Namespace: "data", Name: "db", Bandwidth: "kubernetes.io/ingress-bandwidth"}
	client.Settings.PausedUntil, server.Settings.PausedUntil = now.Add(1), now.Add(1)
	server.Settings.Ports, server.Settings.ExcludePorts = ports(1, 79), ports(80, 80)
	cluster := Cluster{Policies: []*networkingv1.NetworkPolicy{
		mustPolicy(t, "data", "deny-all", "{podSelector: {}, policyTypes: [Ingress, Egress]}"),
		mustPolicy(t, "shop", "e", "{podSelector: {}, policyTypes: [Egress]}"),
		mustPolicy(t, "shop", "d", "{podSelector: {}, policyTypes: [Egress]}"),
		mustPolicy(t, "shop", "c", "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 443}]}]}"),
		mustPolicy(t, "shop", "bad", "{podSelector: {}, policyTypes: [Egress], egress: [{}, {to: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}"),
		mustPolicy(t, "shop", "a", "{podSelector: {}, policyTypes: [Ingress]}"),
	}}
	for _, step := range []struct {
		change func() // takes away the reason before
		want   string
	}{
		{func() {}, "client not opted in"},
		{func() { client.Settings.Enabled = true }, "server not opted in"},
		{func() { server.Settings.Enabled = true }, "server port not in podshunt.io/ports"},
		{func() { server.Settings.Ports = nil }, "server port in podshunt.io/exclude-ports"},
		{func() { server.Settings.ExcludePorts = nil }, "the client's bandwidth is limited, and the shortcut would bypass the limit: " +
			"pod shop/web has kubernetes.io/egress-bandwidth"},
		{func() { client.Bandwidth = "" }, "the server's bandwidth is limited, and the shortcut would bypass the limit: " +
			"pod data/db has kubernetes.io/ingress-bandwidth"},
		{func() { server.Bandwidth = "" }, "NetworkPolicy does not allow it into the server: NetworkPolicy data/deny-all"},
		{func() { cluster.Policies = cluster.Policies[1:] }, "NetworkPolicy does not allow it out of the client: " +
			"NetworkPolicies shop/bad (its spec.egress[1].to[0] is not valid), shop/c, shop/d and 1 more"},
		{func() { cluster.Policies = nil }, "client paused by podshunt.io/paused-until"},
		{func() { client.Settings.PausedUntil = now }, "server paused by podshunt.io/paused-until"},
		{func() { server.Settings.PausedUntil = now }, "allowed"},
	} {
		step.change()
		if got := Explain(client, server, 80, cluster, now).String(); got != step.want {
			t.Errorf("got %q, want %q", got, step.want)
		}
	}
}

func TestReasonString(t *testing.T) {
	seen := map[string]bool{}
	for r := range reasonMax {
		text := r.String()
		if seen[text] || strings.HasPrefix(text, "reason ") {
			t.Errorf("reason %d has no text of its own: %q", uint32(r), text)
		}
		seen[text] = true
	}
	if got, want := reasonMax.String(), "of another version"; !strings.Contains(got, want) {
		t.Errorf("got %q, want it to contain %q", got, want)
	}
}

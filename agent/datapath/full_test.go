// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// wantAdvice wants an error that names the setting to raise.
func wantAdvice(tb testing.TB, err error, flag string) {
	tb.Helper()
	if err == nil || !strings.Contains(err.Error(), "raise "+flag+":") {
		tb.Errorf("got error %v, want one that says to raise %s", err, flag)
	}
}

// TestPodsFull: a pod that cannot be enrolled is left alone, the others are not.
func TestPodsFull(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.SetSizes(1, 0, 0) })
	pods, cookies := n.MustEnrol(t, "first")
	second := sandboxtest.MustAddPod(t, n, "second", sandbox.PodOptions{})
	wantAdvice(t, n.Enrol(sandboxtest.MustCookie(t, second)), "--max-policies")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))

	l, address := mustListenOn(t, pods[0])
	c, s := connect(t, second.Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, map[string]uint64{})
	own, ownS := connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, own, ownS, 10, 100)
	n.mustCount(t, nil, paired())

	if err := n.Release(cookies[0]); err != nil {
		t.Fatal(err)
	}
	if err := n.Enrol(sandboxtest.MustCookie(t, second)); err != nil {
		t.Errorf("after the release of another pod: %v", err)
	}
}

// isPaired reports whether a new connection is paired; its bytes are checked in any case.
func (n *node) isPaired(tb testing.TB, from *sandbox.Pod, to *sandbox.Pod, port uint16) bool {
	tb.Helper()
	l := sandboxtest.MustListen(tb, to, "tcp4", fmt.Sprintf("%s:%d", to.IPv4, port))
	defer l.Close()
	before := n.counts(tb)
	c, s := connect(tb, from.Netns, l, "tcp4", l.Addr().(*net.TCPAddr).AddrPort())
	sandboxtest.MustPing(tb, c, s, 10, 100)
	got := n.since(tb, before)
	c.Close()
	s.Close()
	if len(got) == 1 && got["connection_policy_refused"] == 1 {
		return false
	}
	if diff := cmp.Diff(paired(), got); diff != "" {
		tb.Errorf("port %d: counters are neither of a refused connection nor of a paired one (-want +got):\n%s", port, diff)
	}
	return true
}

// TestPoliciesFull: pods whose rules did not fit stay on TCP, wholly.
func TestPoliciesFull(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.MaxPolicies = 4 })
	pods, cookies := n.MustEnrol(t, "first", "second", "third")
	newRule := func(client, server int, first, last uint16, verdict rule.Verdict) rule.Rule {
		return rule.Rule{Client: cookies[client], Server: cookies[server], First: first, Last: last, Verdict: verdict}
	}
	base := newRule(0, 1, 0, 65535, rule.Allow)
	other := newRule(0, 2, 0, 65535, rule.Allow)

	for _, tc := range []struct {
		name                  string
		rules                 []rule.Rule
		wantErr               bool
		wantFirst, wantSecond bool // paired from first to second, and to third
	}{
		{"fits", []rule.Rule{base, other}, false, true, true},
		// 1 to 1000 are 16 prefixes.
		{"override does not fit", []rule.Rule{base, newRule(0, 1, 1, 1000, rule.Refuse), other}, true, false, true},
		{"the same again", []rule.Rule{base, newRule(0, 1, 1, 1000, rule.Refuse), other}, true, false, true},
		{"fits again", []rule.Rule{base, other}, false, true, true},
		{"both fit with small overrides", []rule.Rule{base, newRule(0, 1, 80, 80, rule.Refuse), other, newRule(0, 2, 80, 80, rule.Refuse)}, false, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := n.SetPolicy(tc.rules)
			if tc.wantErr {
				wantAdvice(t, err, "--max-policies")
			} else if err != nil {
				t.Error(err)
			}
			for i, want := range []bool{tc.wantFirst, tc.wantSecond} {
				// Among the ports of the override and outside of it.
				for _, port := range []uint16{500, 5000} {
					if got := n.isPaired(t, pods[0], pods[1+i], port); got != want {
						t.Errorf("to %s, port %d: got paired %v, want %v", pods[1+i].Name, port, got, want)
					}
				}
			}
		})
	}

	t.Run("more pairs than fit", func(t *testing.T) {
		rules := sandbox.Between(rule.Allow, cookies...)
		wantAdvice(t, n.SetPolicy(rules), "--max-policies")
		allowed := 0
		for _, from := range pods {
			for _, to := range pods {
				if n.isPaired(t, from, to, 5000) {
					allowed++
				}
			}
		}
		if allowed == 0 || allowed > 4 {
			t.Errorf("got %d of %d pairs of pods allowed, want some, and at most 4", allowed, len(rules))
		}
		n.waitUsage(t, map[string]int{"pods": 3, "policies": allowed})
	})
}

// TestPoliciesReplacedInFullMap: a policy that fits is in force at once, even
// where the map cannot hold it next to the one before.
func TestPoliciesReplacedInFullMap(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.MaxPolicies = 1 })
	pods, cookies := n.MustEnrol(t, "first", "second")
	for _, pair := range [][2]int{{0, 1}, {1, 0}} {
		from, to := pair[0], pair[1]
		err := n.SetPolicy([]rule.Rule{{Client: cookies[from], Server: cookies[to], Last: 65535, Verdict: rule.Allow}})
		if err != nil {
			t.Errorf("%s to %s: %v", pods[from].Name, pods[to].Name, err)
		}
		if !n.isPaired(t, pods[from], pods[to], 5000) {
			t.Errorf("%s to %s: got refused, want paired", pods[from].Name, pods[to].Name)
		}
		if n.isPaired(t, pods[to], pods[from], 5000) {
			t.Errorf("%s to %s: got paired, want refused", pods[to].Name, pods[from].Name)
		}
	}
}

// TestPortRanges: which ports a set of rules lets be paired.
func TestPortRanges(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	ports := []uint16{1, 79, 80, 81, 1000, 1001, 1006, 1007, 4095, 4096, 7999, 8000, 8001, 32768, 65534, 65535}
	for _, tc := range []struct {
		name  string
		rules []rule.Rule
		want  []uint16
	}{
		{"no rule", nil, nil},
		{"base", []rule.Rule{{Last: 65535, Verdict: rule.Allow}}, ports},
		{"ranges", []rule.Rule{
			{First: 80, Last: 80, Verdict: rule.Allow},
			{First: 1001, Last: 1006, Verdict: rule.Allow},
			{First: 4095, Last: 8000, Verdict: rule.Allow},
			{First: 65535, Last: 65535, Verdict: rule.Allow},
		}, []uint16{80, 1001, 1006, 4095, 4096, 7999, 8000, 65535}},
		{"overrides in a base", []rule.Rule{
			{Last: 65535, Verdict: rule.Allow},
			{First: 80, Last: 1000, Verdict: rule.Refuse},
			{First: 1007, Last: 7999, Verdict: rule.Refuse},
			{First: 65535, Last: 65535, Verdict: rule.Refuse},
		}, []uint16{1, 79, 1001, 1006, 8000, 8001, 32768, 65534}},
		{"allowed inside of a refusal", []rule.Rule{
			{Last: 65535, Verdict: rule.Refuse},
			{First: 81, Last: 1006, Verdict: rule.Allow},
		}, []uint16{81, 1000, 1001, 1006}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for i := range tc.rules {
				tc.rules[i].Client, tc.rules[i].Server = cookies[0], cookies[1]
			}
			n.MustSetPolicy(t, tc.rules)
			var got []uint16
			for _, port := range ports {
				if n.isPaired(t, pods[0], pods[1], port) {
					got = append(got, port)
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("ports paired (-want +got):\n%s", diff)
			}
		})
	}
	n.MustSetPolicy(t, nil)
	n.waitUsage(t, map[string]int{"pods": 2})
}

// TestConnectionsFull: connections that find a map full stay on TCP and are
// counted; when others have closed there is room again.
func TestConnectionsFull(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*datapath.Config)
		want   map[string]uint64 // of 5 connections
		usage  map[string]int
	}{
		{
			// Half of the map is the most that one pod may have.
			"share of flows", func(c *datapath.Config) { c.MaxFlows = 4 },
			map[string]uint64{
				"connection_paired": 2, "connection_share": 3, "message_not_seen": 4, "message_shortcut": 36,
			},
			map[string]int{"pods": 2, "policies": 4, "flows": 2, "sockets": 4},
		},
		{
			// The second connection's client joins, its server does not.
			"sockets", func(c *datapath.Config) { c.SetSizes(0, 0, 3) },
			map[string]uint64{
				"connection_paired": 1, "connection_sockets_full": 4, "message_not_seen": 2, "message_shortcut": 18,
				"message_peer_missing": 10,
			},
			map[string]int{"pods": 2, "policies": 4, "flows": 2, "sockets": 3},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, tc.change)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			l, address := mustListenOn(t, pods[1])
			for range 2 {
				before := n.counts(t)
				var conns []net.Conn
				for range 5 {
					c, s := connect(t, pods[0].Netns, l, "tcp4", address)
					conns = append(conns, c, s)
				}
				for i := 0; i < len(conns); i += 2 {
					sandboxtest.MustPing(t, conns[i], conns[i+1], 10, 100)
				}
				n.mustCount(t, before, tc.want)
				if diff := cmp.Diff(tc.usage, n.usage(t)); diff != "" {
					t.Errorf("map usage (-want +got):\n%s", diff)
				}
				for _, c := range conns {
					c.Close()
				}
				n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
			}
		})
	}
}

// TestFlowsFull: two pairs of pods fill the map, each with its share, and the
// connections of a third stay on TCP until there is room.
func TestFlowsFull(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.MaxFlows = 4 })
	var pods []*sandbox.Pod
	var rules []rule.Rule
	for i := range 3 {
		names := []string{fmt.Sprintf("client%d", i), fmt.Sprintf("server%d", i)}
		two, cookies := n.MustEnrol(t, names...)
		pods = append(pods, two...)
		rules = append(rules, sandbox.Between(rule.Allow, cookies...)...)
	}
	n.MustSetPolicy(t, rules)
	open := func(i int) []net.Conn {
		l, address := mustListenOn(t, pods[2*i+1])
		var conns []net.Conn
		for range 2 {
			c, s := connect(t, pods[2*i].Netns, l, "tcp4", address)
			sandboxtest.MustPing(t, c, s, 10, 100)
			conns = append(conns, c, s)
		}
		return conns
	}
	first := open(0)
	open(1)
	before := n.counts(t)
	open(2)
	n.mustCount(t, before, map[string]uint64{"connection_flows_full": 2})
	for _, c := range first {
		c.Close()
	}
	n.waitUsage(t, map[string]int{"pods": 6, "policies": 12, "flows": 2, "sockets": 4})
	before = n.counts(t)
	open(2)
	n.mustCount(t, before, map[string]uint64{"connection_paired": 2, "message_not_seen": 4, "message_shortcut": 36})
}

// TestPendingFull: of more handshakes at once than the maps hold, the oldest
// are forgotten and their connections stay on TCP.
func TestPendingFull(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.SetSizes(0, 8, 0) })
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(t, pods[1])
	const connections = 64
	dropped, restore := mustDropSYNACKs(t, pods[0].Netns, pods[1].IPv4)
	var attempts []dialling
	for i := range connections {
		attempts = append(attempts, dialInBackground(pods[0].Netns, uint16(20000+i), l, address))
	}
	waitUntil(t, "all SYN-ACKs", func() bool { return dropped() >= connections })
	restore()
	clients, servers := map[string]net.Conn{}, map[string]net.Conn{}
	for _, d := range attempts {
		// Accepted in any order.
		c, s := d.mustFinish(t)
		clients[c.LocalAddr().String()], servers[s.RemoteAddr().String()] = c, s
	}
	for address, c := range clients {
		s := servers[address]
		if s == nil {
			t.Fatalf("no server's end for %s", address)
		}
		sandboxtest.MustPing(t, c, s, 10, 100)
		c.Close()
		s.Close()
	}
	counts := n.counts(t)
	t.Log(counts)
	lost := counts["connection_syn_lost"] + counts["connection_unmatched"] + counts["connection_pending_full"]
	if counts["connection_paired"]+lost != connections || lost == 0 {
		t.Errorf("got %v, want every one of %d connections either paired or lost, and some lost", counts, connections)
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
	if !n.isPaired(t, pods[0], pods[1], 5000) {
		t.Error("a later connection was refused")
	}
}

// TestSmallPairsFirst: a pair with many entries takes no room that others need,
// whatever order they come in, and what goes away is in force before the rest is written.
func TestSmallPairsFirst(t *testing.T) {
	n := mustNode(t, func(c *datapath.Config) { c.MaxPolicies = 4 })
	pods, cookies := n.MustEnrol(t, "large", "small", "other")
	pair := func(client, server int, ports ...uint16) (rules []rule.Rule) {
		for _, port := range ports {
			rules = append(rules, rule.Rule{
				Client: cookies[client], Server: cookies[server], First: port, Last: port, Verdict: rule.Allow,
			})
		}
		return rules
	}
	large := pair(0, 1, 501, 503, 505, 507)
	for range 10 { // the order of a map is another one each time
		if err := n.SetPolicy(nil); err != nil {
			t.Fatal(err)
		}
		err := n.SetPolicy(slices.Concat(large, pair(1, 2, 501), pair(2, 1, 501)))
		wantAdvice(t, err, "--max-policies")
		if err != nil && !strings.Contains(err.Error(), "1 pairs of pods stay on TCP: ") {
			t.Errorf("got error %v, want one that says how many pairs", err)
		}
		n.waitUsage(t, map[string]int{"pods": 3, "policies": 2})
	}
	for _, tc := range []struct {
		from, to int
		want     bool
	}{{0, 1, false}, {1, 2, true}, {2, 1, true}} {
		if got := n.isPaired(t, pods[tc.from], pods[tc.to], 501); got != tc.want {
			t.Errorf("%s to %s: got paired %v, want %v", pods[tc.from].Name, pods[tc.to].Name, got, tc.want)
		}
	}

	before := n.generation(t)
	if err := n.SetPolicy(large); err != nil {
		t.Error(err)
	}
	if got, want := n.generation(t)-before, uint32(2); got != want {
		t.Errorf("got the generation raised %d times, want %d: after the deletions and after all", got, want)
	}
}

// TestMapsAreCounted: maps larger than a batch, and the policy map without a look at it.
func TestMapsAreCounted(t *testing.T) {
	const syns, others = 5000, 3000
	n := mustNode(t, func(c *datapath.Config) { c.MaxFlows = 4 * syns })
	_, cookies := n.MustEnrol(t, "first", "second")
	open := func(name string) *ebpf.Map {
		t.Helper()
		m, err := ebpf.LoadPinnedMap(filepath.Join(n.Config.PinDir, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	table := open(bpf.ShortcutMapSyns)
	for i := range uint32(syns) {
		if err := table.Put(bpf.ShortcutClientKey{Netns: uint64(i + 1)}, bpf.ShortcutSyn{}); err != nil {
			t.Fatal(err)
		}
	}
	// Not ours, so that it is seen who counts them.
	table = open(bpf.ShortcutMapPolicies)
	for i := range uint32(others) {
		key := bpf.ShortcutPolicyKey{Prefixlen: 128, Client: [2]uint32{i, 1 << 31}}
		if err := table.Put(key, bpf.ShortcutPolicy{}); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(map[string]int{"pods": 2, "syns": syns, "policies": others}, n.usage(t)); diff != "" {
		t.Errorf("before the first policy (-want +got)\n%s", diff)
	}
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	key := bpf.ShortcutPolicyKey{Prefixlen: 128, Client: [2]uint32{0, 1 << 31}}
	if err := table.Put(key, bpf.ShortcutPolicy{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]int{"pods": 2, "syns": syns, "policies": 4}, n.usage(t)); diff != "" {
		t.Errorf("with a policy (-want +got)\n%s", diff)
	}
}

// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

func ports(bounds ...uint16) []api.PortRange {
	var ranges []api.PortRange
	for i := 0; i < len(bounds); i += 2 {
		ranges = append(ranges, api.PortRange{First: bounds[i], Last: bounds[i+1]})
	}
	return ranges
}

func TestCompile(t *testing.T) {
	now := time.Date(2026, 1, 31, 18, 0, 0, 0, time.UTC)
	later, latest := now.Add(time.Minute), now.Add(time.Hour)
	all := api.PortRange{First: 0, Last: 65535}
	on := api.Settings{Enabled: true}
	allow := Decision{Verdict: Allow, Reason: Allowed}
	notListed := Decision{Verdict: Refuse, Reason: PortNotListed}
	excluded := Decision{Verdict: Refuse, Reason: PortExcluded}

	for _, tc := range []struct {
		name  string
		pods  []Pod
		rules []Rule
		until time.Time
	}{
		{name: "no pods"},
		{
			name: "not opted in",
			pods: []Pod{{ID: 1, Settings: api.Settings{}}, {ID: 2, Settings: on}, {ID: 3, Settings: api.Settings{PausedUntil: later}}},
			rules: []Rule{
				{2, 2, all, allow},
			},
		},
		{
			name: "every ordered pair and loopback",
			pods: []Pod{{ID: 1, Settings: on}, {ID: 2, Settings: on}},
			rules: []Rule{
				{1, 1, all, allow},
				{2, 1, all, allow},
				{1, 2, all, allow},
				{2, 2, all, allow},
			},
		},
		{
			name: "listed ports",
			pods: []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(8000, 8010, 80, 80)}}},
			rules: []Rule{
				{1, 1, all, notListed},
				{1, 1, api.PortRange{First: 80, Last: 80}, allow},
				{1, 1, api.PortRange{First: 8000, Last: 8010}, allow},
			},
		},
		{
			name: "excluded ports",
			pods: []Pod{{ID: 1, Settings: api.Settings{Enabled: true, ExcludePorts: ports(22, 22)}}},
			rules: []Rule{
				{1, 1, all, allow},
				{1, 1, api.PortRange{First: 22, Last: 22}, excluded},
			},
		},
		{
			name: "exclusion wins over the list",
			pods: []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(10, 20), ExcludePorts: ports(15, 30)}}},
			rules: []Rule{
				{1, 1, all, notListed},
				{1, 1, api.PortRange{First: 10, Last: 14}, allow},
				{1, 1, api.PortRange{First: 15, Last: 20}, excluded},
			},
		},
		{
			name:  "overlapping and adjacent ranges are one",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(10, 20, 15, 30, 31, 40)}}},
			rules: []Rule{{1, 1, all, notListed}, {1, 1, api.PortRange{First: 10, Last: 40}, allow}},
		},
		{
			name:  "all ports listed",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(1, 65535)}}},
			rules: []Rule{{1, 1, all, allow}},
		},
		{
			name:  "all ports excluded",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, ExcludePorts: ports(1, 65535)}}},
			rules: []Rule{{1, 1, all, excluded}},
		},
		{
			name:  "last port",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, Ports: ports(65535, 65535)}}},
			rules: []Rule{{1, 1, all, notListed}, {1, 1, api.PortRange{First: 65535, Last: 65535}, allow}},
		},
		{
			name: "pause holds both roles and the earliest end counts",
			pods: []Pod{
				{ID: 1, Settings: api.Settings{Enabled: true, PausedUntil: latest, Ports: ports(80, 80)}},
				{ID: 2, Settings: api.Settings{Enabled: true, PausedUntil: later}},
			},
			rules: []Rule{
				{1, 1, all, Decision{Verdict: Hold, Reason: ClientPaused}},
				{2, 1, all, Decision{Verdict: Hold, Reason: ClientPaused}},
				{1, 2, all, Decision{Verdict: Hold, Reason: ClientPaused}},
				{2, 2, all, Decision{Verdict: Hold, Reason: ClientPaused}},
			},
			until: later,
		},
		{
			name: "paused server",
			pods: []Pod{{ID: 1, Settings: on}, {ID: 2, Settings: api.Settings{Enabled: true, PausedUntil: later, Ports: ports(80, 80)}}},
			rules: []Rule{
				{1, 1, all, allow},
				{2, 1, all, Decision{Verdict: Hold, Reason: ClientPaused}},
				{1, 2, all, Decision{Verdict: Hold, Reason: ServerPaused}},
				{2, 2, all, Decision{Verdict: Hold, Reason: ClientPaused}},
			},
			until: later,
		},
		{
			name:  "a pause that is over",
			pods:  []Pod{{ID: 1, Settings: api.Settings{Enabled: true, PausedUntil: now}}},
			rules: []Rule{{1, 1, all, allow}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rules, until := compile(tc.pods, now)
			if diff := cmp.Diff(tc.rules, rules); diff != "" {
				t.Errorf("rules (-want +got)\n%s", diff)
			}
			if !until.Equal(tc.until) {
				t.Errorf("until: got %v, want %v", until, tc.until)
			}
		})
	}
}

// TestRandom compares Compile and Explain with an evaluator that knows nothing
// of ranges: it asks every port in turn.
func TestRandom(t *testing.T) {
	const seed = 1
	random := rand.New(rand.NewPCG(seed, seed))
	now := time.Unix(1_000_000, 0)

	randomRanges := func() []api.PortRange {
		var ranges []api.PortRange
		for range random.IntN(4) {
			// Low and few ports, so that ranges meet; sometimes the last ones.
			first := 1 + random.IntN(30)
			if random.IntN(4) == 0 {
				first = 65535 - random.IntN(10)
			}
			last := min(65535, first+random.IntN(10))
			ranges = append(ranges, api.PortRange{First: uint16(first), Last: uint16(last)})
		}
		return ranges
	}
	for range 10 {
		var pods []Pod
		for id := range 3 {
			p := Pod{ID: uint64(id + 1), Settings: api.Settings{
				Enabled: random.IntN(5) > 0, Ports: randomRanges(), ExcludePorts: randomRanges(),
			}}
			if random.IntN(4) == 0 {
				p.Settings.PausedUntil = now.Add(time.Duration(random.IntN(3)-1) * time.Second)
			}
			pods = append(pods, p)
		}
		rules, _ := compile(pods, now)
		for _, client := range pods {
			for _, server := range pods {
				table := naive(client, server, now)
				applied := apply(t, rules, client.ID, server.ID)
				for port := 1; port <= 65535; port++ {
					if got := applied[port].Verdict; got != table[port] {
						t.Fatalf("%+v to %+v port %d: Compile says %d, want %d", client, server, port, got, table[port])
					}
				}
				for range 50 {
					port := 1 + random.IntN(45)
					got, want := Explain(client, server, uint16(port), Cluster{}, now), applied[port]
					if !client.Settings.Enabled || !server.Settings.Enabled {
						want = Decision{Verdict: Refuse, Reason: got.Reason}
					}
					if got != want {
						t.Fatalf("%+v to %+v port %d: Explain says %+v, Compile %+v", client, server, port, got, want)
					}
				}
			}
		}
	}
}

// naive answers for every port of a pair.
func naive(client, server Pod, now time.Time) []Verdict {
	mark := func(ranges []api.PortRange) map[int]bool {
		marked := map[int]bool{}
		for _, r := range ranges {
			for port := int(r.First); port <= int(r.Last); port++ {
				marked[port] = true
			}
		}
		return marked
	}
	listed, excluded := mark(server.Settings.Ports), mark(server.Settings.ExcludePorts)
	table := make([]Verdict, 65536)
	if !client.Settings.Enabled || !server.Settings.Enabled {
		return table
	}
	for port := range table {
		switch {
		case client.Settings.PausedUntil.Sub(now) > 0, server.Settings.PausedUntil.Sub(now) > 0:
			table[port] = Hold
		case (len(listed) == 0 || listed[port]) && !excluded[port]:
			table[port] = Allow
		}
	}
	return table
}

// apply does what the kernel does with the rules of a pair, and checks their form.
func apply(t testing.TB, rules []Rule, client, server uint64) []Decision {
	t.Helper()
	table := make([]Decision, 65536)
	narrow := make([]bool, 65536)
	first := true
	for _, r := range rules {
		if r.Client != client || r.Server != server {
			continue
		}
		base := r.Ports == api.PortRange{First: 0, Last: 65535}
		if base != first {
			t.Fatalf("rule %+v: the base of a pair must be its first rule, and only that", r)
		}
		first = false
		for port := int(r.Ports.First); port <= int(r.Ports.Last); port++ {
			if narrow[port] {
				t.Fatalf("rule %+v overlaps another at port %d", r, port)
			}
			narrow[port] = !base
			table[port] = r.Decision
		}
	}
	return table
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

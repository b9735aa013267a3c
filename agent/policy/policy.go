// SPDX-License-Identifier: Apache-2.0

// Package policy decides which connections between the pods of this node may be
// shortcut, and says why not in words for users. It is pure: pods and a time in,
// rules out; it does no I/O and keeps no state.
package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podshunt/podshunt/api"
)

// Verdict is what holds for a connection.
type Verdict uint32

const (
	// Refuse keeps it on TCP.
	Refuse Verdict = iota
	// Allow lets it be shortcut.
	Allow
	// Hold keeps it on TCP for a while: it will be shortcut without a new
	// connection when the reason is over.
	Hold
)

// Reason is why a verdict is what it is. The numbers are stored in the kernel
// next to the verdict; an agent that starts writes its own.
type Reason uint32

const (
	// NoRule is what the kernel has for a pair that no rule is for.
	NoRule Reason = iota
	Allowed
	ClientNotOptedIn
	ServerNotOptedIn
	PortNotListed
	PortExcluded
	ClientPaused
	ServerPaused
	reasonMax
)

// String returns the text that users read.
func (r Reason) String() string {
	switch r {
	case NoRule:
		return "one of the pods does not take part"
	case Allowed:
		return "allowed"
	case ClientNotOptedIn:
		return "client not opted in"
	case ServerNotOptedIn:
		return "server not opted in"
	case PortNotListed:
		return "server port not in " + api.AnnotationPorts
	case PortExcluded:
		return "server port in " + api.AnnotationExcludePorts
	case ClientPaused:
		return "client paused by " + api.AnnotationPausedUntil
	case ServerPaused:
		return "server paused by " + api.AnnotationPausedUntil
	}
	return fmt.Sprintf("reason %d of another version of podshunt", uint32(r))
}

// Pod is a pod of this node. A pod whose annotations are not accepted has zero
// Settings, which is a pod that was not opted in.
type Pod struct {
	// ID is the cookie of the pod's network namespace.
	ID              uint64
	Namespace, Name string
	Labels          map[string]string
	Addresses       []netip.Addr
	// Ports are the container ports that have a name, those of TCP.
	Ports    []NamedPort
	Settings api.Settings
	// Bandwidth is the name of the annotation that limits the pod's bandwidth, if
	// there is one.
	Bandwidth string
}

// NamedPort is a container port with a name.
type NamedPort struct {
	Name   string
	Number uint16
}

// Cluster is what NetworkPolicies are evaluated with. Its objects do not change
// once they are handed over: the same pointer is the same policy.
type Cluster struct {
	// Namespaces are the labels of namespaces by name.
	Namespaces map[string]map[string]string
	Policies   []*networkingv1.NetworkPolicy
}

// Decision is a verdict, its reason, and what refuses, in words for users.
type Decision struct {
	Verdict Verdict
	Reason  Reason
	// Object is empty where the reason says it all.
	Object string
}

// String returns the text that users read.
func (d Decision) String() string {
	if d.Object == "" {
		return d.Reason.String()
	}
	return d.Reason.String() + ": " + d.Object
}

// Rule holds for connections from the pod Client to the server ports of the pod
// Server; both are Pod.ID. The Object of its Decision is empty; Explain has it.
type Rule struct {
	Client, Server uint64
	Ports          api.PortRange
	Decision       Decision
}

// PairRules are all rules of an ordered pair of pods; none if it is refused.
type PairRules struct {
	Client, Server uint64
	Rules          []Rule
}

// Compiler turns pods into rules, again after every change. Its zero value is
// ready; it is not safe for concurrent use.
type Compiler struct {
	last map[[2]uint64][]Rule
}

// Update returns the pairs whose rules differ from those after the last Update,
// and when rules will change by time alone, zero for never. There are rules for
// every ordered pair of opted-in pods, a pod with itself included: that is
// loopback inside the pod.
func (c *Compiler) Update(pods []Pod, cluster Cluster, now time.Time) (changed []PairRules, until time.Time) {
	rules, until := compile(pods, now)
	next := map[[2]uint64][]Rule{}
	for _, r := range rules {
		key := [2]uint64{r.Client, r.Server}
		next[key] = append(next[key], r)
	}
	for key, rules := range next {
		if !slices.Equal(rules, c.last[key]) {
			changed = append(changed, PairRules{key[0], key[1], rules})
		}
	}
	for key := range c.last {
		if next[key] == nil {
			changed = append(changed, PairRules{Client: key[0], Server: key[1]})
		}
	}
	c.last = next
	return changed, until
}

func compile(pods []Pod, now time.Time) (rules []Rule, until time.Time) {
	for _, server := range pods {
		if !server.Settings.Enabled {
			continue
		}
		if end := server.Settings.PausedUntil; end.After(now) && (until.IsZero() || end.Before(until)) {
			until = end
		}
		byPort := compilePorts(server.Settings)
		for _, client := range pods {
			if !client.Settings.Enabled {
				continue
			}
			parts := byPort
			if d, ok := decidePair(client, server, now); ok {
				parts = []portsDecision{{allPorts(), d}}
			}
			for _, part := range parts {
				rules = append(rules, Rule{client.ID, server.ID, part.ports, part.decision})
			}
		}
	}
	return rules, until
}

// Explain decides one connection. It agrees with the rules of a Compiler.
func Explain(client, server Pod, port uint16, cluster Cluster, now time.Time) Decision {
	if d, ok := decidePair(client, server, now); ok {
		return d
	}
	return decidePort(server.Settings, port)
}

// decidePair is what holds for all ports of a pair, if anything does.
func decidePair(client, server Pod, now time.Time) (Decision, bool) {
	switch {
	case !client.Settings.Enabled:
		return Decision{Verdict: Refuse, Reason: ClientNotOptedIn}, true
	case !server.Settings.Enabled:
		return Decision{Verdict: Refuse, Reason: ServerNotOptedIn}, true
	case client.Settings.PausedUntil.After(now):
		return Decision{Verdict: Hold, Reason: ClientPaused}, true
	case server.Settings.PausedUntil.After(now):
		return Decision{Verdict: Hold, Reason: ServerPaused}, true
	}
	return Decision{}, false
}

func decidePort(server api.Settings, port uint16) Decision {
	in := func(ranges []api.PortRange) bool {
		return slices.ContainsFunc(ranges, func(r api.PortRange) bool { return r.First <= port && port <= r.Last })
	}
	switch {
	case len(server.Ports) > 0 && !in(server.Ports):
		return Decision{Verdict: Refuse, Reason: PortNotListed}
	case in(server.ExcludePorts):
		return Decision{Verdict: Refuse, Reason: PortExcluded}
	}
	return Decision{Verdict: Allow, Reason: Allowed}
}

type portsDecision struct {
	ports    api.PortRange
	decision Decision
}

func allPorts() api.PortRange { return api.PortRange{First: 0, Last: 65535} }

// compilePorts returns the base over all ports and what differs from it. The
// base is the decision that saves the most rules.
func compilePorts(server api.Settings) []portsDecision {
	// The decision can only change at an edge of a range.
	starts := []int{1}
	for _, r := range slices.Concat(server.Ports, server.ExcludePorts) {
		starts = append(starts, int(r.First), int(r.Last)+1)
	}
	slices.Sort(starts)
	starts = slices.Compact(starts)

	var parts []portsDecision
	count := map[Decision]int{}
	for _, start := range starts {
		if start > 65535 {
			break
		}
		d := decidePort(server, uint16(start))
		if len(parts) > 0 {
			last := &parts[len(parts)-1]
			last.ports.Last = uint16(start - 1)
			if last.decision == d {
				continue
			}
		}
		parts = append(parts, portsDecision{api.PortRange{First: uint16(start)}, d})
		count[d]++
	}
	parts[len(parts)-1].ports.Last = 65535

	base := parts[0].decision
	for _, part := range parts {
		if count[part.decision] > count[base] {
			base = part.decision
		}
	}
	parts = slices.DeleteFunc(parts, func(p portsDecision) bool { return p.decision == base })
	return slices.Insert(parts, 0, portsDecision{allPorts(), base})
}

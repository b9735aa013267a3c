// SPDX-License-Identifier: Apache-2.0

// Compiler: the rules between all pods, and which of them a change touches.

package policy

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// Compiler turns pods into rules. After a change it compiles only the pairs of pods
// that the change concerns. Its zero value is ready; it is not safe for concurrent
// use.
type Compiler struct {
	policies map[*networkingv1.NetworkPolicy]*networkPolicy
	pods     map[uint64]*pod       // opted-in pods
	pairs    map[pair]allowedPorts // of the last Update, without pairs that are refused
	share    int                   // Cluster.Share
}

type pair struct{ client, server uint64 }

// allowedPorts has the ports of a pair that are not refused, and the reason of their
// verdict. Without ports the pair is refused. blocking is set if both pods accept blocking
// sockets.
type allowedPorts struct {
	ports    portSet
	reason   Reason
	blocking bool
}

// Update returns the pairs whose rules differ from those of the last Update, and
// when rules will next change by time alone, zero for never. A pod forms a pair with
// itself, too: that is loopback inside the pod. The IDs of pods must be unique.
// Update keeps its arguments, which must not be changed afterwards.
func (c *Compiler) Update(pods []Pod, cluster Cluster, now time.Time) (changed []rule.PairRules, until time.Time) {
	if c.pairs == nil {
		c.pairs = map[pair]allowedPorts{}
	}
	added, removed := c.parse(cluster.Policies)
	sameShare := c.share == cluster.Share
	c.share = cluster.Share
	before := c.pods
	c.pods = map[uint64]*pod{}
	var order []*pod
	for _, asked := range pods {
		if !asked.Settings.Enabled {
			continue
		}
		if end := asked.Settings.PausedUntil; end.After(now) && (until.IsZero() || end.Before(until)) {
			until = end
		}
		p := before[asked.ID]
		if p != nil && p.unchanged(asked, cluster, now) {
			p.changed = !sameShare
			for _, n := range removed {
				p.remove(n)
			}
			for _, n := range added {
				p.apply(n)
			}
		} else {
			p = newPod(asked, cluster, now)
			for _, n := range c.policies {
				p.apply(n)
			}
		}
		c.pods[p.ID] = p
		order = append(order, p)
	}
	for _, server := range order {
		for _, client := range order {
			if !client.changed && !server.changed {
				continue
			}
			key := pair{client.ID, server.ID}
			if next := newAllowedPorts(client, server, c.share); c.put(key, next) {
				changed = append(changed, rule.PairRules{Client: key.client, Server: key.server, Rules: next.rules(key)})
			}
		}
	}
	return append(changed, c.forget(before)...), until
}

// parse parses new policies, and returns those that have come and those that have
// gone.
func (c *Compiler) parse(objects []*networkingv1.NetworkPolicy) (added, removed []*networkPolicy) {
	before := c.policies
	c.policies = make(map[*networkingv1.NetworkPolicy]*networkPolicy, len(objects))
	for _, object := range objects {
		n := before[object]
		if n == nil {
			n = parsePolicy(object)
			added = append(added, n)
		}
		c.policies[object] = n
	}
	for object, n := range before {
		if c.policies[object] == nil {
			removed = append(removed, n)
		}
	}
	return added, removed
}

// Rules returns all rules as of the last Update.
func (c *Compiler) Rules() []rule.Rule {
	var rules []rule.Rule
	for key, a := range c.pairs {
		rules = append(rules, a.rules(key)...)
	}
	return rules
}

// put stores the allowed ports of a pair, and returns true if they have changed.
func (c *Compiler) put(key pair, next allowedPorts) bool {
	last := c.pairs[key]
	if last.reason == next.reason && last.blocking == next.blocking && slices.Equal(last.ports, next.ports) {
		return false
	}
	if len(next.ports) == 0 {
		delete(c.pairs, key)
	} else {
		c.pairs[key] = next
	}
	return true
}

// forget drops and returns the pairs of pods that are no longer in c.pods.
func (c *Compiler) forget(before map[uint64]*pod) (changed []rule.PairRules) {
	gone := func(id uint64) bool { return c.pods[id] == nil }
	if !slices.ContainsFunc(slices.Collect(maps.Keys(before)), gone) {
		return nil
	}
	for key := range c.pairs {
		if gone(key.client) || gone(key.server) {
			delete(c.pairs, key)
			changed = append(changed, rule.PairRules{Client: key.client, Server: key.server})
		}
	}
	slices.SortFunc(changed, func(a, b rule.PairRules) int {
		return cmp.Or(cmp.Compare(a.Client, b.Client), cmp.Compare(a.Server, b.Server))
	})
	return changed
}

func newAllowedPorts(client, server *pod, share int) allowedPorts {
	ports := server.all
	for _, left := range restrictions(client, server) {
		if ports = ports.intersect(left); len(ports) == 0 {
			return allowedPorts{}
		}
	}
	a := allowedPorts{ports, defaultReason(client, server), AcceptBlocking(client.Pod, server.Pod)}
	if share > 0 && a.entries() > share {
		return allowedPorts{}
	}
	return a
}

// entries returns how many entries of the policy map the rules take.
func (a allowedPorts) entries() int {
	return min(a.ports.entries(), 1+a.ports.complement().entries())
}

// rules returns either a rule for each range of allowed ports, or a base over all
// ports and a refusal for each other range, whichever takes fewer entries. A rule
// that refuses has no reason: Explain finds it.
func (a allowedPorts) rules(key pair) []rule.Rule {
	var rules []rule.Rule
	add := func(ports api.PortRange, v rule.Verdict, reason Reason) {
		rules = append(rules, rule.Rule{
			Client: key.client, Server: key.server, First: ports.First, Last: ports.Last, Verdict: v, Reason: uint32(reason),
			Blocking: a.blocking && v != rule.Refuse,
		})
	}
	listed, v, reason := a.ports, a.reason.verdict(), a.reason
	if refused := a.ports.complement(); 1+refused.entries() < listed.entries() {
		add(api.PortRange{First: 0, Last: 65535}, v, reason)
		listed, v, reason = refused, rule.Refuse, NoRule
	}
	for _, ports := range listed {
		add(ports, v, reason)
	}
	return rules
}

// pod is a Pod with what the policies that apply to it say.
type pod struct {
	Pod
	all, listed, notExcluded portSet // of its own ports
	paused                   bool
	namespaceLabels          map[string]string
	namespaceKnown           bool
	named                    map[string][]uint16 // its ports by name
	changed                  bool                // since the last Update

	isolatedBy [directions][]*networkPolicy
	// allowed has, by policy, the ports that it allows between the pods which it
	// isolates and this one.
	allowed [directions]map[*networkPolicy]rulePorts
}

func newPod(asked Pod, cluster Cluster, now time.Time) *pod {
	p := &pod{
		Pod: asked, all: allPorts(), listed: allPorts(),
		notExcluded: newPortSet(slices.Clone(asked.Settings.ExcludePorts)).complement(),
		paused:      asked.Settings.PausedUntil.After(now),
		changed:     true,
	}
	if len(asked.Settings.Ports) > 0 {
		p.listed = newPortSet(slices.Clone(asked.Settings.Ports))
	}
	p.named = map[string][]uint16{}
	for _, port := range asked.Ports {
		p.named[port.Name] = append(p.named[port.Name], port.Number)
	}
	p.namespaceLabels, p.namespaceKnown = cluster.Namespaces[asked.Namespace]
	for d := range directions {
		p.allowed[d] = map[*networkPolicy]rulePorts{}
	}
	return p
}

// unchanged reports whether newPod(asked, cluster, now) would equal p.
func (p *pod) unchanged(asked Pod, cluster Cluster, now time.Time) bool {
	namespaceLabels, known := cluster.Namespaces[asked.Namespace]
	return p.paused == asked.Settings.PausedUntil.After(now) && p.namespaceKnown == known &&
		maps.Equal(p.namespaceLabels, namespaceLabels) && reflect.DeepEqual(p.Pod, asked)
}

// apply adds a policy to the pod, both as one that the policy isolates and as a peer
// that it allows.
func (p *pod) apply(n *networkPolicy) {
	selected := n.selects(p)
	p.changed = p.changed || selected
	for d := range directions {
		if !n.isolates[d] {
			continue
		}
		if selected {
			p.isolatedBy[d] = append(p.isolatedBy[d], n)
		}
		if ports := n.allows(d, p); len(ports.ranges) > 0 || len(ports.names) > 0 {
			p.allowed[d][n] = ports
		}
	}
}

// remove undoes apply.
func (p *pod) remove(n *networkPolicy) {
	p.changed = p.changed || n.selects(p)
	for d := range directions {
		p.isolatedBy[d] = slices.DeleteFunc(p.isolatedBy[d], func(other *networkPolicy) bool { return other == n })
		delete(p.allowed[d], n)
	}
}

// maxPairRanges limits how many ranges and names of ports all policies together may
// have for a pair of pods, since they are sorted for each pair.
const maxPairRanges = 4 * maxPolicyRanges

// allowedWith returns the ports of server that the policies which isolate the pod
// allow with another; server is one of the two. It returns false if there are too
// many to look at.
func (p *pod) allowedWith(d direction, other, server *pod) (portSet, bool) {
	ports := make([]api.PortRange, 0, 8)
	for _, n := range p.isolatedBy[d] {
		if allowed, ok := other.allowed[d][n]; ok {
			ports = allowed.appendTo(ports, server)
		}
		if len(ports) > maxPairRanges {
			return nil, false
		}
	}
	return newPortSet(ports), true
}

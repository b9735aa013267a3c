// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

var seedFlag = flag.Uint64("seed", 0, "of TestRandom; 0 for another one each time")

// TestRandom changes random clusters step by step and compares the rules of a
// Compiler, and Explain, with an evaluator that shares no code with them and
// asks for one connection at a time.
func TestRandom(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	const clusters, steps = 2000, 6
	seen := map[Reason]int{}
	for i := range uint64(clusters) {
		r := generator{rand.New(rand.NewPCG(seed, i))}
		now := time.Unix(1_000_000, 0)
		var c Compiler
		pods, cluster := []Pod{}, Cluster{Namespaces: map[string]map[string]string{}}
		rules := map[pair][]rule.Rule{}
		for step := range steps {
			if step == 0 {
				for id := range uint64(4) {
					pods = append(pods, r.pod(id+1, now))
				}
				for _, namespace := range namespaceNames {
					cluster.Namespaces[namespace] = r.labels()
				}
				for range r.IntN(6) {
					cluster.Policies = append(cluster.Policies, r.policy())
				}
			} else {
				pods, cluster = r.change(pods, cluster, now)
				now = now.Add(time.Duration(r.IntN(2)) * time.Second)
			}
			changed, until := c.Update(pods, cluster, now)
			for _, p := range changed {
				key := pair{p.Client, p.Server}
				if slices.Equal(rules[key], p.Rules) {
					t.Fatalf("cluster %d step %d: pair %v is returned, but its rules %v are the old ones", i, step, key, p.Rules)
				}
				if rules[key] = p.Rules; len(p.Rules) == 0 {
					delete(rules, key)
				}
				checkForm(t, p)
			}
			wantPairs := 0
			for _, client := range pods {
				for _, server := range pods {
					key := pair{client.ID, server.ID}
					any, asked := false, pick(r, testPorts...)
					for _, r := range rules[key] {
						if want := client.Settings.AcceptBlocking && server.Settings.AcceptBlocking && r.Verdict != rule.Refuse; r.Blocking != want {
							t.Fatalf("cluster %d step %d: %+v to %+v: rule %+v, want blocking %t", i, step, client, server, r, want)
						}
					}
					for _, port := range testPorts {
						want := naive(client, server, port, cluster, now)
						any = any || want.verdict() != rule.Refuse
						seen[want]++
						wantRule := Decision{Verdict: want.verdict()}
						if wantRule.Verdict != rule.Refuse {
							wantRule.Reason = want
						}
						if got := lookUp(rules[key], port); got != wantRule {
							t.Fatalf("cluster %d step %d: %+v to %+v port %d: rules say %+v, want %+v\n%s",
								i, step, client, server, port, got, wantRule, dump(cluster))
						}
						if port != asked {
							continue
						}
						if got := Explain(client, server, port, cluster, now); got.Reason != want || got.Verdict != want.verdict() {
							t.Fatalf("cluster %d step %d: %+v to %+v port %d: Explain says %v, want %v\n%s",
								i, step, client, server, port, got, want, dump(cluster))
						}
					}
					if any {
						wantPairs++
					}
				}
			}
			if len(rules) != wantPairs {
				t.Fatalf("cluster %d step %d: got rules for %d pairs, want %d", i, step, len(rules), wantPairs)
			}
			if want := naiveUntil(pods, now); !until.Equal(want) {
				t.Fatalf("cluster %d step %d: got rules until %v, want %v", i, step, until, want)
			}
		}
	}
	for reason := Allowed; reason < reasonMax; reason++ {
		// TestShare has that one.
		if seen[reason] == 0 && reason != TooManyRanges {
			t.Errorf("no connection was %q", reason)
		}
	}
	t.Log(seen)
}

// checkForm checks what rule.PairRules promises.
func checkForm(tb testing.TB, p rule.PairRules) {
	tb.Helper()
	last := -1
	for i, r := range p.Rules {
		if r.Client != p.Client || r.Server != p.Server {
			tb.Fatalf("rule %+v is among those of %d to %d", r, p.Client, p.Server)
		}
		if i == 0 && r.First == 0 && r.Last == 65535 {
			continue
		}
		if int(r.First) <= last || r.First > r.Last {
			tb.Fatalf("rule %+v overlaps the one before", r)
		}
		last = int(r.Last)
	}
}

func dump(cluster Cluster) string {
	var b strings.Builder
	fmt.Fprintln(&b, cluster.Namespaces)
	for _, p := range cluster.Policies {
		b.WriteString(cmp.Diff(&networkingv1.NetworkPolicy{}, p))
	}
	return b.String()
}

var (
	namespaceNames = []string{"a", "b", "c"}
	// The ports of the clusters are between these ones, so that every edge is among them or next to one.
	testPorts = []uint16{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 32768, 65533, 65534, 65535}
)

// invalidName starts the name of a policy that is not valid: so the naive
// evaluator need not find out.
const invalidName = "invalid"

// generator makes small clusters in which things meet: few labels and ports.
type generator struct{ *rand.Rand }

func pick[T any](r generator, list ...T) T { return list[r.IntN(len(list))] }

func (r generator) chance(percent int) bool { return r.IntN(100) < percent }

func (r generator) labels() map[string]string {
	if r.chance(10) {
		return nil
	}
	labels := map[string]string{}
	for _, key := range []string{"x", "y"} {
		if r.chance(60) {
			labels[key] = pick(r, "1", "2")
		}
	}
	return labels
}

func (r generator) port() uint16 {
	if r.chance(10) {
		return uint16(65534 + r.IntN(2))
	}
	return uint16(1 + r.IntN(8))
}

func (r generator) portRange() api.PortRange {
	first, last := r.port(), r.port()
	return api.PortRange{First: min(first, last), Last: max(first, last)}
}

func (r generator) pod(id uint64, now time.Time) Pod {
	p := Pod{
		ID: id, Namespace: pick(r, namespaceNames...), Name: fmt.Sprint("pod", id), Labels: r.labels(),
		Settings: api.Settings{Enabled: r.chance(90)},
	}
	for _, name := range []string{"http", "http", "dns"} {
		if r.chance(40) {
			p.Ports = append(p.Ports, NamedPort{name, r.port()})
		}
	}
	if r.chance(15) {
		p.Settings.Ports = []api.PortRange{r.portRange(), r.portRange()}
	}
	if r.chance(15) {
		p.Settings.ExcludePorts = []api.PortRange{r.portRange()}
	}
	if r.chance(15) {
		p.Settings.PausedUntil = now.Add(time.Duration(r.IntN(4)-1) * time.Second)
	}
	p.Settings.AcceptBlocking = r.chance(40)
	p.Redirects = r.chance(10)
	if r.chance(5) {
		p.Bandwidth = "kubernetes.io/egress-bandwidth"
	}
	return p
}

func (r generator) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	if r.chance(40) {
		s.MatchLabels = map[string]string{pick(r, "x", "y"): pick(r, "1", "2")}
	}
	if r.chance(40) {
		e := metav1.LabelSelectorRequirement{
			Key:      pick(r, "x", "y", "z"),
			Operator: pick(r, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist),
		}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = pick(r, []string{"1"}, []string{"2"}, []string{"1", "2"})
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func (r generator) block() *networkingv1.IPBlock {
	cidr := func() string {
		return pick(r, fmt.Sprintf("10.0.0.%d/%d", r.IntN(8), 28+r.IntN(5)), fmt.Sprintf("fd00::%d/%d", r.IntN(8), 124+r.IntN(5)), "10.0.0.0/8", "::/0")
	}
	b := &networkingv1.IPBlock{CIDR: cidr()}
	for range r.IntN(3) {
		b.Except = append(b.Except, cidr())
	}
	return b
}

func (r generator) peers() (peers []networkingv1.NetworkPolicyPeer) {
	for range r.IntN(3) {
		var p networkingv1.NetworkPolicyPeer
		switch r.IntN(4) {
		case 0:
			p.PodSelector = r.selector()
		case 1:
			p.NamespaceSelector = r.selector()
		case 2:
			p.PodSelector, p.NamespaceSelector = r.selector(), r.selector()
		case 3:
			p.IPBlock = r.block()
		}
		peers = append(peers, p)
	}
	return peers
}

func (r generator) policyPorts() (list []networkingv1.NetworkPolicyPort) {
	for range r.IntN(4) {
		var p networkingv1.NetworkPolicyPort
		if r.chance(40) {
			p.Protocol = new(pick(r, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP))
		}
		switch r.IntN(8) {
		case 0:
		case 1, 2:
			p.Port = new(intstr.FromString(pick(r, "http", "dns", "none")))
		case 3, 4:
			ports := r.portRange()
			p.Port, p.EndPort = new(intstr.FromInt32(int32(ports.First))), new(int32(ports.Last))
		default:
			p.Port = new(intstr.FromInt32(int32(r.port())))
		}
		list = append(list, p)
	}
	return list
}

func (r generator) policy() *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{}
	p.Namespace, p.Name = pick(r, namespaceNames...), fmt.Sprint("policy", r.IntN(1000))
	p.Spec.PodSelector = *r.selector()
	p.Spec.PolicyTypes = pick(r, nil, nil,
		[]networkingv1.PolicyType{networkingv1.PolicyTypeIngress}, []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		[]networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress})
	for range r.IntN(3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: r.peers(), Ports: r.policyPorts()})
	}
	for range r.IntN(3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: r.peers(), Ports: r.policyPorts()})
	}
	if len(p.Spec.Ingress) > 0 && r.chance(5) {
		p.Name = invalidName + p.Name
		at := &p.Spec.Ingress[r.IntN(len(p.Spec.Ingress))]
		switch r.IntN(3) {
		case 0:
			at.From = append(at.From, networkingv1.NetworkPolicyPeer{})
		case 1:
			at.From = append(at.From, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/33"}})
		case 2:
			at.Ports = append(at.Ports, networkingv1.NetworkPolicyPort{EndPort: new(int32(7))})
		}
	}
	return p
}

// change returns what a cluster is after an event or a few.
func (r generator) change(pods []Pod, cluster Cluster, now time.Time) ([]Pod, Cluster) {
	pods = slices.Clone(pods)
	next := Cluster{Namespaces: map[string]map[string]string{}, Policies: slices.Clone(cluster.Policies)}
	for name, labels := range cluster.Namespaces {
		next.Namespaces[name] = labels
	}
	for range r.IntN(3) {
		switch r.IntN(8) {
		case 0:
			pods = append(pods, r.pod(uint64(10+r.IntN(1<<30)), now))
		case 1:
			if len(pods) > 2 {
				at := r.IntN(len(pods))
				pods = slices.Delete(pods, at, at+1)
			}
		case 2:
			at := r.IntN(len(pods))
			pods[at] = r.pod(pods[at].ID, now)
		case 3:
			pods[r.IntN(len(pods))].Labels = r.labels()
		case 4:
			next.Namespaces[pick(r, namespaceNames...)] = r.labels()
		case 5:
			delete(next.Namespaces, pick(r, namespaceNames...))
		case 6:
			next.Policies = append(next.Policies, r.policy())
		case 7:
			if len(next.Policies) > 0 {
				at := r.IntN(len(next.Policies))
				next.Policies = slices.Delete(next.Policies, at, at+1)
			}
		}
	}
	r.Shuffle(len(pods), func(i, j int) { pods[i], pods[j] = pods[j], pods[i] })
	return pods, next
}

// naive decides one connection by the words of the API's documentation.
func naive(client, server Pod, port uint16, cluster Cluster, now time.Time) Reason {
	within := func(ranges []api.PortRange) bool {
		for _, r := range ranges {
			if port >= r.First && port <= r.Last {
				return true
			}
		}
		return false
	}
	if !client.Settings.Enabled {
		return ClientNotOptedIn
	}
	if !server.Settings.Enabled {
		return ServerNotOptedIn
	}
	if server.Redirects && (len(server.Settings.Ports) > 0 && !naiveAll(server.Settings.Ports) || len(server.Settings.ExcludePorts) > 0 && !naiveAll(server.Settings.ExcludePorts)) {
		return PortRedirected
	}
	if len(server.Settings.Ports) > 0 && !within(server.Settings.Ports) {
		return PortNotListed
	}
	if within(server.Settings.ExcludePorts) {
		return PortExcluded
	}
	if client.Bandwidth != "" {
		return ClientBandwidth
	}
	if server.Bandwidth != "" {
		return ServerBandwidth
	}
	if client.ID != server.ID {
		if server.Redirects && naiveMixed(func(port uint16) bool { return naiveIngress(client, server, port, cluster) }) {
			return PortRedirected
		}
		if !naiveIngress(client, server, port, cluster) {
			return IngressPolicy
		}
		if server.Redirects && naiveMixed(func(port uint16) bool { return naiveEgress(client, server, port, cluster) }) {
			return PortRedirected
		}
		if !naiveEgress(client, server, port, cluster) {
			return EgressPolicy
		}
	}
	if now.Before(client.Settings.PausedUntil) {
		return ClientPaused
	}
	if now.Before(server.Settings.PausedUntil) {
		return ServerPaused
	}
	return Allowed
}

// naiveAll reports whether every port is in the ranges.
func naiveAll(ranges []api.PortRange) bool {
	in := func(port uint16) bool {
		return slices.ContainsFunc(ranges, func(r api.PortRange) bool { return r.First <= port && port <= r.Last })
	}
	return !naiveMixed(in) && in(1)
}

// naiveMixed reports whether something holds for some ports and not for others.
func naiveMixed(holds func(uint16) bool) bool {
	first := holds(testPorts[0])
	return slices.ContainsFunc(testPorts, func(port uint16) bool { return holds(port) != first })
}

func naiveUntil(pods []Pod, now time.Time) (until time.Time) {
	for _, p := range pods {
		end := p.Settings.PausedUntil
		if p.Settings.Enabled && now.Before(end) && (until.IsZero() || end.Before(until)) {
			until = end
		}
	}
	return until
}

func naiveIngress(client, server Pod, port uint16, cluster Cluster) bool {
	isolated, allowed := false, false
	for _, p := range cluster.Policies {
		applies := len(p.Spec.PolicyTypes) == 0
		for _, t := range p.Spec.PolicyTypes {
			applies = applies || t == "Ingress"
		}
		if !applies || p.Namespace != server.Namespace || !naiveSelects(p.Spec.PodSelector, server.Labels) {
			continue
		}
		isolated = true
		for _, r := range p.Spec.Ingress {
			if !strings.HasPrefix(p.Name, invalidName) &&
				naivePeers(r.From, p.Namespace, client, cluster) && naivePorts(r.Ports, port, server) {
				allowed = true
			}
		}
	}
	return !isolated || allowed
}

func naiveEgress(client, server Pod, port uint16, cluster Cluster) bool {
	isolated, allowed := false, false
	for _, p := range cluster.Policies {
		applies := len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0
		for _, t := range p.Spec.PolicyTypes {
			applies = applies || t == "Egress"
		}
		if !applies || p.Namespace != client.Namespace || !naiveSelects(p.Spec.PodSelector, client.Labels) {
			continue
		}
		isolated = true
		for _, r := range p.Spec.Egress {
			if !strings.HasPrefix(p.Name, invalidName) &&
				naivePeers(r.To, p.Namespace, server, cluster) && naivePorts(r.Ports, port, server) {
				allowed = true
			}
		}
	}
	return !isolated || allowed
}

func naiveSelects(s metav1.LabelSelector, labels map[string]string) bool {
	for key, value := range s.MatchLabels {
		if have, ok := labels[key]; !ok || have != value {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, ok := labels[e.Key]
		listed := false
		for _, v := range e.Values {
			listed = listed || ok && have == v
		}
		switch e.Operator {
		case "In":
			ok = listed
		case "NotIn":
			ok = !listed
		case "DoesNotExist":
			ok = !ok
		}
		if !ok {
			return false
		}
	}
	return true
}

func naivePeers(peers []networkingv1.NetworkPolicyPeer, own string, other Pod, cluster Cluster) bool {
	for _, p := range peers {
		if p.IPBlock != nil {
			continue
		}
		if p.NamespaceSelector == nil && other.Namespace != own {
			continue
		}
		if p.NamespaceSelector != nil {
			labels, known := cluster.Namespaces[other.Namespace]
			if !known || !naiveSelects(*p.NamespaceSelector, labels) {
				continue
			}
		}
		if p.PodSelector == nil || naiveSelects(*p.PodSelector, other.Labels) {
			return true
		}
	}
	return len(peers) == 0
}

func naivePorts(list []networkingv1.NetworkPolicyPort, port uint16, server Pod) bool {
	for _, p := range list {
		if p.Protocol != nil && *p.Protocol != "TCP" {
			continue
		}
		if p.Port == nil {
			return true
		}
		if p.Port.Type == intstr.String {
			for _, named := range server.Ports {
				if named.Name == p.Port.StrVal && named.Number == port {
					return true
				}
			}
			continue
		}
		first, last := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		if int32(port) >= first && int32(port) <= last {
			return true
		}
	}
	return len(list) == 0
}

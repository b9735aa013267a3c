// SPDX-License-Identifier: Apache-2.0

// NetworkPolicy: for which ports one holds between two pods.

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podshunt/podshunt/api"
)

type direction int

const (
	ingress direction = iota // into the server
	egress                   // out of the client
	directions
)

// networkPolicy is a NetworkPolicy with its selectors and prefixes parsed.
type networkPolicy struct {
	namespace, name string
	// invalid names the field that is not valid, if any. The API server rejects such
	// an object, but an older server may have accepted it. An object with too many
	// ports counts as invalid, too. An invalid policy isolates whatever it may be
	// meant for, and allows nothing.
	invalid  string
	pods     labels.Selector
	isolates [directions]bool
	rules    [directions][]peerRule
}

// maxPolicyRanges limits the ranges and names of ports of a policy in one direction.
const maxPolicyRanges = 1024

// peerRule allows its ports with its peers; without peers, with all pods.
type peerRule struct {
	peers []peer
	ports rulePorts
}

// rulePorts has ports by number, and by the names that container ports of the server
// have.
type rulePorts struct {
	ranges []api.PortRange
	names  []string
}

// peer selects pods. Nil namespaces means the policy's own namespace, nil pods all
// pods. none is set for an ipBlock, which selects no pods here: some networks let it
// select pods, and others never do.
type peer struct {
	addresses        bool
	namespaces, pods labels.Selector
}

func parsePolicy(object *networkingv1.NetworkPolicy) *networkPolicy {
	n := &networkPolicy{namespace: object.Namespace, name: object.Name, pods: labels.Everything()}
	fail := func(format string, args ...any) *networkPolicy {
		n.invalid = "its " + fmt.Sprintf(format, args...)
		n.rules = [directions][]peerRule{}
		return n
	}
	spec := &object.Spec
	pods, err := metav1.LabelSelectorAsSelector(&spec.PodSelector)
	if err == nil {
		n.pods = pods
	}
	if len(spec.PolicyTypes) == 0 {
		n.isolates[ingress] = true
		n.isolates[egress] = len(spec.Egress) > 0
	}
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			n.isolates[ingress] = true
		case networkingv1.PolicyTypeEgress:
			n.isolates[egress] = true
		default:
			n.isolates = [directions]bool{true, true}
			return fail("spec.policyTypes[%d] is not valid", i)
		}
	}
	if err != nil {
		return fail("spec.podSelector is not valid")
	}
	for i, r := range spec.Ingress {
		parsed, invalid := parseRule(r.From, "from", r.Ports)
		if invalid != "" {
			return fail("spec.ingress[%d].%s is not valid", i, invalid)
		}
		n.rules[ingress] = append(n.rules[ingress], parsed)
	}
	for i, r := range spec.Egress {
		parsed, invalid := parseRule(r.To, "to", r.Ports)
		if invalid != "" {
			return fail("spec.egress[%d].%s is not valid", i, invalid)
		}
		n.rules[egress] = append(n.rules[egress], parsed)
	}
	for d, field := range []string{"ingress", "egress"} {
		ranges := 0
		for _, r := range n.rules[d] {
			ranges += len(r.ports.ranges) + len(r.ports.names)
		}
		if ranges > maxPolicyRanges {
			return fail("spec.%s has %d ports and ranges, at most %d are looked at: join neighbours by endPort", field, ranges, maxPolicyRanges)
		}
	}
	return n
}

// parseRule returns a rule, or the name of the field that is not valid.
func parseRule(peers []networkingv1.NetworkPolicyPeer, field string, ports []networkingv1.NetworkPolicyPort) (r peerRule, invalid string) {
	for i := range peers {
		p, ok := parsePeer(&peers[i])
		if !ok {
			return peerRule{}, fmt.Sprintf("%s[%d]", field, i)
		}
		r.peers = append(r.peers, p)
	}
	if len(ports) == 0 {
		r.ports.ranges = allPorts()
	}
	for i := range ports {
		parsed, ok := parsePorts(&ports[i])
		if !ok {
			return peerRule{}, fmt.Sprintf("ports[%d]", i)
		}
		r.ports = r.ports.add(parsed)
	}
	r.ports.ranges = newPortSet(r.ports.ranges)
	slices.Sort(r.ports.names)
	r.ports.names = slices.Compact(r.ports.names)
	return r, ""
}

func parsePeer(object *networkingv1.NetworkPolicyPeer) (p peer, ok bool) {
	if block := object.IPBlock; block != nil {
		valid := !slices.ContainsFunc(slices.Concat(block.Except, []string{block.CIDR}), func(cidr string) bool { return !isPrefix(cidr) })
		return peer{addresses: true}, valid && object.PodSelector == nil && object.NamespaceSelector == nil
	}
	var err error
	if object.NamespaceSelector != nil {
		if p.namespaces, err = metav1.LabelSelectorAsSelector(object.NamespaceSelector); err != nil {
			return peer{}, false
		}
	}
	if object.PodSelector != nil {
		if p.pods, err = metav1.LabelSelectorAsSelector(object.PodSelector); err != nil {
			return peer{}, false
		}
	}
	return p, object.NamespaceSelector != nil || object.PodSelector != nil
}

// isPrefix rejects an IPv4 prefix in IPv6 form, since implementations differ on what it
// means.
func isPrefix(cidr string) bool {
	p, err := netip.ParsePrefix(cidr)
	return err == nil && !p.Addr().Is4In6()
}

// parsePorts returns no ports if the protocol is not TCP.
func parsePorts(object *networkingv1.NetworkPolicyPort) (ports rulePorts, ok bool) {
	port, end := object.Port, object.EndPort
	switch {
	case port == nil:
		ports.ranges, ok = allPorts(), end == nil
	case port.Type == intstr.String:
		ports.names, ok = []string{port.StrVal}, end == nil
	default:
		first, last := port.IntVal, port.IntVal
		if end != nil {
			last = *end
		}
		if ok = 1 <= first && first <= last && last <= 65535; ok {
			ports.ranges = []api.PortRange{{First: uint16(first), Last: uint16(last)}}
		}
	}
	if object.Protocol == nil {
		return ports, ok
	}
	switch *object.Protocol {
	case corev1.ProtocolTCP:
		return ports, ok
	case corev1.ProtocolUDP, corev1.ProtocolSCTP:
		return rulePorts{}, ok
	}
	return rulePorts{}, false
}

// add appends to the slices of p.
func (p rulePorts) add(other rulePorts) rulePorts {
	return rulePorts{append(p.ranges, other.ranges...), append(p.names, other.names...)}
}

// appendTo appends the ports to ranges. It looks names up in the server, where
// several ports may have one name.
func (p rulePorts) appendTo(ranges []api.PortRange, server *pod) []api.PortRange {
	ranges = append(ranges, p.ranges...)
	for _, name := range p.names {
		for _, number := range server.named[name] {
			ranges = append(ranges, api.PortRange{First: number, Last: number})
		}
	}
	return ranges
}

// selects reports whether the policy isolates a pod in any direction.
func (n *networkPolicy) selects(p *pod) bool {
	return n.namespace == p.Namespace && n.pods.Matches(labels.Set(p.Labels))
}

// allows returns the ports that the policy allows between a pod that it isolates
// and another.
func (n *networkPolicy) allows(d direction, other *pod) (ports rulePorts) {
	for _, r := range n.rules[d] {
		if len(r.peers) == 0 || slices.ContainsFunc(r.peers, func(p peer) bool { return p.matches(n.namespace, other) }) {
			ports = ports.add(r.ports)
		}
	}
	return ports
}

func (p peer) matches(own string, other *pod) bool {
	switch {
	case p.addresses:
		return false
	case p.namespaces == nil && other.Namespace != own:
		return false
	case p.namespaces != nil && (!other.namespaceKnown || !p.namespaces.Matches(labels.Set(other.namespaceLabels))):
		return false
	}
	return p.pods == nil || p.pods.Matches(labels.Set(other.Labels))
}

// names lists policies for users, invalid ones first.
func names(policies []*networkPolicy) string {
	const most = 3
	sorted := slices.SortedFunc(slices.Values(policies), func(a, b *networkPolicy) int {
		if (a.invalid == "") != (b.invalid == "") {
			return cmp.Compare(b.invalid, a.invalid)
		}
		return cmp.Compare(a.name, b.name)
	})
	var texts []string
	for _, n := range sorted[:min(most, len(sorted))] {
		text := n.namespace + "/" + n.name
		if n.invalid != "" {
			text += " (" + n.invalid + ")"
		}
		texts = append(texts, text)
	}
	kind, more := "NetworkPolicy ", ""
	if len(sorted) > 1 {
		kind = "NetworkPolicies "
	}
	if len(sorted) > most {
		more = fmt.Sprintf(" and %d more", len(sorted)-most)
	}
	return kind + strings.Join(texts, ", ") + more
}

// SPDX-License-Identifier: Apache-2.0

// Package policy decides which connections between the pods of this node may be
// shortcut, and tells users why others may not. It is pure: pods, NetworkPolicies
// and a time in, rules out; it does no I/O.
package policy

import (
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// Reason says why a verdict is what it is. The kernel stores its number next to the
// verdict. The numbers may differ between builds: an agent that starts writes all of
// them anew.
type Reason uint32

const (
	// NoRule is the kernel's reason for every refusal; Explain finds the real
	// one.
	NoRule Reason = iota
	Allowed
	ClientNotOptedIn
	ServerNotOptedIn
	PortNotListed
	PortExcluded
	ClientBandwidth
	ServerBandwidth
	IngressPolicy
	EgressPolicy
	ClientPaused
	ServerPaused
	TooManyRanges
	PortRedirected
	reasonMax
)

// reasons gives every Reason its code and the text that users read.
func reasons() [reasonMax]struct{ code, text string } {
	return [reasonMax]struct{ code, text string }{
		NoRule:           {"no_rule", "refused when the policy was last looked up"},
		Allowed:          {"allowed", "allowed"},
		ClientNotOptedIn: {"client_not_opted_in", "client not opted in"},
		ServerNotOptedIn: {"server_not_opted_in", "server not opted in"},
		PortNotListed:    {"port_not_listed", "server port not in " + api.AnnotationPorts},
		PortExcluded:     {"port_excluded", "server port in " + api.AnnotationExcludePorts},
		ClientBandwidth:  {"client_bandwidth", "the client's bandwidth is limited, and the shortcut would bypass the limit"},
		ServerBandwidth:  {"server_bandwidth", "the server's bandwidth is limited, and the shortcut would bypass the limit"},
		IngressPolicy:    {"ingress_policy", "NetworkPolicy does not allow it into the server"},
		EgressPolicy:     {"egress_policy", "NetworkPolicy does not allow it out of the client"},
		ClientPaused:     {"client_paused", "client paused by " + api.AnnotationPausedUntil},
		ServerPaused:     {"server_paused", "server paused by " + api.AnnotationPausedUntil},
		TooManyRanges:    {"too_many_ranges", "the ports that may be shortcut are too many ranges"},
		PortRedirected:   {"port_redirected", "the server's pod redirects ports by NAT, so that rules for ports cannot be kept"},
	}
}

// String returns the text that users read.
func (r Reason) String() string {
	if r < reasonMax {
		return reasons()[r].text
	}
	return fmt.Sprintf("reason %d of another version of podshunt", uint32(r))
}

// Code returns what scripts read, which no version changes: "port_excluded", for example.
func (r Reason) Code() string {
	if r < reasonMax {
		return reasons()[r].code
	}
	return "unknown"
}

// Reasons returns all reasons.
func Reasons() []Reason {
	var all []Reason
	for r := range reasonMax {
		all = append(all, r)
	}
	return all
}

func (r Reason) verdict() rule.Verdict {
	switch r {
	case Allowed:
		return rule.Allow
	case ClientPaused, ServerPaused:
		return rule.Hold
	}
	return rule.Refuse
}

// Pod is a pod of this node. If its annotations are not accepted its Settings are
// zero, as if it were not opted in.
type Pod struct {
	// ID is the cookie of the pod's network namespace.
	ID              uint64
	Namespace, Name string
	Labels          map[string]string
	// Ports has the pod's named TCP container ports.
	Ports    []NamedPort
	Settings api.Settings
	// Bandwidth is the name of the annotation that limits the pod's bandwidth, if
	// there is one.
	Bandwidth string
	// Redirects is set if the pod's network namespace gives incoming connections
	// another port: the port of the server's socket may then differ from the one that
	// rules are about.
	Redirects bool
}

// AcceptBlocking reports whether two pods let sockets in blocking mode take part.
func AcceptBlocking(client, server Pod) bool {
	return client.Settings.AcceptBlocking && server.Settings.AcceptBlocking
}

// NamedPort is a container port with a name.
type NamedPort struct {
	Name   string
	Number uint16
}

// Cluster has the NetworkPolicies and what is needed to evaluate them. Its objects
// must not change: the same pointer means the same policy.
type Cluster struct {
	// Namespaces has the labels of namespaces by name.
	Namespaces map[string]map[string]string
	Policies   []*networkingv1.NetworkPolicy
	// Share limits the entries of the policy map that an ordered pair of pods may
	// have; 0 means no limit.
	Share int
}

// Share returns Cluster.Share for a policy map with so many entries and so many pods
// that take part. A pod is in two pairs with each other pod, so that none has more
// than half of the map. pods is rounded up to a power of two, so that one more pod
// seldom changes the share.
func Share(entries, pods int) int {
	const most = 2048 // as many as 64 ranges in an annotation may take
	n := 1
	for n < pods {
		n *= 2
	}
	return min(max(entries/4/n, 1), most)
}

// Decision is a verdict with its reason.
type Decision struct {
	Verdict rule.Verdict
	Reason  Reason
	// Object names for users what refuses, such as a NetworkPolicy; empty if the
	// reason says it all.
	Object string
}

// String returns the text that users read.
func (d Decision) String() string {
	if d.Object == "" {
		return d.Reason.String()
	}
	return d.Reason.String() + ": " + d.Object
}

// Explain decides one connection. It agrees with the rules of a Compiler.
func Explain(client, server Pod, port uint16, cluster Cluster, now time.Time) Decision {
	from, to := newPod(client, cluster, now), newPod(server, cluster, now)
	for _, object := range cluster.Policies {
		if object.Namespace == client.Namespace || object.Namespace == server.Namespace {
			n := parsePolicy(object)
			from.apply(n)
			to.apply(n)
		}
	}
	for reason, ports := range restrictions(from, to) {
		if !ports.contains(port) {
			return Decision{rule.Refuse, reason, blame(reason, from, to)}
		}
	}
	if a := newAllowedPorts(from, to, cluster.Share); len(a.ports) == 0 {
		return Decision{rule.Refuse, TooManyRanges, blame(TooManyRanges, from, to)}
	}
	reason := defaultReason(from, to)
	return Decision{reason.verdict(), reason, ""}
}

// restrictions yields reasons for refusal, each with the ports that it does not
// refuse. The first reason whose ports lack a port is why that port is refused. For
// example, with the annotation exclude-ports=22 it yields PortExcluded with 1-21 and
// 23-65535.
func restrictions(client, server *pod) iter.Seq2[Reason, portSet] {
	return func(yield func(Reason, portSet) bool) {
		// specific reports whether ports are only some ports, although the
		// server redirects ports.
		specific := func(ports portSet) bool { return server.Redirects && len(ports) > 0 && !ports.isAll() }
		isolated := func(reason Reason, d direction, by, other *pod) bool {
			if len(by.isolatedBy[d]) == 0 {
				return true
			}
			ports, ok := by.allowedWith(d, other, server)
			switch {
			case !ok:
				return yield(TooManyRanges, nil)
			case specific(ports):
				return yield(PortRedirected, nil)
			}
			return yield(reason, ports)
		}
		_ = (client.Settings.Enabled || yield(ClientNotOptedIn, nil)) &&
			(server.Settings.Enabled || yield(ServerNotOptedIn, nil)) &&
			(!specific(server.listed) && !specific(server.notExcluded) || yield(PortRedirected, nil)) &&
			yield(PortNotListed, server.listed) &&
			yield(PortExcluded, server.notExcluded) &&
			(client.Bandwidth == "" || yield(ClientBandwidth, nil)) &&
			(server.Bandwidth == "" || yield(ServerBandwidth, nil)) &&
			// NetworkPolicy does not apply between a pod and itself.
			client.ID != server.ID &&
			isolated(IngressPolicy, ingress, server, client) &&
			isolated(EgressPolicy, egress, client, server)
	}
}

// defaultReason returns the reason for ports that no restriction refuses.
func defaultReason(client, server *pod) Reason {
	switch {
	case client.paused:
		return ClientPaused
	case server.paused:
		return ServerPaused
	}
	return Allowed
}

// blame returns Decision.Object for a reason.
func blame(reason Reason, client, server *pod) string {
	switch reason {
	case ClientBandwidth:
		return fmt.Sprintf("pod %s/%s has %s", client.Namespace, client.Name, client.Bandwidth)
	case ServerBandwidth:
		return fmt.Sprintf("pod %s/%s has %s", server.Namespace, server.Name, server.Bandwidth)
	case IngressPolicy:
		return names(server.isolatedBy[ingress])
	case EgressPolicy:
		return names(client.isolatedBy[egress])
	case PortRedirected:
		return strings.Join(portSources(client, server), ", ")
	case TooManyRanges:
		return "join neighbours to ranges in " + strings.Join(portSources(client, server), ", ") + ", or raise --max-policies"
	}
	return ""
}

// portSources names the annotations and policies that list ports for a pair.
func portSources(client, server *pod) (sources []string) {
	for name, ranges := range map[string][]api.PortRange{
		api.AnnotationPorts: server.Settings.Ports, api.AnnotationExcludePorts: server.Settings.ExcludePorts,
	} {
		if len(ranges) > 0 {
			sources = append(sources, fmt.Sprintf("%s of pod %s/%s", name, server.Namespace, server.Name))
		}
	}
	slices.Sort(sources)
	for _, policies := range [][]*networkPolicy{server.isolatedBy[ingress], client.isolatedBy[egress]} {
		if client.ID != server.ID && len(policies) > 0 {
			sources = append(sources, names(policies))
		}
	}
	return sources
}

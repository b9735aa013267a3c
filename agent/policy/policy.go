// SPDX-License-Identifier: Apache-2.0

// Package policy decides which connections between the pods of this node may be
// shortcut, and says why not in words for users. It is pure: pods, NetworkPolicies
// and a time in, rules out; it does no I/O.
package policy

import (
	"fmt"
	"iter"
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
	// NoRule is what the kernel has for every refusal; Explain knows why.
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
	reasonMax
)

// String returns the text that users read.
func (r Reason) String() string {
	switch r {
	case NoRule:
		return "refused when it was last asked"
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
	case ClientBandwidth:
		return "the client's bandwidth is limited, which a shortcut would not keep to"
	case ServerBandwidth:
		return "the server's bandwidth is limited, which a shortcut would not keep to"
	case IngressPolicy:
		return "NetworkPolicy does not allow it into the server"
	case EgressPolicy:
		return "NetworkPolicy does not allow it out of the client"
	case ClientPaused:
		return "client paused by " + api.AnnotationPausedUntil
	case ServerPaused:
		return "server paused by " + api.AnnotationPausedUntil
	}
	return fmt.Sprintf("reason %d of another version of podshunt", uint32(r))
}

func (r Reason) verdict() Verdict {
	switch r {
	case Allowed:
		return Allow
	case ClientPaused, ServerPaused:
		return Hold
	}
	return Refuse
}

// Pod is a pod of this node. A pod whose annotations are not accepted has zero
// Settings, which is a pod that was not opted in.
type Pod struct {
	// ID is the cookie of the pod's network namespace.
	ID              uint64
	Namespace, Name string
	Labels          map[string]string
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
// Server; both are Pod.ID. A rule that refuses has no reason; Explain knows it.
type Rule struct {
	Client, Server uint64
	Ports          api.PortRange
	Decision       Decision
}

// PairRules are all rules of an ordered pair of pods. Ports without a rule are
// refused. A rule over all ports, 0 to 65535, is the first if there is one;
// narrower ones override it and do not overlap each other.
type PairRules struct {
	Client, Server uint64
	Rules          []Rule
}

// Explain decides one connection. It agrees with the rules of a Compiler.
func Explain(client, server Pod, port uint16, cluster Cluster, now time.Time) Decision {
	from, to := newPod(client, cluster, now), newPod(server, cluster, now)
	for _, object := range cluster.Policies {
		if object.Namespace == client.Namespace || object.Namespace == server.Namespace {
			n := parsePolicy(object)
			from.take(n)
			to.take(n)
		}
	}
	for reason, ports := range restrictions(from, to) {
		if !ports.contains(port) {
			return Decision{Refuse, reason, culprit(reason, from, to)}
		}
	}
	reason := unrestricted(from, to)
	return Decision{reason.verdict(), reason, ""}
}

// restrictions yields why ports are refused, each with the ports that are not.
// A port is refused for the first reason that does not leave it.
func restrictions(client, server *pod) iter.Seq2[Reason, portSet] {
	return func(yield func(Reason, portSet) bool) {
		_ = (client.Settings.Enabled || yield(ClientNotOptedIn, nil)) &&
			(server.Settings.Enabled || yield(ServerNotOptedIn, nil)) &&
			yield(PortNotListed, server.listed) &&
			yield(PortExcluded, server.notExcluded) &&
			(client.Bandwidth == "" || yield(ClientBandwidth, nil)) &&
			(server.Bandwidth == "" || yield(ServerBandwidth, nil)) &&
			// NetworkPolicy never stands between a pod and itself.
			client.ID != server.ID &&
			(len(server.isolatedBy[ingress]) == 0 || yield(IngressPolicy, server.allowedWith(ingress, client, server))) &&
			(len(client.isolatedBy[egress]) == 0 || yield(EgressPolicy, client.allowedWith(egress, server, server)))
	}
}

// unrestricted is what holds for the ports that restrictions leave.
func unrestricted(client, server *pod) Reason {
	switch {
	case client.paused:
		return ClientPaused
	case server.paused:
		return ServerPaused
	}
	return Allowed
}

// culprit names for users what refuses.
func culprit(reason Reason, client, server *pod) string {
	switch reason {
	case ClientBandwidth:
		return fmt.Sprintf("pod %s/%s has %s", client.Namespace, client.Name, client.Bandwidth)
	case ServerBandwidth:
		return fmt.Sprintf("pod %s/%s has %s", server.Namespace, server.Name, server.Bandwidth)
	case IngressPolicy:
		return names(server.isolatedBy[ingress])
	case EgressPolicy:
		return names(client.isolatedBy[egress])
	}
	return ""
}

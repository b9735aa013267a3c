// SPDX-License-Identifier: Apache-2.0

// Package explain says of each connection of the pods of this node who its ends are, and
// why it is on TCP. It is pure but for Sockets, which asks the kernel.
//
// explain.go has the answers, text.go their words, match.go finds the two sockets of a connection that is not
// paired, sockets.go lists sockets.
package explain

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// View holds the pods of the node, and what explains their connections, as of one
// moment.
type View struct {
	pods        []pods.Pod // one per network namespace
	byCookie    map[uint64]*pods.Pod
	byAddress   map[netip.Addr]*pods.Pod
	cluster     policy.Cluster
	unsupported map[policyKey]datapath.UnsupportedPort
	joinAfter   uint32 // as in datapath.Config
	joinPorts   map[policyKey]uint32
	now         time.Time
	// decisions caches answers of policy.Explain, which looks at all policies of
	// two namespaces, since many connections are between the same two pods.
	decisions map[policyKey]policy.Decision
}

// policyKey names the connections from one network namespace to a server port of
// another, by netns cookies. client is 0 for a port that is unsupported for all
// clients.
type policyKey struct {
	client, server uint64
	port           uint16
}

// Ports is what the datapath knows of server ports. JoinAfter is that of those that are not
// in Join, as in datapath.Config.
type Ports struct {
	Unsupported []datapath.UnsupportedPort
	Join        []datapath.JoinPort
	JoinAfter   uint32
}

// NewView returns a View of all pods of the node and of their server ports. It keeps its
// arguments.
func NewView(attachments []pods.Pod, cluster policy.Cluster, ports Ports, now time.Time) *View {
	v := &View{
		joinAfter: ports.JoinAfter, joinPorts: map[policyKey]uint32{},
		byCookie: map[uint64]*pods.Pod{}, byAddress: map[netip.Addr]*pods.Pod{}, cluster: cluster,
		unsupported: map[policyKey]datapath.UnsupportedPort{}, now: now, decisions: map[policyKey]policy.Decision{},
	}
	for _, a := range attachments {
		if a.NetnsCookie == 0 {
			continue
		}
		if v.byCookie[a.NetnsCookie] == nil {
			v.byCookie[a.NetnsCookie] = &a
			v.pods = append(v.pods, a)
		}
		for _, address := range a.Addresses {
			v.byAddress[address.Unmap()] = v.byCookie[a.NetnsCookie]
		}
	}
	for _, u := range ports.Unsupported {
		v.unsupported[policyKey{u.Client, u.Netns, u.Port}] = u
	}
	for _, p := range ports.Join {
		v.joinPorts[policyKey{0, p.Netns, p.Port}] = p.JoinAfter
	}
	return v
}

// wants reports whether the connections of a pod are to be explained.
func wants(p *pods.Pod) bool { return p != nil && (p.Enrolled || p.Policy.Settings.Enabled) }

// Pods returns one pod for each network namespace.
func (v *View) Pods() []pods.Pod { return v.pods }

// NeedsSockets returns false if no pod wants to take part: then Unpaired has nothing to
// explain, whatever sockets there are.
func (v *View) NeedsSockets() bool {
	return slices.ContainsFunc(v.pods, func(p pods.Pod) bool { return wants(&p) })
}

// answer says why something is on TCP: by codes for scripts, and by a text for people. The
// zero value says nothing.
type answer struct {
	reason  string
	details []string
	message string
}

// Codes of connections that are not paired, besides the codes of policy.Reason.
const (
	reasonPod         = "pod_" // and the pod's state
	reasonPeer        = "peer_not_here"
	reasonUnsupported = "unsupported"
	reasonUnmatched   = "unmatched"
	reasonWatched     = "watched"
)

// why returns why connections between two pods to a server port are on TCP, or the
// zero answer if neither the pods nor an unsupported port keeps them there.
func (v *View) why(client, server *pods.Pod, port uint16) answer {
	for _, p := range []*pods.Pod{client, server} {
		if p != nil && !p.Enrolled {
			return answer{reasonPod + string(p.State), []string{string(p.Reason)}, fmt.Sprintf("%s: %s", p.Pod, p.Message)}
		}
	}
	if client == nil || server == nil {
		return answer{reason: reasonPeer, message: "the other end is not a pod of this node that takes part"}
	}
	asked := policyKey{client.NetnsCookie, server.NetnsCookie, port}
	decision, known := v.decisions[asked]
	if !known {
		decision = policy.Explain(client.Policy, server.Policy, port, v.cluster, v.now)
		v.decisions[asked] = decision
	}
	if decision.Verdict != rule.Allow {
		return answer{reason: decision.Reason.Code(), message: decision.String()}
	}
	for _, key := range []policyKey{{0, server.NetnsCookie, port}, asked} {
		if reasons := counting(v.unsupported[key].Reasons, client, server); len(reasons) > 0 {
			return answer{reasonUnsupported, reasons, fmt.Sprintf(
				"an earlier connection to this server port used %s, which does not work on the shortcut: `podshunt-agent forget` lets new ones be paired again",
				Calls(reasons))}
		}
	}
	return answer{}
}

// counting returns the reasons that keep connections between two pods on TCP.
func counting(reasons []string, client, server *pods.Pod) []string {
	if !policy.AcceptBlocking(client.Policy, server.Policy) {
		return reasons
	}
	return slices.DeleteFunc(slices.Clone(reasons), func(r string) bool { return r == datapath.UnsupportedBlocking })
}

// unmatched is the answer where nothing but the connection itself can be why. Of its sockets,
// one may be nil.
func (v *View) unmatched(from, to *pods.Pod, port uint16, client, server *Socket) answer {
	after, why := v.joinAfter, "--join-after"
	if learned := v.joinPorts[policyKey{0, to.NetnsCookie, port}]; learned > after {
		after, why = learned, why+" is less; earlier connections to this server port have ended soon after that"
	}
	for _, s := range []*Socket{client, server} {
		if s != nil && s.segments < after {
			return answer{reasonWatched, nil, fmt.Sprintf(
				"it joins once it has sent and received %d segments of data (%s), so far %d", after, why, s.segments)}
		}
	}
	blocking := "a socket is in blocking mode (see " + api.AnnotationBlockingSockets + "), or "
	if policy.AcceptBlocking(from.Policy, to.Policy) {
		blocking = ""
	}
	return answer{reason: reasonUnmatched, message: blocking + "the connection was made before both pods took part and could not join, " +
		"or its two sockets cannot be matched (TCP Fast Open): reconnect to try again"}
}

// UnsupportedPorts returns the ports with the names of their pods, without those that only
// a client's sockets in blocking mode have made so which both pods accept now.
func (v *View) UnsupportedPorts(ports []datapath.UnsupportedPort) (described []api.UnsupportedPort) {
	for _, u := range ports {
		d := api.UnsupportedPort{Port: u.Port, Reasons: u.Reasons, Since: u.Since}
		server, client := v.byCookie[u.Netns], v.byCookie[u.Client]
		if server != nil {
			d.Pod = server.Pod
		}
		if client != nil {
			d.Client = &client.Pod
		}
		if server != nil && client != nil {
			if d.Reasons = counting(u.Reasons, client, server); len(d.Reasons) == 0 {
				continue
			}
		}
		described = append(described, d)
	}
	return described
}

// JoinPorts returns the ports with the names of their pods.
func (v *View) JoinPorts(ports []datapath.JoinPort) (described []api.JoinPort) {
	for _, p := range ports {
		d := api.JoinPort{Port: p.Port, JoinAfter: p.JoinAfter}
		if server := v.byCookie[p.Netns]; server != nil {
			d.Pod = server.Pod
		}
		described = append(described, d)
	}
	return described
}

func endpoint(p *pods.Pod, address netip.AddrPort) api.FlowEnd {
	if p == nil {
		return api.FlowEnd{Address: address}
	}
	return api.FlowEnd{Pod: p.Pod, Address: address}
}

// Paired describes the connections that the datapath knows.
func (v *View) Paired(flows []datapath.Flow) []api.Flow {
	described := []api.Flow{}
	for _, f := range flows {
		client, server := v.byCookie[f.ClientNetns], v.byCookie[f.ServerNetns]
		address := f.Server
		if !f.Joined {
			address = netip.AddrPort{}
		}
		direction := func(d datapath.Direction) *api.Direction {
			why := v.direction(f, d, client, server)
			return &api.Direction{
				Shortcut:      d.Shortcut,
				Reason:        why.reason,
				Details:       why.details,
				Message:       why.message,
				ShortcutBytes: d.ShortcutBytes,
				TCPBytes:      d.TCPBytes,
				UnreadBytes:   d.Unread,
				Switches:      d.Switches,
			}
		}
		described = append(described, api.Flow{
			Client: endpoint(client, f.Client), Server: endpoint(server, address), OrigDst: f.OrigDst,
			Paired: true, Since: f.Since,
			ToServer: direction(f.ToServer), ToClient: direction(f.ToClient),
		})
	}
	return described
}

// direction returns why the last message that went by TCP in a direction did.
func (v *View) direction(f datapath.Flow, d datapath.Direction, client, server *pods.Pod) answer {
	why := answer{reason: d.Reason, message: messageText(d.Reason)}
	behind := func(text string, codes ...string) answer {
		why.details, why.message = codes, fmt.Sprintf("%s (%s)", why.message, text)
		return why
	}
	switch {
	case d.Reason == "":
		return answer{}
	case d.Verdict != rule.Allow:
		// PolicyReason is from the direction's last look-up. For a refusal the
		// kernel has no reason: look that up here.
		if reason := policy.Reason(d.PolicyReason); reason != policy.NoRule {
			return behind(reason.String(), reason.Code())
		}
		if now := v.why(client, server, f.Server.Port()); now.reason != "" {
			return behind(now.message, append([]string{now.reason}, now.details...)...)
		}
		return behind(policy.NoRule.String(), policy.NoRule.Code())
	case d.ReadFlags != 0:
		return behind(flagNames(d.ReadFlags), f.Unsupported...)
	case d.Unsupported:
		return behind(Calls(f.Unsupported), f.Unsupported...)
	}
	return why
}

// Unpaired describes the connections of sockets that are not among known and have an
// end in a pod that wants to take part. A connection is listed once, also if both of
// its ends are among sockets.
func (v *View) Unpaired(sockets []Socket, known ...[]datapath.Flow) []api.Flow {
	m := newSocketMatcher(sockets, known)
	var flows []api.Flow
	describe := func(client, server *Socket) {
		var f api.Flow
		var from, to *pods.Pod
		if client != nil {
			from = v.byCookie[client.netns]
			f.Client, f.OrigDst = endpoint(from, client.local), client.remote
		} else {
			from = v.byAddress[server.remote.Addr()]
			f.Client, f.OrigDst = endpoint(from, server.remote), server.local
		}
		if server != nil {
			to = v.byCookie[server.netns]
			f.Server = endpoint(to, server.local)
		} else {
			to = v.byAddress[client.remote.Addr()]
			f.Server = endpoint(to, client.remote)
		}
		if wants(from) || wants(to) {
			why := v.why(from, to, f.Server.Address.Port())
			if why.reason == "" {
				why = v.unmatched(from, to, f.Server.Address.Port(), client, server)
			}
			f.Reason, f.Details, f.Message = why.reason, why.details, why.message
			flows = append(flows, f)
		}
	}
	for i := range m.open {
		s := &m.open[i]
		if m.used[s] || m.serves(s) {
			continue
		}
		m.used[s] = true
		peer := m.peer(s)
		if peer != nil {
			m.used[peer] = true
			// If no listener shows which end is the server, the lower port is taken for
			// it.
			if !m.serves(peer) && s.local.Port() < peer.local.Port() {
				s, peer = peer, s
			}
		}
		describe(s, peer)
	}
	for i := range m.open {
		if s := &m.open[i]; !m.used[s] {
			describe(nil, s)
		}
	}
	return flows
}

// Sort orders flows by the client's pod and address, and by what it connected to.
func Sort(flows []api.Flow) {
	slices.SortFunc(flows, func(a, b api.Flow) int {
		return cmp.Or(
			cmp.Compare(a.Client.Pod.Namespace, b.Client.Pod.Namespace),
			cmp.Compare(a.Client.Pod.Name, b.Client.Pod.Name),
			a.Client.Address.Compare(b.Client.Address),
			a.OrigDst.Compare(b.OrigDst),
		)
	})
}

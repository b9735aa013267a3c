// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

func newFlowsCommand() *cobra.Command {
	var runDir, output string
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Show the TCP connections of the pods that take part",
		Long: `Shows the open TCP connections of the pods of this node that take part. A
connection that is paired has a line for each direction: the way of its latest
message, bytes by the shortcut and by TCP, and the last reason for TCP. One that
is not paired has one line that says why.`,
		Example: `  podshunt-agent flows
  podshunt-agent flows --output=json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, runDir, api.PathFlows, output, writeFlows)
		},
	}
	runDirVar(cmd, &runDir)
	outputVar(cmd, &output)
	return cmd
}

func writeFlows(w io.Writer, flows []api.Flow) error {
	if len(flows) == 0 {
		_, err := fmt.Fprintln(w, "no connections")
		return err
	}
	t := newTable(w)
	t.row("CLIENT", "SERVER", "DIRECTION", "PATH", "SHORTCUT", "TCP", "LAST REASON FOR TCP")
	for _, f := range flows {
		client, server := endText(f.Client), endText(f.Server)
		dialled := ""
		if f.OrigDst != f.Server.Address {
			dialled = "  dialled " + f.OrigDst.String()
		}
		if !f.Paired {
			t.row(client, server, "both", "tcp", "", "", f.Reason)
			if dialled != "" {
				t.row("", dialled, "", "", "", "", "")
			}
			continue
		}
		t.row(client, server, "to server", directionText(f.ToServer))
		t.row("", dialled, "to client", directionText(f.ToClient))
	}
	return t.Flush()
}

// directionText returns the cells from PATH on.
func directionText(d *api.Direction) string {
	if d == nil {
		return ""
	}
	path := "tcp"
	if d.Shortcut {
		path = "shortcut"
	}
	reason := d.Reason
	if d.Detail != "" {
		reason += " (" + d.Detail + ")"
	}
	return strings.Join([]string{path, byteText(d.ShortcutBytes), byteText(d.TCPBytes), reason}, "\t")
}

func endText(e api.FlowEnd) string {
	pod := podText(e.Pod)
	if !e.Address.IsValid() {
		return pod
	}
	return pod + " " + e.Address.String()
}

// view is what the pods of the node are at one moment.
type view struct {
	pods        []pods.Pod // one per network namespace
	byCookie    map[uint64]*pods.Pod
	byAddress   map[netip.Addr]*pods.Pod
	cluster     policy.Cluster
	unsupported map[question]datapath.UnsupportedPort
	now         time.Time
	// decisions are those that have been asked for: many connections are between
	// the same two pods, and to find out reads all policies of their namespaces.
	decisions map[question]policy.Decision
}

// question is about the connections between two network namespaces. Of an unsupported port
// that the server has caused, client is 0.
type question struct {
	client, server uint64
	port           uint16
}

func newView(attachments []pods.Pod, cluster policy.Cluster, now time.Time) *view {
	v := &view{
		byCookie: map[uint64]*pods.Pod{}, byAddress: map[netip.Addr]*pods.Pod{}, cluster: cluster,
		unsupported: map[question]datapath.UnsupportedPort{}, now: now, decisions: map[question]policy.Decision{},
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
	return v
}

// wants tells whether a pod is to be explained.
func wants(p *pods.Pod) bool { return p != nil && (p.Enrolled || p.Policy.Settings.Enabled) }

func (v *view) anyWants() bool {
	return slices.ContainsFunc(v.pods, func(p pods.Pod) bool { return wants(&p) })
}

// why returns why the connections of two pods to a server port are on TCP, or ""
// if the policy does not keep them there.
func (v *view) why(client, server *pods.Pod, port uint16) string {
	for _, p := range []*pods.Pod{client, server} {
		if p != nil && !p.Enrolled {
			return fmt.Sprintf("%s: %s", p.Pod, p.Reason)
		}
	}
	if client == nil || server == nil {
		return "the other end is not a pod of this node that takes part"
	}
	asked := question{client.NetnsCookie, server.NetnsCookie, port}
	decision, known := v.decisions[asked]
	if !known {
		decision = policy.Explain(client.Policy, server.Policy, port, v.cluster, v.now)
		v.decisions[asked] = decision
	}
	if decision.Verdict != rule.Allow {
		return decision.String()
	}
	m, ok := v.unsupported[question{0, server.NetnsCookie, port}]
	if !ok {
		if m, ok = v.unsupported[question{client.NetnsCookie, server.NetnsCookie, port}]; !ok {
			return ""
		}
	}
	return fmt.Sprintf("a connection to this server port used %s, which the shortcut does not serve: `podshunt-agent forget` pairs new ones again",
		strings.Join(m.Reasons, ", "))
}

func (v *view) describeUnsupported(m datapath.UnsupportedPort) api.UnsupportedPort {
	described := api.UnsupportedPort{Port: m.Port, Reasons: m.Reasons, Since: m.Since}
	if p := v.byCookie[m.Netns]; p != nil {
		described.Pod = p.Pod
	}
	if p := v.byCookie[m.Client]; p != nil {
		described.Client = &p.Pod
	}
	return described
}

func end(p *pods.Pod, address netip.AddrPort) api.FlowEnd {
	if p == nil {
		return api.FlowEnd{Address: address}
	}
	return api.FlowEnd{Pod: p.Pod, Address: address}
}

// paired describes the connections that the datapath knows.
func (v *view) paired(flows []datapath.Flow) []api.Flow {
	described := []api.Flow{}
	for _, f := range flows {
		client, server := v.byCookie[f.ClientNetns], v.byCookie[f.ServerNetns]
		address := f.Server
		if !f.Joined {
			address = netip.AddrPort{}
		}
		direction := func(d datapath.Direction) *api.Direction {
			return &api.Direction{
				Shortcut:      d.Shortcut,
				Reason:        d.Reason,
				Detail:        v.detail(f, d, client, server),
				ShortcutBytes: d.ShortcutBytes,
				TCPBytes:      d.TCPBytes,
				UnreadBytes:   d.Unread,
				Switches:      d.Switches,
			}
		}
		described = append(described, api.Flow{
			Client: end(client, f.Client), Server: end(server, address), OrigDst: f.OrigDst,
			Paired: true, Since: f.Since,
			ToServer: direction(f.ToServer), ToClient: direction(f.ToClient),
		})
	}
	return described
}

// detail names the policy or the call behind a direction's reason.
func (v *view) detail(f datapath.Flow, d datapath.Direction, client, server *pods.Pod) string {
	switch {
	case d.Reason == "":
		return ""
	case d.Verdict != rule.Allow:
		// What the kernel was told when the direction last had something to send.
		// Why it was refused is known here only.
		if reason := policy.Reason(d.PolicyReason); reason != policy.NoRule {
			return reason.String()
		}
		return cmp.Or(v.why(client, server, f.Server.Port()), policy.NoRule.String())
	case d.ReadFlags != 0:
		return flagNames(d.ReadFlags)
	case d.Unsupported:
		return strings.Join(f.Unsupported, ", ")
	}
	return ""
}

// flagNames returns the names of recv flags.
func flagNames(flags uint32) string {
	var names []string
	for _, f := range []struct {
		bit  uint32
		name string
	}{
		{unix.MSG_OOB, "MSG_OOB"},
		{unix.MSG_PEEK, "MSG_PEEK"},
		{unix.MSG_TRUNC, "MSG_TRUNC"},
		{unix.MSG_WAITALL, "MSG_WAITALL"},
		{unix.MSG_ERRQUEUE, "MSG_ERRQUEUE"},
		{unix.MSG_ZEROCOPY, "MSG_ZEROCOPY"},
	} {
		if flags&f.bit != 0 {
			names = append(names, f.name)
			flags &^= f.bit
		}
	}
	if flags != 0 {
		names = append(names, fmt.Sprintf("%#x", flags))
	}
	return strings.Join(names, " ")
}

// unpaired describes the connections among sockets that have an end in a pod
// that wants to take part and are not among known. Each is listed once, also
// where both its ends are.
func (v *view) unpaired(sockets []socket, known []datapath.Flow) []api.Flow {
	m := newMatcher(sockets, known)
	var flows []api.Flow
	describe := func(client, server *socket) {
		var f api.Flow
		var from, to *pods.Pod
		if client != nil {
			from = v.byCookie[client.netns]
			f.Client, f.OrigDst = end(from, client.local), client.remote
		} else {
			from = v.byAddress[server.remote.Addr()]
			f.Client, f.OrigDst = end(from, server.remote), server.local
		}
		if server != nil {
			to = v.byCookie[server.netns]
			f.Server = end(to, server.local)
		} else {
			to = v.byAddress[client.remote.Addr()]
			f.Server = end(to, client.remote)
		}
		if wants(from) || wants(to) {
			f.Reason = cmp.Or(v.why(from, to, f.Server.Address.Port()),
				"connected before both pods took part, or by a handshake that cannot be matched (SNAT, TCP Fast Open): reconnect to try again")
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
			// Where no listener tells who the server is, the lower port is taken for it.
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

// matcher finds the two sockets of a connection.
type matcher struct {
	open      []socket // established and not known
	used      map[*socket]bool
	listeners map[place]bool
	mirrored  map[tuple]*socket
	accepted  map[netip.AddrPort][]*socket // servers' sockets by remote address
}

// place is a port of a network namespace.
type place struct {
	netns uint64
	port  uint16
}

// tuple names a socket. A loopback address means another thing in every network
// namespace, so there netns is part of the name; else it is 0.
type tuple struct {
	netns         uint64
	local, remote netip.AddrPort
}

func newTuple(netns uint64, local, remote netip.AddrPort) tuple {
	if !local.Addr().IsLoopback() {
		netns = 0
	}
	return tuple{netns, local, remote}
}

func newMatcher(sockets []socket, known []datapath.Flow) *matcher {
	type end struct {
		netns  uint64
		port   uint16
		remote netip.AddrPort
	}
	clients, servers := map[uint64]bool{}, map[end]bool{}
	for _, f := range known {
		clients[f.ID] = true
		servers[end{f.ServerNetns, f.Server.Port(), f.Client}] = true
	}
	m := &matcher{
		used: map[*socket]bool{}, listeners: map[place]bool{},
		mirrored: map[tuple]*socket{}, accepted: map[netip.AddrPort][]*socket{},
	}
	for _, s := range sockets {
		if s.listening {
			m.listeners[place{s.netns, s.local.Port()}] = true
		} else if !clients[s.cookie] && !servers[end{s.netns, s.local.Port(), s.remote}] {
			m.open = append(m.open, s)
		}
	}
	for i := range m.open {
		s := &m.open[i]
		m.mirrored[newTuple(s.netns, s.local, s.remote)] = s
		if m.serves(s) {
			m.accepted[s.remote] = append(m.accepted[s.remote], s)
		}
	}
	return m
}

// serves tells whether a socket was accepted rather than connected.
func (m *matcher) serves(s *socket) bool { return m.listeners[place{s.netns, s.local.Port()}] }

// peer returns the other socket of a client's connection if it is among ours:
// the one with the mirrored addresses, or behind a NAT of the destination the
// one that sees the client's address.
func (m *matcher) peer(s *socket) *socket {
	if p := m.mirrored[newTuple(s.netns, s.remote, s.local)]; p != nil && p != s && !m.used[p] {
		return p
	}
	for _, p := range m.accepted[s.local] {
		if !m.used[p] && (p.netns == s.netns || !s.local.Addr().IsLoopback()) {
			return p
		}
	}
	return nil
}

func sortFlows(flows []api.Flow) {
	slices.SortFunc(flows, func(a, b api.Flow) int {
		return cmp.Or(
			cmp.Compare(a.Client.Pod.String(), b.Client.Pod.String()),
			a.Client.Address.Compare(b.Client.Address),
			a.OrigDst.Compare(b.OrigDst),
		)
	})
}

// SPDX-License-Identifier: Apache-2.0

// Who is at the other end of a socket.

package explain

import (
	"net/netip"

	"github.com/podshunt/podshunt/agent/datapath"
)

// socketMatcher finds the two sockets of a connection.
type socketMatcher struct {
	open      []Socket // established and not known
	used      map[*Socket]bool
	listeners map[netnsPort]bool
	mirrored  map[tuple]*Socket
	accepted  map[netip.AddrPort][]*Socket // servers' sockets by remote address
}

// netnsPort is a port of a network namespace.
type netnsPort struct {
	netns uint64
	port  uint16
}

// tuple names a Socket. netns is 0 unless an address is a loopback one, which means
// something else in each network namespace.
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

func newSocketMatcher(sockets []Socket, known [][]datapath.Flow) *socketMatcher {
	type end struct {
		netns  uint64
		port   uint16
		remote netip.AddrPort
	}
	clients, servers := map[uint64]bool{}, map[end]bool{}
	for _, flows := range known {
		for i := range flows {
			f := &flows[i]
			clients[f.ID] = true
			servers[end{f.ServerNetns, f.Server.Port(), f.Client}] = true
		}
	}
	m := &socketMatcher{
		used: map[*Socket]bool{}, listeners: map[netnsPort]bool{},
		mirrored: map[tuple]*Socket{}, accepted: map[netip.AddrPort][]*Socket{},
	}
	for _, s := range sockets {
		if s.listening {
			m.listeners[netnsPort{s.netns, s.local.Port()}] = true
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

// serves reports whether a Socket was accepted rather than connected.
func (m *socketMatcher) serves(s *Socket) bool {
	return m.listeners[netnsPort{s.netns, s.local.Port()}]
}

// peer returns the other socket of a client's connection, or nil if no pod of the
// node has it: the socket with the mirrored addresses, or, behind DNAT, the one
// whose peer is the client's address.
func (m *socketMatcher) peer(s *Socket) *Socket {
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

// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"
	"time"

	"github.com/podshunt/podshunt/agent/rule"
)

// Flow is one paired connection, as the kernel's record has it.
type Flow struct {
	// ID is the socket cookie of the client's socket.
	ID uint64
	// ServerID is that of the server's socket, or 0 until it has joined.
	ServerID uint64
	// ClientNetns and ServerNetns are netns cookies.
	ClientNetns, ServerNetns uint64
	Client, OrigDst          netip.AddrPort
	// Server is the server socket's own address; its address is the zero Addr
	// until the server's socket has joined.
	Server netip.AddrPort
	// Joined tells whether the server's socket has joined.
	Joined bool
	Since  time.Time
	// Unsupported is what either end used that the shortcut does not serve, by the codes
	// of UnsupportedPort.
	Unsupported []string
	// ToServer and ToClient are the two directions.
	ToServer, ToClient Direction
}

// Direction is the state of one direction of a paired connection.
type Direction struct {
	// Shortcut tells how the last message went.
	Shortcut bool
	// Reason is why the last message that went by TCP did so, by the code of its outcome:
	// "budget", for example. It is empty if none has.
	Reason string
	// Verdict and PolicyReason are what the policy map said when last asked.
	Verdict      rule.Verdict
	PolicyReason uint32
	// ReadFlags are the recv flags of the receiver that this kernel does not
	// serve on redirected data (MSG_WAITALL and others); 0 if it used none.
	ReadFlags uint32
	// Unsupported is true once the direction is on TCP for good.
	Unsupported bool
	// ShortcutBytes and TCPBytes count what the sender wrote. While a direction
	// rests on TCP, the end of its last write may be missing: after a write that
	// TCP could not take whole, the kernel passes the rest on without asking again
	// (psock->eval in tcp_bpf_send_verdict, Linux 6.18).
	ShortcutBytes, TCPBytes uint64
	// Unread is what the receiver has not been seen to read, at most.
	Unread uint64
	// Redirected tells whether some of it was redirected: an unload waits for it
	// until the receiver's program has closed its socket.
	Redirected bool
	// Switches counts changes from TCP to the shortcut.
	Switches uint32
	// Evicted tells that the sender's socket was taken out of the SOCKHASH: what it has sent
	// since is not counted.
	Evicted bool
}

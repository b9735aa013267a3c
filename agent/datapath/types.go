// SPDX-License-Identifier: Apache-2.0

// A flow as the datapath tells it.

package datapath

import (
	"net/netip"
	"time"

	"github.com/podshunt/podshunt/agent/rule"
)

// Flow is one paired connection, read from the kernel's record. Ports are in host
// byte order.
type Flow struct {
	// ID is the socket cookie of the client's socket.
	ID uint64
	// ServerID is the socket cookie of the server's socket, or 0 until it has
	// joined.
	ServerID uint64
	// ClientNetns and ServerNetns are netns cookies.
	ClientNetns, ServerNetns uint64
	Client, OrigDst          netip.AddrPort
	// Server is the server socket's own address; its address is the zero Addr
	// until the server's socket has joined.
	Server netip.AddrPort
	// Joined is true once the server's socket has joined.
	Joined bool
	Since  time.Time
	// Unsupported has the codes of unsupported calls that either end has used, as in
	// UnsupportedPort.Reasons.
	Unsupported []string
	// ToServer and ToClient are the two directions.
	ToServer, ToClient Direction
}

// Direction is the state of one direction of a paired connection.
type Direction struct {
	// Shortcut is true if the last message went by the shortcut.
	Shortcut bool
	// Reason is the code that says why the last message that went by TCP did: "budget",
	// for example. It is empty if none has.
	Reason string
	// Verdict and PolicyReason come from the last look-up in the policy map.
	Verdict      rule.Verdict
	PolicyReason uint32
	// ReadFlags has the unsupported recv flags that the receiver has used, such
	// as MSG_WAITALL; 0 if none.
	ReadFlags uint32
	// Unsupported is true once the direction is on TCP for good.
	Unsupported bool
	// ShortcutBytes and TCPBytes count what the sender wrote. While a direction
	// rests on TCP, the end of its last write may not be counted yet: after a
	// write that TCP could not take whole, the kernel passes the rest on without
	// calling deliver again (psock->eval in tcp_bpf_send_verdict, Linux 6.18).
	ShortcutBytes, TCPBytes uint64
	// Unread counts the bytes that the receiver has not been seen to read: it
	// has at most so many unread.
	Unread uint64
	// Redirected is true if some of the unread bytes were redirected. An unload
	// waits until they are read, or the receiver's program has closed its
	// socket.
	Redirected bool
	// Switches counts changes from TCP to the shortcut.
	Switches uint32
	// Evicted is true if the sender's socket was evicted: what it has sent since is not
	// counted.
	Evicted bool
}

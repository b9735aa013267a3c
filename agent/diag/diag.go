// SPDX-License-Identifier: Apache-2.0

// Package diag lists and resets the TCP sockets of a network namespace through
// inet_diag. It asks in its own words, as the netlink library's request asks for
// both families one after the other and for each socket's tcp_info: the kernel walks
// all sockets of the node for each request, and locks a socket for its tcp_info.
package diag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// timeoutSeconds bounds a question to the kernel.
const timeoutSeconds = 10

// States of a socket, for Each.
const (
	Established = 1 << unix.BPF_TCP_ESTABLISHED
	Listening   = 1 << unix.BPF_TCP_LISTEN
	All         = 0xfff
)

// ErrInterrupted is returned with a list that may lack some, as sockets came and went
// while it was made.
var ErrInterrupted = netlink.ErrDumpInterrupted

// Socket is a TCP socket.
type Socket struct {
	// Local and Remote are IPv4 addresses too where the socket is of IPv6 and its peer is not.
	Local, Remote netip.AddrPort
	Cookie        uint64
	// State is one of those above.
	State int
	// Segments counts those with data that were sent and received; 0 unless asked for.
	Segments uint32

	family uint8
	id     [idSize]byte // struct inet_diag_sockid
}

// Conn is a socket of inet_diag in a network namespace, for one goroutine at a time.
type Conn struct {
	path   string
	handle *nl.SocketHandle
}

// Open returns a Conn for the network namespace at path. The caller closes it.
func Open(path string) (*Conn, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open netns %s: %w", path, err)
	}
	defer ns.Close()
	socket, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open inet_diag in netns %s: %w", path, err)
	}
	c := &Conn{path, &nl.SocketHandle{Socket: socket}}
	timeout := unix.Timeval{Sec: timeoutSeconds}
	if err := errors.Join(socket.SetReceiveTimeout(&timeout), socket.SetSendTimeout(&timeout)); err != nil {
		c.Close()
		return nil, fmt.Errorf("set timeout of inet_diag: %w", err)
	}
	return c, nil
}

// Close closes c.
func (c *Conn) Close() { c.handle.Close() }

// Each calls visit with each socket of both families that is in one of the states, which
// are joined by |. It returns ErrInterrupted after the last of them.
func (c *Conn) Each(states uint32, visit func(*Socket)) error { return c.each(states, 0, visit) }

// EachWithSegments is Each for sockets with their Segments, for which the kernel locks each.
func (c *Conn) EachWithSegments(states uint32, visit func(*Socket)) error {
	return c.each(states, infoAttribute, visit)
}

func (c *Conn) each(states uint32, attribute uint8, visit func(*Socket)) error {
	err := c.request(getSock, unix.NLM_F_DUMP, listRequest(states, attribute)).ExecuteIter(unix.NETLINK_INET_DIAG, 0, func(message []byte) bool {
		if s, ok := parse(message); ok {
			visit(&s)
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("list sockets of netns %s: %w", c.path, err)
	}
	return nil
}

// Reset closes a connection as if its peer had sent a RST. It returns unix.ENOENT if the
// socket is not there any more, and unix.EOPNOTSUPP if the kernel is built without
// CONFIG_INET_DIAG_DESTROY.
func (c *Conn) Reset(s Socket) error {
	if _, err := c.request(nl.SOCK_DESTROY, unix.NLM_F_ACK, resetRequest(s)).Execute(unix.NETLINK_INET_DIAG, 0); err != nil {
		return fmt.Errorf("reset %s: %w", s.Local, err)
	}
	return nil
}

func (c *Conn) request(kind, flags int, content content) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: c.handle}
	req.AddData(content)
	return req
}

// The layouts of linux/inet_diag.h.
const (
	getSock     = 18 // TCPDIAG_GETSOCK, which alone lists both families in one walk
	idSize      = 48 // struct inet_diag_sockid
	listSize    = 12 + idSize
	resetSize   = 8 + idSize
	messageSize = 24 + idSize

	infoAttribute = 2 // INET_DIAG_INFO: struct tcp_info
)

// content is a request as the kernel reads it.
type content []byte

var _ nl.NetlinkRequestData = content(nil)

func (c content) Len() int          { return len(c) }
func (c content) Serialize() []byte { return c }

// listRequest is struct inet_diag_req. It asks for an attribute unless that is 0.
func listRequest(states uint32, attribute uint8) content {
	b := make(content, listSize)
	if attribute > 0 {
		b[3] = 1 << (attribute - 1)
	}
	binary.NativeEndian.PutUint32(b[4+idSize:], states)
	return b
}

// resetRequest is struct inet_diag_req_v2. The kernel finds the socket by its
// addresses, and compares the cookie.
func resetRequest(s Socket) content {
	b := make(content, resetSize)
	b[0], b[1] = s.family, unix.IPPROTO_TCP
	copy(b[8:], s.id[:])
	return b
}

// parse reads struct inet_diag_msg.
func parse(b []byte) (Socket, bool) {
	if len(b) < messageSize {
		return Socket{}, false
	}
	s := Socket{family: b[0], State: 1 << b[1], id: [idSize]byte(b[4:])}
	size := 4
	if s.family == unix.AF_INET6 {
		size = 16
	}
	address := func(ip, port []byte) netip.AddrPort {
		addr, _ := netip.AddrFromSlice(ip[:size])
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(port))
	}
	s.Local, s.Remote = address(s.id[4:], s.id[0:]), address(s.id[20:], s.id[2:])
	s.Segments = segments(b[messageSize:])
	s.Cookie = uint64(binary.NativeEndian.Uint32(s.id[44:]))<<32 | uint64(binary.NativeEndian.Uint32(s.id[40:]))
	return s, true
}

// segments reads the attribute for what a socket has sent and received, if there is one.
func segments(attributes []byte) uint32 {
	parsed, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return 0
	}
	for _, a := range parsed {
		const in, out = unsafe.Offsetof(unix.TCPInfo{}.Data_segs_in), unsafe.Offsetof(unix.TCPInfo{}.Data_segs_out)
		if a.Attr.Type == infoAttribute && len(a.Value) >= int(out)+4 {
			return binary.NativeEndian.Uint32(a.Value[in:]) + binary.NativeEndian.Uint32(a.Value[out:])
		}
	}
	return 0
}

// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Socket is a TCP socket of a pod that listens or is connected.
type Socket struct {
	netns, cookie uint64
	local, remote netip.AddrPort
	listening     bool
}

// Sockets returns the listening and established TCP sockets of the network
// namespace at path, whose cookie is given. It returns what it has with an error.
func Sockets(path string, cookie uint64) ([]Socket, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open netns %s: %w", path, err)
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open inet_diag in netns %s: %w", path, err)
	}
	defer handle.Close()
	if err := handle.SetSocketTimeout(2 * time.Second); err != nil {
		return nil, fmt.Errorf("set timeout of inet_diag: %w", err)
	}
	var sockets []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := handle.SocketDiagTCP(family)
		// An interrupted dump may lack some: good enough for a picture of the moment.
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return sockets, fmt.Errorf("list sockets of netns %s: %w", path, err)
		}
		for _, s := range found {
			if s.State == unix.BPF_TCP_LISTEN || s.State == unix.BPF_TCP_ESTABLISHED {
				sockets = append(sockets, Socket{
					netns:     cookie,
					cookie:    uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0]),
					local:     addrPort(s.ID.Source, s.ID.SourcePort),
					remote:    addrPort(s.ID.Destination, s.ID.DestinationPort),
					listening: s.State == unix.BPF_TCP_LISTEN,
				})
			}
		}
	}
	return sockets, nil
}

func addrPort(ip net.IP, port uint16) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(ip) // 4 or 16 bytes
	return netip.AddrPortFrom(addr.Unmap(), port)
}

// SPDX-License-Identifier: Apache-2.0

// The sockets of a pod, as the kernel lists them.

package explain

import (
	"errors"
	"net/netip"

	"github.com/podshunt/podshunt/agent/diag"
)

// Socket is a TCP socket of a pod that listens or is connected.
type Socket struct {
	netns, cookie uint64
	local, remote netip.AddrPort
	listening     bool
	segments      uint32 // with data, sent and received
}

// Sockets returns the listening and established TCP sockets of the network namespace
// at path; cookie is the namespace's. With an error, it returns the sockets that it
// has found.
func Sockets(path string, cookie uint64) ([]Socket, error) {
	conn, err := diag.Open(path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var sockets []Socket
	err = conn.EachWithSegments(diag.Established|diag.Listening, func(s *diag.Socket) {
		sockets = append(sockets, Socket{
			netns: cookie, cookie: s.Cookie, local: s.Local, remote: s.Remote, listening: s.State == diag.Listening, segments: s.Segments,
		})
	})
	if errors.Is(err, diag.ErrInterrupted) {
		err = nil // good enough for a picture of the moment
	}
	return sockets, err
}

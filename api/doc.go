// SPDX-License-Identifier: Apache-2.0

// Package api has what podshunt's programs agree on: the annotations that opt a pod
// in, the messages on the agent's unix socket, the plugin's section of a CNI
// conflist, and the default paths. It imports nothing else of podshunt and does no
// I/O.
package api

import (
	"fmt"
	"time"
)

// Default places on a node. Everything under RunDir and PinDir belongs to the
// agent; both are gone after a reboot, together with the kernel objects that
// they describe.
const (
	// RunDir holds the agent's socket, its lock and one file per attachment.
	RunDir = "/run/podshunt"
	// Socket is where the agent listens for the plugin and the command line.
	Socket = RunDir + "/agent.sock"
	// PinDir is the directory of a bpffs that keeps the kernel objects alive.
	PinDir = "/sys/fs/bpf/podshunt"
)

// maxSocketPath limits the path of the agent's socket, in bytes: sockaddr_un holds
// 107 and a NUL, and the agent needs four more while it makes the socket.
const maxSocketPath = 103

// CheckSocket returns an error if a path is too long for the agent's socket. The
// kernel refuses to connect to such a path, which would look like an absent agent.
func CheckSocket(path string) error {
	if len(path) > maxSocketPath {
		return fmt.Errorf("%q: accepted are at most %d bytes", path, maxSocketPath)
	}
	return nil
}

// PluginType is the value of "type" in a conflist that names our plugin.
const PluginType = "podshunt"

// PluginTimeout bounds how long the plugin waits for the agent before it lets the
// pod start without.
const PluginTimeout = 200 * time.Millisecond

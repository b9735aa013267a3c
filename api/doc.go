// SPDX-License-Identifier: Apache-2.0

// Package api is what podshunt's programs agree on: the annotations that opt a
// pod in, the messages on the agent's unix socket, the plugin's section of a
// CNI conflist, and the default paths. It imports nothing else of podshunt and
// does no I/O.
package api

import "time"

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

// PluginType is the value of "type" in a conflist that names our plugin.
const PluginType = "podshunt"

// PluginTimeout is how long the plugin waits for the agent before it lets the
// pod start without it.
const PluginTimeout = 200 * time.Millisecond

// SPDX-License-Identifier: Apache-2.0

// The runtime of a node, found again when it was started anew.

package cri

import (
	"log/slog"
	"sync"
	"time"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

// retryInterval is the time between two searches for a runtime that was not found, or
// whose configuration could not be read. A search reads the command lines of all processes.
const retryInterval = 30 * time.Second

// Node knows the runtime of a node. It looks for it again when its process has ended. Its
// method may be called at any time, by any goroutine.
type Node struct {
	proc string
	log  *slog.Logger

	mu     sync.Mutex
	found  Found
	err    error
	looked time.Time
}

// NewNode returns a Node that has not looked yet. proc is as for Find.
func NewNode(proc string, log *slog.Logger) *Node { return &Node{proc: proc, log: log} }

// Runtime returns the runtime, with an Error if it or its configuration is not known, and
// the root directory that it sees.
func (n *Node) Runtime() (api.Runtime, nodefs.Root) {
	n.mu.Lock()
	defer n.mu.Unlock()
	known := n.err == nil && n.found.Running()
	if n.looked.IsZero() || !known && (n.err == nil || time.Since(n.looked) > retryInterval) {
		n.look()
	}
	return n.found.Runtime, n.found.Root
}

func (n *Node) look() {
	former := n.found.Error
	first := n.looked.IsZero()
	n.found, n.err = Find(n.proc)
	n.looked = time.Now()
	if n.err != nil {
		n.found.Error = n.err.Error()
		if first || former != n.found.Error {
			n.log.Warn("configuration of the container runtime not known", "err", n.err)
		}
		return
	}
	r := n.found.Runtime
	n.log.Info("container runtime found", "runtime", r.Name, "sources", r.Sources, "cni_conf_dir", r.ConfDir, "cni_bin_dirs", r.BinDirs, "network", r.Network, "networks", r.Networks)
}

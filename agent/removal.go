// SPDX-License-Identifier: Apache-2.0

// What the agent does when it ends because podshunt is removed from the cluster.

package main

import (
	"context"
	"time"
)

// removedTimeout bounds how long an agent that ends asks what has become of its DaemonSet. The chart
// adds it to the grace period of the agent's pod.
const removedTimeout = 5 * time.Second

// uninstallIf uninstalls if removed says that podshunt is removed from the cluster, and not when the
// agent is only replaced, or its node drained or shut down. The agent has to run until it returns.
func (n *node) uninstallIf(ctx context.Context, removed func(context.Context) (bool, error), timeout time.Duration, force bool) {
	asking, cancel := context.WithTimeout(ctx, removedTimeout)
	defer cancel()
	gone, err := removed(asking)
	if !gone {
		if err != nil {
			n.log.Warn("nothing is uninstalled: whether the agent's DaemonSet is deleted is not known", "err", err)
		}
		return
	}
	n.log.Info("uninstalling, as the agent's DaemonSet is deleted", "timeout", timeout.String(), "force", force)
	ctx, cancel = context.WithTimeout(ctx, timeout)
	defer cancel()
	result, err := n.Uninstall(ctx, force)
	switch {
	case err != nil:
		n.log.Error("not uninstalled: run `podshunt-agent uninstall` on the node", "err", err)
	case !result.Done:
		n.log.Error("kernel objects stay, as connections have not read what was sent by the shortcut: run `podshunt-agent unload` on the node",
			"connections", len(result.Waiting), "reset_error", result.ResetError)
	default:
		n.log.Info("uninstalled", "reset", len(result.Reset), "left", result.Left)
	}
}

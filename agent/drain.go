// SPDX-License-Identifier: Apache-2.0

// Waiting until what another build has loaded can be taken out.

package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// errDrained says that nothing is in the way of loading any more.
var errDrained = errors.New("drained")

const replacingMessage = "kernel objects of another layout or size are drained first: " +
	"connections have to read what was sent by the shortcut, and are on TCP meanwhile"

// drainLog is how often the log says what a drain waits for.
const drainLog = 30 * time.Second

// drain waits until the kernel objects of before are taken out, and returns errDrained then. If
// somebody unloads meanwhile, the agent does nothing more until it is started again: then it
// returns nil, as it does when ctx ends.
func (n *node) drain(ctx context.Context) error {
	for {
		if err := n.replacing(); err != nil {
			n.log.Warn("nothing is shortcut yet", "reason", err)
		}
		wait, cancel := context.WithTimeout(ctx, drainLog)
		waiting, err := n.datapath.Unload(wait)
		cancel()
		switch {
		case len(waiting) > 0 && ctx.Err() == nil:
			continue
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("take out the kernel objects of before: %w", err)
		}
		if !n.claim(&n.drained, &n.unloaded) {
			return nil
		}
		n.log.Info("the kernel objects of before are taken out", "left", n.datapath.Left())
		return errDrained
	}
}

// replacing returns an error that says what a drain waits for, or nil if there is none.
func (n *node) replacing() error {
	if !n.datapath.Replacing() {
		return nil
	}
	waiting, err := n.datapath.Waiting()
	if err != nil {
		return err
	}
	if len(waiting) == 0 {
		return errors.New("the kernel objects of before are being replaced")
	}
	f := waiting[0]
	return fmt.Errorf("%d connections, such as %s to %s, have to read what was sent by the shortcut of another build before this one loads: "+
		"`podshunt-agent flows` lists them, `podshunt-agent unload --force` resets them", len(waiting), f.Client, f.Server)
}

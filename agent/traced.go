// SPDX-License-Identifier: Apache-2.0

// The watch over whether the kernel runs the guards.

package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
)

// tracedInterval is the time between two looks at whether the kernel runs the guards.
const tracedInterval = time.Second

// traced is the part of a Datapath that watchTraced uses.
type traced interface {
	UpdateTraced() (untraced, err error)
}

// watchTraced lets all messages go by TCP while the kernel does not run the guards, until ctx
// ends. The kernel tells nobody, neither the programs nor the agent.
func watchTraced(ctx context.Context, d traced, log *slog.Logger) error {
	ticker := time.NewTicker(tracedInterval)
	defer ticker.Stop()
	was := false
	for {
		untraced, err := d.UpdateTraced()
		switch {
		case errors.Is(err, datapath.ErrUnloaded):
		case err != nil:
			log.Warn("not known whether the kernel runs the guards, trying again", "err", err)
		case untraced != nil && !was:
			log.Error("the kernel does not run the guards: all messages go by TCP", "reason", untraced)
		case untraced == nil && was:
			log.Info("the kernel runs the guards again")
		}
		was = untraced != nil
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

// The lease of the policy, which the agent renews while it knows what pods ask for.

package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
)

// lease keeps the policy in the kernel trusted for as long as somebody vouches for
// it. After an agent has died, or has lost its source for good, connections go back
// to TCP, where the network enforces what this node does not hear of any more.
type lease struct {
	datapath leased
	length   time.Duration // 0: trusted for ever
	// vouch returns an error if the policy must not be relied on.
	vouch func(now time.Time) error
	log   *slog.Logger

	mu  sync.Mutex
	err error // of the last try
}

// leased is the part of a Datapath that a lease uses.
type leased interface {
	SetLease(time.Duration) error
	Lease() (time.Time, error)
}

// leaseRetry is the time after which a lease that could not be renewed is tried again. An agent
// that starts, for example, hears of the pods a moment later, and may have found a lease that
// has run out.
const leaseRetry = time.Second

// run renews the lease until ctx ends.
func (l *lease) run(ctx context.Context) error {
	if err := l.begin(); err != nil && !errors.Is(err, datapath.ErrUnloaded) {
		return err
	}
	if l.length == 0 {
		return nil
	}
	for {
		pause := max(l.length/10, 10*time.Millisecond)
		if !l.renew(time.Now()) {
			pause = min(pause, leaseRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// begin does not extend what is left of the former agent's lease: otherwise agents
// that restart over and over would keep an old policy trusted for ever.
func (l *lease) begin() error {
	until, err := l.datapath.Lease()
	if err == nil && until.IsZero() != (l.length == 0) {
		err = l.datapath.SetLease(l.length)
	}
	return err
}

// renew reports whether the lease was renewed, or has nothing to be renewed for.
func (l *lease) renew(now time.Time) bool {
	err := l.vouch(now)
	if err == nil {
		err = l.datapath.SetLease(l.length)
	}
	if errors.Is(err, datapath.ErrUnloaded) {
		err = nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil && l.err == nil {
		l.log.Warn("the policy's lease is not renewed: when it ends, all connections go by TCP", "err", err)
	}
	if err == nil && l.err != nil {
		l.log.Info("the policy's lease is renewed again")
	}
	l.err = err
	return err == nil
}

// state returns the lease for the status, or nil if the policy is trusted for ever.
func (l *lease) state() *api.Lease {
	until, err := l.datapath.Lease()
	if err != nil || until.IsZero() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	state := &api.Lease{Until: until}
	if l.err != nil {
		state.Error = l.err.Error()
	}
	return state
}

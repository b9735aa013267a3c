// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// Unload takes everything out of the kernel without losing a byte: it stops
// redirecting, waits until no redirected data is unread, and only then detaches
// and deletes. Connections go on, on TCP. If ctx ends first, nothing is deleted
// and the flows still waited for are returned with the error; redirecting stays
// off until the next Unload, or Open.
func (d *Datapath) Unload(ctx context.Context) ([]Flow, error) {
	if err := d.stopRedirecting(); err != nil {
		return nil, err
	}
	for {
		pause := sleep(ctx, 20*time.Millisecond)
		waiting, err := d.detachIfDrained()
		switch {
		case err != nil || len(waiting) == 0:
			return nil, err
		case pause != nil:
			return waiting, fmt.Errorf("wait until %d flows have read their redirected data: %w", len(waiting), pause)
		}
	}
}

func (d *Datapath) stopRedirecting() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil
	}
	if err := d.setControl(func(s *bpf.ShortcutSettings) { s.Redirect = 0 }); err != nil {
		return err
	}
	waitForPrograms()
	return nil
}

// detachIfDrained detaches unless it returns flows that have redirected data to read.
func (d *Datapath) detachIfDrained() (waiting []Flow, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	flows, err := d.flows()
	if err != nil {
		return nil, err
	}
	for _, f := range flows {
		if f.ToServer.Redirected || f.ToClient.Redirected {
			waiting = append(waiting, f)
		}
	}
	if len(waiting) > 0 {
		return waiting, nil
	}
	d.unloaded = true
	return nil, d.detach()
}

// waitForPrograms returns when no run of a program is under way that has read
// the controls before: MEMBARRIER_CMD_GLOBAL is the kernel's synchronize_rcu
// (kernel/sched/membarrier.c), and programs run inside an RCU read section. It
// is refused where CPUs are kept free of ticks; Unload's first pause, far longer
// than a program runs, then has to do.
func waitForPrograms() {
	const membarrierGlobal = 1
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
}

func sleep(ctx context.Context, t time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(t):
		return nil
	}
}

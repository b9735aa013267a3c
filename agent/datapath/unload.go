// SPDX-License-Identifier: Apache-2.0

// Unload: everything out of the kernel without losing a byte.

package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// Unload takes everything out of the kernel without losing a byte: it stops
// redirecting, waits until no redirected data is unread, and only then detaches and
// deletes. Connections go on, on TCP. If ctx ends first, nothing is deleted, and it
// returns ctx's error with the flows that it still waits for; redirecting stays off
// until the next Open. After any error Unload may be called again, and goes on where
// it has stopped. After a success most other methods return ErrUnloaded.
func (d *Datapath) Unload(ctx context.Context) ([]Flow, error) {
	if err := d.beginUnload(); err != nil {
		return nil, err
	}
	for {
		pause := sleep(ctx, drainPause)
		waiting, err := d.detachIfDrained()
		switch {
		case err != nil || len(waiting) == 0:
			return nil, err
		case pause != nil:
			return waiting, fmt.Errorf("wait until %d flows have read their redirected data: %w", len(waiting), pause)
		}
	}
}

// GiveUp makes Unload wait no longer for some flows, because their connections have
// been reset. Their sockets keep unread redirected data until their programs close
// them, and the kernel keeps the objects that this needs.
func (d *Datapath) GiveUp(flows []Flow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.givenUp == nil {
		d.givenUp = map[uint64]bool{}
	}
	for _, f := range flows {
		d.givenUp[f.ID] = true
	}
}

// Left returns how many sockets of ended connections Unload has left in the
// SOCKHASH, until their programs close them: see GiveUp.
func (d *Datapath) Left() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.left
}

// beginUnload turns redirecting off.
func (d *Datapath) beginUnload() error {
	d.getJoiner().end()
	d.getWatcher().end()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.removing {
		return nil
	}
	if err := d.finish(); err != nil { // nothing to do after Open
		return err
	}
	if there, err := exists(d.cfg.PinDir); err != nil {
		return err
	} else if !there && d.objects.Maps == nil {
		d.unloaded, d.removing, d.gone = true, true, true
		return d.Close()
	}
	return d.stopRedirecting()
}

func (d *Datapath) stopRedirecting() error {
	control := d.objects.Maps[bpf.ShortcutMapControl]
	if control == nil {
		return d.nothingRedirects()
	}
	if err := switchOff(control); err != nil {
		return err
	}
	waitForPrograms()
	return nil
}

// nothingRedirects returns nil if no socket is in the SOCKHASH, and no program is
// attached that puts one there. Otherwise redirecting would have to be turned off,
// which is impossible without the map of settings.
func (d *Datapath) nothingRedirects() error {
	pairing, err := exists(filepath.Join(d.cfg.PinDir, pinTrack))
	if err != nil {
		return err
	}
	if sockets := d.objects.Maps[bpf.ShortcutMapSockets]; sockets != nil && !pairing {
		cookies, err := socketCookies(sockets)
		if err != nil || len(cookies) == 0 {
			return err
		}
	}
	what := "the pin of map %s is gone"
	if there, err := exists(filepath.Join(d.cfg.PinDir, bpf.ShortcutMapControl)); err != nil {
		return err
	} else if there {
		what = "map %s is of a build that this one knows nothing of"
	}
	return fmt.Errorf(what+", by which redirecting is turned off, and connections may use the shortcut: "+
		"restart the pods that take part, or reboot the node, then delete %s", bpf.ShortcutMapControl, d.cfg.PinDir)
}

// detachIfDrained returns the flows that have redirected data to read; it detaches if
// there are none.
func (d *Datapath) detachIfDrained() (waiting []Flow, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone {
		return nil, nil
	}
	if waiting, err = d.undrained(); err != nil || len(waiting) > 0 {
		return waiting, err
	}
	return nil, d.detach()
}

// undrained returns the flows that Unload has to wait for.
func (d *Datapath) undrained() (waiting []Flow, err error) {
	flows, err := d.flows() // none once the removal has begun
	if err != nil {
		return nil, err
	}
	for _, f := range flows {
		if d.givenUp[f.ID] {
			continue
		}
		for socket, redirected := range map[uint64]bool{f.ID: f.ToClient.Redirected, f.ServerID: f.ToServer.Redirected} {
			if !redirected {
				continue
			}
			there, err := d.inSockets(socket)
			if err != nil {
				return nil, err
			}
			if there {
				waiting = append(waiting, f)
				break
			}
		}
	}
	return waiting, nil
}

// inSockets reports whether a socket is in the SOCKHASH. It may still be there, with
// bytes for its program to read, after its connection has ended: the kernel takes it
// out when the program closes it.
func (d *Datapath) inSockets(cookie uint64) (bool, error) {
	sockets := d.objects.Maps[bpf.ShortcutMapSockets]
	if sockets == nil {
		return false, nil // none is taken out then
	}
	var value uint64
	err := sockets.Lookup(cookie, &value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for a socket in the SOCKHASH: %w", err)
	}
	return true, nil
}

// detach renames the pins to suffixOld and takes them down. The caller has made sure
// that no redirected data has to be waited for. After an error it may be called
// again.
func (d *Datapath) detach() error {
	d.unloaded, d.removing = true, true
	if err := d.at("drained"); err != nil {
		return err
	}
	if !d.renamed {
		err := os.Rename(d.cfg.PinDir, d.cfg.PinDir+suffixOld)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // somebody has deleted all pins
			return fmt.Errorf("rename the pins: %w", err)
		}
		d.renamed = true
	}
	if err := d.at("renamed"); err != nil {
		return err
	}
	if err := d.takeDown(d.objects.Maps); err != nil {
		return err
	}
	d.gone = true
	return d.Close()
}

// waitForPrograms returns once all runs of programs have ended that may have read
// the old settings: MEMBARRIER_CMD_GLOBAL is the kernel's synchronize_rcu
// (kernel/sched/membarrier.c), and programs run inside an RCU read section. The
// kernel refuses it with nohz_full CPUs; Unload's first pause, far longer than a
// program runs, then has to do.
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

// SPDX-License-Identifier: Apache-2.0

// Pins of before that are not taken over as they are: taken down, for new ones.

package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
)

// errSize says that a map has another size than the configuration wants.
var errSize = errors.New("a map's size cannot be changed")

// drainPause is the time between two looks at whether all redirected bytes are read. Open
// itself waits for drainAtOnce: programs that are at work read within that time.
const (
	drainPause  = 20 * time.Millisecond
	drainAtOnce = 2 * time.Second
)

// inherit takes over what is pinned, or takes it down. It returns false if nothing has to
// be made anew: all is taken over, or d is Replacing.
func (d *Datapath) inherit() (replaced bool, err error) {
	err = d.takeOver()
	switch {
	case err == nil:
		return false, nil
	case errors.Is(err, errNoMap):
		d.log.Warn("pins are missing: open connections go on by TCP, new ones are paired by new programs", "err", err)
		// It does not wait for readers: a socket with redirected bytes to read stays as it is.
		if err = d.openOther(); err == nil {
			err = d.stopRedirecting()
		}
		if err == nil {
			err = d.replace()
		}
	case d.cfg.OnIncompatible == OnIncompatibleDrain && (errors.Is(err, ErrOtherBuild) || errors.Is(err, errSize)):
		d.log.Warn("the pins are replaced: open connections go on by TCP, new ones are paired by new programs", "reason", err)
		err = d.drain()
	case errors.Is(err, ErrOtherBuild):
		return false, fmt.Errorf("take over the pins in %s: %w: take them out by `podshunt-agent unload`, or run with --on-incompatible=%s",
			d.cfg.PinDir, err, OnIncompatibleDrain)
	default:
		return false, fmt.Errorf("take over the pins in %s: %w", d.cfg.PinDir, err)
	}
	if err != nil {
		return false, fmt.Errorf("replace the pins in %s: %w", d.cfg.PinDir, err)
	}
	return !d.other, nil
}

// openOther opens what pins of any layout have in common.
func (d *Datapath) openOther() error {
	found, err := d.openAny(d.cfg.PinDir)
	if err != nil {
		return err
	}
	d.objects = &ebpf.Collection{Maps: found}
	d.other, d.unloaded = true, true
	return nil
}

// drain turns redirecting off, and takes the pins down if all redirected bytes are read
// soon. Otherwise d is Replacing.
func (d *Datapath) drain() error {
	if err := d.openOther(); err != nil {
		return err
	}
	if err := d.stopRedirecting(); err != nil {
		return err
	}
	for end := time.Now().Add(drainAtOnce); ; {
		_ = sleep(context.Background(), drainPause)
		waiting, err := d.undrained()
		if err != nil {
			return err
		}
		if len(waiting) == 0 {
			return d.replace()
		}
		if time.Now().After(end) {
			return nil
		}
	}
}

// Replacing reports whether nothing is loaded because connections have redirected bytes of
// pins to read that are to be replaced. Redirecting is off. Unload waits for them, and takes
// those pins down; then Open makes new ones. Until then Flows returns the connections of
// those pins.
func (d *Datapath) Replacing() bool { return d.other }

// Waiting returns the flows that Unload has to wait for.
func (d *Datapath) Waiting() ([]Flow, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.undrained()
}

// replace takes the pins down, without waiting. Then new ones may be made.
func (d *Datapath) replace() error {
	if err := os.Rename(d.cfg.PinDir, d.cfg.PinDir+suffixOld); err != nil {
		return fmt.Errorf("rename the pins: %w", err)
	}
	if err := d.takeDown(d.objects.Maps); err != nil {
		return err
	}
	d.objects.Close()
	d.objects, d.other, d.unloaded, d.left = nil, false, false, 0
	err := d.pins.Close()
	d.pins = nil
	return err
}

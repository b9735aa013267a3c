// SPDX-License-Identifier: Apache-2.0

// The locks that keep two agents from one pin directory.

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// own makes this process the only one that works on the pins, until disown. It
// returns ErrInUse if another one does.
func (d *Datapath) own() error {
	path := d.cfg.PinDir + suffixLock
	for {
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make lock: %w", err)
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its owner has deleted it
		}
		if err != nil {
			return fmt.Errorf("open lock: %w", err)
		}
		if err := flock(f); err != nil {
			return errors.Join(err, f.Close())
		}
		// Its last owner may have deleted the directory, and somebody made another
		// one.
		have, err1 := f.Stat()
		named, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(have, named) {
			d.lock = f
			return nil
		}
		if err := errors.Join(err1, f.Close()); err != nil {
			return fmt.Errorf("look at lock: %w", err)
		}
	}
}

// ownPins locks the pin directory itself: builds without suffixLock know no other lock.
func (d *Datapath) ownPins(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open pin directory: %w", err)
	}
	if err := flock(f); err != nil {
		return errors.Join(err, f.Close())
	}
	d.pins = f
	return nil
}

func flock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrInUse
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// disown lets others work on the pins, and leaves no lock where there are none.
func (d *Datapath) disown() error {
	var errs []error
	if d.pins != nil {
		errs = append(errs, d.pins.Close())
		d.pins = nil
	}
	if d.lock != nil {
		if there, err := anyPins(d.cfg.PinDir); err == nil && !there {
			errs = append(errs, os.Remove(d.lock.Name()))
		}
		errs = append(errs, d.lock.Close())
		d.lock = nil
	}
	return errors.Join(errs...)
}

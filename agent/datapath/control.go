// SPDX-License-Identifier: Apache-2.0

// The settings that the programs read with every message: the generation of the policy, and its lease.

package datapath

import (
	"fmt"
	"time"

	"github.com/podshunt/podshunt/bpf"
)

func number(yes bool) uint32 {
	if yes {
		return 1
	}
	return 0
}

func (d *Datapath) setControl(change func(*bpf.ShortcutSettings)) error {
	var s bpf.ShortcutSettings
	control := d.objects.Maps[bpf.ShortcutMapControl]
	if err := control.Lookup(uint32(0), &s); err != nil {
		return fmt.Errorf("read the controls: %w", err)
	}
	before := s
	if change(&s); s == before {
		return nil
	}
	if err := control.Put(uint32(0), s); err != nil {
		return fmt.Errorf("write the controls: %w", err)
	}
	return nil
}

// SetLease lets the programs trust the policy for so long from now on; 0 is for
// ever. After that every message goes by TCP and no connection is paired, until the
// next call. It returns ErrUnloaded after an unload.
func (d *Datapath) SetLease(lease time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return ErrUnloaded
	}
	return d.setControl(func(s *bpf.ShortcutSettings) {
		s.LeaseNs = 0
		if lease > 0 {
			s.LeaseNs = uint64(monotonic() + lease)
		}
	})
}

// Lease returns when the trust ends that SetLease has set in this process or in an
// earlier one; the zero time means never. It returns ErrUnloaded after an unload.
func (d *Datapath) Lease() (time.Time, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return time.Time{}, ErrUnloaded
	}
	var s bpf.ShortcutSettings
	if err := d.objects.Maps[bpf.ShortcutMapControl].Lookup(uint32(0), &s); err != nil {
		return time.Time{}, fmt.Errorf("read the controls: %w", err)
	}
	if s.LeaseNs == 0 {
		return time.Time{}, nil
	}
	return time.Now().Add(time.Duration(s.LeaseNs) - monotonic()), nil
}

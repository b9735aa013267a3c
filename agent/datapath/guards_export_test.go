// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"os"
	"slices"
)

// DropGuardLink detaches one program of a guard that is attached, as if the kernel
// did not run it.
func (d *Datapath) DropGuardLink(guard, program string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	g, i := d.guards[guard], slices.Index(guardPrograms()[guard], program)
	if g == nil || i < 0 {
		return fmt.Errorf("guard %s with program %s is not attached", guard, program)
	}
	err := errors.Join(os.Remove(g.pins[i]), g.links[i].Close())
	g.pins, g.links = slices.Delete(g.pins, i, i+1), slices.Delete(g.links, i, i+1)
	return err
}

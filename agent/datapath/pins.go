// SPDX-License-Identifier: Apache-2.0

// Pins while they are made or taken down, so that an agent that is killed at any step leaves nothing behind.

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"

	"github.com/podshunt/podshunt/bpf"
)

// Suffixes of directories beside the pin directory. bpffs does not allow names with
// a dot.
const (
	// suffixLock is an empty directory. Whoever holds its lock works on the pins:
	// it is there before them, and stays while they are renamed.
	suffixLock = "_lock"
	// suffixNew is a bring-up that is not complete: no pod has ever taken part
	// in it.
	suffixNew = "_new"
	// suffixOld is a removal that is not complete. Before the pins got this
	// name, redirecting was turned off, and all redirected bytes that an unload
	// waits for had been read.
	suffixOld = "_old"
)

// anyPins reports whether there are pins, also of a bring-up or removal that is not
// complete.
func anyPins(dir string) (bool, error) {
	for _, suffix := range []string{"", suffixNew, suffixOld} {
		if there, err := exists(dir + suffix); err != nil || there {
			return there, err
		}
	}
	return false, nil
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for pins: %w", err)
	}
	return true, nil
}

// finish completes what a crash has interrupted. The caller owns the pins.
func (d *Datapath) finish() error {
	if err := d.removePins(d.cfg.PinDir + suffixNew); err != nil {
		return fmt.Errorf("remove unfinished pins: %w", err)
	}
	there, err := exists(d.cfg.PinDir + suffixOld)
	if err != nil || !there {
		return err
	}
	d.log.Warn("an unload was interrupted: finishing it")
	held, err := d.openAny(d.cfg.PinDir + suffixOld)
	if err != nil {
		return err
	}
	defer closeMaps(held)
	if err := d.takeDown(held); err != nil {
		return fmt.Errorf("finish an interrupted unload: %w", err)
	}
	return nil
}

// takeDown takes the renamed pins, and what they hold, out of the kernel. It may be
// interrupted between any two steps, and called again.
func (d *Datapath) takeDown(maps map[string]*ebpf.Map) error {
	dir := d.cfg.PinDir + suffixOld
	// Pairing ends first, so that no socket joins meanwhile.
	if err := d.endPairing(dir); err != nil {
		return err
	}
	if err := d.at("track detached"); err != nil {
		return err
	}
	left, err := d.evictAll(maps[bpf.ShortcutMapSockets], maps[bpf.ShortcutMapFlows])
	if err != nil {
		return err
	}
	d.left = left
	return d.removePins(dir)
}

// endPairing detaches what is attached to a cgroup, by its pin, whatever that is called,
// and by this process's own handle, since somebody may have deleted the pin.
func (d *Datapath) endPairing(dir string) error {
	var errs []error
	detach := func(l link.Link) {
		info, err := l.Info()
		if err == nil && info.Type == link.CgroupType {
			err = l.Detach()
		}
		errs = append(errs, err)
	}
	for _, l := range d.links {
		detach(l)
	}
	pins, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, p := range pins {
		if !p.Type().IsRegular() {
			continue
		}
		object, err := pin.Load(filepath.Join(dir, p.Name()), nil)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if l, ok := object.(link.Link); ok {
			detach(l)
		}
		errs = append(errs, object.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end pairing: %w", err)
	}
	waitForPrograms()
	return nil
}

// evictAll deletes from the SOCKHASH the sockets that have no redirected bytes to
// read, and returns how many stay. A socket stays if it has some, or if its flow is
// gone, so that nobody knows: its connection was reset or has ended, but its program
// has not closed it. If it were deleted, its unread bytes would be lost, and the
// program would read on behind the gap. It leaves when its program closes it; until
// then it keeps the sk_msg program, and that keeps all maps.
func (d *Datapath) evictAll(sockets, flows *ebpf.Map) (left int, err error) {
	if sockets == nil {
		return 0, nil // taken out before an interruption, or out of reach
	}
	if flows == nil {
		cookies, err := socketCookies(sockets)
		return len(cookies), err
	}
	for {
		drained, err := drainedSockets(flows)
		if err != nil {
			return 0, err
		}
		cookies, err := socketCookies(sockets)
		if err != nil {
			return 0, err
		}
		deleted := 0
		for cookie := range cookies {
			if !drained[cookie] {
				continue
			}
			if err := d.at("take out a socket"); err != nil {
				return 0, err
			}
			if err := sockets.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return 0, fmt.Errorf("take a socket out of the SOCKHASH: %w", err)
			}
			deleted++
		}
		// A socket that is closed while the keys are read may hide others.
		if deleted == 0 {
			return len(cookies), nil
		}
	}
}

// drainedSockets returns the sockets of flows that have read all that was redirected to them.
func drainedSockets(flows *ebpf.Map) (map[uint64]bool, error) {
	all, err := flowsOf(flows)
	if err != nil {
		return nil, err
	}
	drained := map[uint64]bool{}
	for _, f := range all {
		if !f.ToClient.Redirected {
			drained[f.ID] = true
		}
		if !f.ToServer.Redirected {
			drained[f.ServerID] = true
		}
	}
	return drained, nil
}

// unread reports whether the socket of a side has redirected bytes to read.
func unread(p *bpf.ShortcutFlow, side bpf.ShortcutSideIndex) bool {
	toward := p.Side[1-side].Sending
	return toward.RedirectEnd > p.Side[side].Receiving.ReadBytes+uint64(toward.Missed)
}

// socketCookies returns the keys of the SOCKHASH.
func socketCookies(sockets *ebpf.Map) (map[uint64]bool, error) {
	cookies := map[uint64]bool{}
	var last any
	for {
		key, err := sockets.NextKeyBytes(last)
		if err != nil {
			return nil, fmt.Errorf("read the SOCKHASH: %w", err)
		}
		if key == nil {
			return cookies, nil
		}
		cookies[binary.NativeEndian.Uint64(key)] = true
		last = key
	}
}

// removePins deletes a directory of pins; one that is not there is no error.
func (d *Datapath) removePins(dir string) error {
	pins, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	names := make([]string, len(pins))
	for i, pin := range pins {
		names[i] = pin.Name()
	}
	// The pins that finish needs are deleted last.
	slices.SortStableFunc(names, func(a, b string) int { return removalRank(a) - removalRank(b) })
	for _, name := range names {
		if err := d.at("delete a pin"); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := d.at("delete the directory"); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func removalRank(name string) int {
	switch {
	case strings.HasPrefix(name, "link_"):
		return 0
	case name == bpf.ShortcutMapSockets:
		return 2
	case name == bpf.ShortcutMapFlows, name == formerFlows, name == bpf.ShortcutMapControl:
		return 3
	default:
		return 1
	}
}

// at runs between the steps of a bring-up and a removal, so that tests can interrupt
// them.
func (d *Datapath) at(step string) error {
	if d.step == nil {
		return nil
	}
	return d.step(step)
}

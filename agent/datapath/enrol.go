// SPDX-License-Identifier: Apache-2.0

// Enrolling pods, by the cookies of their network namespaces.

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// Enrol lets the pod whose network namespace has the cookie take part: its new
// connections are paired if the policy allows it. Write the policy first, since a
// connection that finds no rule is never paired. Enrolling twice is the same as once.
// To enrol a namespace that is gone does no harm, as a cookie is never used again,
// but takes room until Release. It returns ErrUnloaded after an unload, and wraps
// ENOSPC or E2BIG if a map is full.
func (d *Datapath) Enrol(cookie uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return ErrUnloaded
	}
	// What is there stays: the pod was enrolled before, and has connections from then.
	for name, zero := range map[string]any{bpf.ShortcutMapCharges: int64(0), bpf.ShortcutMapShares: bpf.ShortcutShare{}} {
		err := d.objects.Maps[name].Update(cookie, zero, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("enrol netns cookie %d: %w", cookie, explainFull(err))
		}
	}
	err := d.objects.Maps[bpf.ShortcutMapPods].Update(cookie, uint32(1), ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return d.updateGuards()
	}
	if err != nil {
		return fmt.Errorf("enrol netns cookie %d: %w", cookie, explainFull(err))
	}
	if err := d.updateGuards(); err != nil {
		return errors.Join(err, d.objects.Maps[bpf.ShortcutMapPods].Delete(cookie))
	}
	for pods := range d.policy {
		if pods.client == cookie || pods.server == cookie {
			d.due(pods, nil)
		}
	}
	d.announceDue()
	return nil
}

// Release ends the pairing of a pod's new connections. Those that are paired go on
// as the policy says, so take the pod's rules away first. It succeeds if the pod is
// not enrolled, and after an unload.
func (d *Datapath) Release(cookie uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil
	}
	if err := d.objects.Maps[bpf.ShortcutMapPods].Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("release netns cookie %d: %w", cookie, err)
	}
	return d.updateGuards()
}

// Enrolled returns the cookies of the pods that take part, in no order; none after
// an unload.
func (d *Datapath) Enrolled() ([]uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	pods, err := entries[uint64, uint32](d.objects.Maps[bpf.ShortcutMapPods])
	if err != nil {
		return nil, fmt.Errorf("read the pods map: %w", err)
	}
	return slices.Collect(maps.Keys(pods)), nil
}

// NetnsCookie returns the kernel's identity of the network namespace at path:
// unique since boot and never used again.
func NetnsCookie(path string) (uint64, error) {
	var cookie uint64
	err := ns.WithNetNSPath(path, func(ns.NetNS) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open a socket: %w", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if err != nil {
			return fmt.Errorf("read SO_NETNS_COOKIE (Linux 5.14 and later have it): %w", err)
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("identify netns %s: %w", path, err)
	}
	return cookie, nil
}

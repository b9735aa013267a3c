// SPDX-License-Identifier: Apache-2.0

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
// connections are paired where the policy allows it, so the policy comes first.
// Enrolling twice is the same as once. A cookie is never used again, so that to enrol
// that of a namespace that is gone does nothing but take room until it is released.
func (d *Datapath) Enrol(cookie uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return ErrUnloaded
	}
	// What a pod has left from an earlier part stays: its connections are still there.
	for name, zero := range map[string]any{bpf.ShortcutMapCharges: int64(0), bpf.ShortcutMapShares: bpf.ShortcutShare{}} {
		err := d.objects.Maps[name].Update(cookie, zero, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("enrol netns cookie %d: %w", cookie, explainFull(err))
		}
	}
	if err := d.objects.Maps[bpf.ShortcutMapPods].Put(cookie, uint32(1)); err != nil {
		return fmt.Errorf("enrol netns cookie %d: %w", cookie, explainFull(err))
	}
	if err := d.updateGuards(); err != nil {
		return errors.Join(err, d.objects.Maps[bpf.ShortcutMapPods].Delete(cookie))
	}
	return nil
}

// Release ends a pod's part in new connections. What becomes of its paired ones
// is for SetPolicy to say.
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

// Enrolled returns the cookies of the pods that take part.
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

// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// Enrol lets the pod of the network namespace at path take part: its new
// connections are paired where the policy allows it. It returns the namespace's
// cookie; enrolling twice is the same as once.
func (d *Datapath) Enrol(netns string) (uint64, error) {
	cookie, err := NetnsCookie(netns)
	if err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return 0, ErrUnloaded
	}
	if err := d.objects.Maps[bpf.ShortcutMapPods].Put(cookie, uint32(1)); err != nil {
		return 0, fmt.Errorf("enrol netns %s: %w", netns, explainFull(err, "pods"))
	}
	if err := d.updateGuards(); err != nil {
		return 0, errors.Join(err, d.objects.Maps[bpf.ShortcutMapPods].Delete(cookie))
	}
	return cookie, nil
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

// SetPolicy makes the rules the whole policy, for new connections and with the
// next message of paired ones. Only what changed is written. Where the map is
// full, the pairs of pods that did not fit stay on TCP and the error says so;
// the others are in force.
func (d *Datapath) SetPolicy(rules []Rule) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return ErrUnloaded
	}
	table := d.objects.Maps[bpf.ShortcutMapPolicies]
	if d.policy == nil {
		have, err := entries[bpf.ShortcutPolicyKey, bpf.ShortcutPolicy](table)
		if err != nil {
			return fmt.Errorf("read the policy map: %w", err)
		}
		d.policy = have
	}
	want := compile(rules)
	if maps.Equal(want, d.policy) {
		return nil
	}
	wanted := map[[4]uint32]bool{}
	for key := range want {
		wanted[podsOf(key)] = true
	}
	err := d.deletePolicies(table, func(key bpf.ShortcutPolicyKey) bool { return !wanted[podsOf(key)] })
	if err == nil {
		// What the first try deletes may be the room that it lacked.
		if err = d.replacePolicies(table, want); err != nil {
			err = d.replacePolicies(table, want)
		}
	}
	return errors.Join(err, d.setControl(func(s *bpf.ShortcutSettings) { s.Generation++ }))
}

// replacePolicies writes what differs and deletes what is stale. Overrides go in
// before the base of their pods changes and stale ones go out after it, so that
// no port is allowed meanwhile that neither policy allows; if one cannot be
// written, nothing is left for its pods.
func (d *Datapath) replacePolicies(table *ebpf.Map, want map[bpf.ShortcutPolicyKey]bpf.ShortcutPolicy) error {
	var failure error
	incomplete := map[[4]uint32]bool{}
	for _, base := range []bool{false, true} {
		for key, value := range want {
			have, ok := d.policy[key]
			if isBase(key) != base || ok && have == value || incomplete[podsOf(key)] {
				continue
			}
			if err := table.Put(key, value); err != nil {
				failure = fmt.Errorf("write the policy map: %w", explainFull(err, "policies"))
				incomplete[podsOf(key)] = true
				continue
			}
			d.policy[key] = value
		}
	}
	return errors.Join(failure, d.deletePolicies(table, func(key bpf.ShortcutPolicyKey) bool {
		_, ok := want[key]
		return !ok || incomplete[podsOf(key)]
	}))
}

// deletePolicies deletes entries, bases first: without them nothing is allowed
// that an override refuses.
func (d *Datapath) deletePolicies(table *ebpf.Map, stale func(bpf.ShortcutPolicyKey) bool) error {
	for _, base := range []bool{true, false} {
		for key := range d.policy {
			if isBase(key) != base || !stale(key) {
				continue
			}
			if err := table.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("delete from the policy map: %w", err)
			}
			delete(d.policy, key)
		}
	}
	return nil
}

// Prefix lengths of the policy's keys; flow.h has the layout.
const (
	prefixPods = 128
	prefixPort = 144
)

func isBase(k bpf.ShortcutPolicyKey) bool { return k.Prefixlen == prefixPods }

func podsOf(k bpf.ShortcutPolicyKey) [4]uint32 {
	return [4]uint32{k.Client[0], k.Client[1], k.Server[0], k.Server[1]}
}

// compile turns rules into entries of the longest-prefix match.
func compile(rules []Rule) map[bpf.ShortcutPolicyKey]bpf.ShortcutPolicy {
	want := make(map[bpf.ShortcutPolicyKey]bpf.ShortcutPolicy, len(rules))
	for _, r := range rules {
		value := bpf.ShortcutPolicy{Verdict: bpf.ShortcutVerdict(r.Verdict), Reason: r.Reason}
		for port, length := range prefixes(r.First, r.Last) {
			want[bpf.ShortcutPolicyKey{
				Prefixlen: prefixPods + uint32(length),
				Client:    [2]uint32{uint32(r.Client), uint32(r.Client >> 32)},
				Server:    [2]uint32{uint32(r.Server), uint32(r.Server >> 32)},
				Port:      networkOrder(port),
			}] = value
		}
	}
	return want
}

// prefixes yields the fewest prefixes (value, length in bits) that cover first
// to last; at most 30.
func prefixes(first, last uint16) func(yield func(uint16, int) bool) {
	return func(yield func(uint16, int) bool) {
		for next, end := uint32(first), uint32(last)+1; next < end; {
			size := min(16, bits.TrailingZeros32(next|1<<16))
			for next+1<<size > end {
				size--
			}
			if !yield(uint16(next), 16-size) {
				return
			}
			next += 1 << size
		}
	}
}

// networkOrder returns the number whose bytes in memory are port in network order.
func networkOrder(port uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

// explainFull adds what to do to the kernel's word for a full map: ENOSPC from
// an LPM trie, E2BIG from a hash.
func explainFull(err error, name string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("the map is full, raise --max-%s: %w", name, err)
	}
	return err
}

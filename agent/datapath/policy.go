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
	return nil
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
	if err := d.loadPolicy(); err != nil {
		return err
	}
	return d.setPolicy(compile(rules))
}

// UpdatePolicy changes the rules of the pairs of pods that are named, and of no
// others. Else it is as SetPolicy.
func (d *Datapath) UpdatePolicy(changed []PairRules) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.loadPolicy(); err != nil {
		return err
	}
	want := maps.Clone(d.policy)
	for _, pair := range changed {
		maps.DeleteFunc(want, func(key bpf.ShortcutPolicyKey, _ bpf.ShortcutPolicy) bool {
			return key.Client == words(pair.Client) && key.Server == words(pair.Server)
		})
		maps.Copy(want, compile(pair.Rules))
	}
	return d.setPolicy(want)
}

// loadPolicy reads what an earlier process has left.
func (d *Datapath) loadPolicy() error {
	if d.unloaded {
		return ErrUnloaded
	}
	if d.policy != nil {
		return nil
	}
	have, err := entries[bpf.ShortcutPolicyKey, bpf.ShortcutPolicy](d.objects.Maps[bpf.ShortcutMapPolicies])
	if err != nil {
		return fmt.Errorf("read the policy map: %w", err)
	}
	d.policy = have
	return nil
}

func (d *Datapath) setPolicy(want map[bpf.ShortcutPolicyKey]bpf.ShortcutPolicy) error {
	table := d.objects.Maps[bpf.ShortcutMapPolicies]
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

func words(cookie uint64) [2]uint32 { return [2]uint32{uint32(cookie), uint32(cookie >> 32)} }

// compile turns rules into entries of the longest-prefix match.
func compile(rules []Rule) map[bpf.ShortcutPolicyKey]bpf.ShortcutPolicy {
	want := make(map[bpf.ShortcutPolicyKey]bpf.ShortcutPolicy, len(rules))
	for _, r := range rules {
		value := bpf.ShortcutPolicy{Verdict: bpf.ShortcutVerdict(r.Verdict), Reason: r.Reason}
		for port, length := range prefixes(r.First, r.Last) {
			want[bpf.ShortcutPolicyKey{
				Prefixlen: prefixPods + uint32(length),
				Client:    words(r.Client),
				Server:    words(r.Server),
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

// SPDX-License-Identifier: Apache-2.0

// The policy map: rules as longest-prefix entries, and the order in which they are changed.

package datapath

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
)

// SetPolicy replaces the whole policy by the rules. New connections follow it at
// once, paired ones from their next message on. Only what differs is written. If the
// map is full, the pairs of pods that do not fit stay on TCP, the others are in
// force, and the error wraps ENOSPC. It returns ErrUnloaded after an unload.
func (d *Datapath) SetPolicy(rules []rule.Rule) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.readPolicy(); err != nil {
		return err
	}
	want := map[podPair][]entry{}
	for pods := range d.policy {
		want[pods] = nil
	}
	for _, r := range rules {
		pods := podPair{r.Client, r.Server}
		want[pods] = appendEntries(want[pods], r)
	}
	return d.writePolicy(want)
}

// UpdatePolicy replaces the rules of the given pairs of pods, each of which is given
// once, and leaves the others. Its errors, and what holds after one, are those of
// SetPolicy.
func (d *Datapath) UpdatePolicy(changed []rule.PairRules) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.readPolicy(); err != nil {
		return err
	}
	want := map[podPair][]entry{}
	for _, pair := range changed {
		pods := podPair{pair.Client, pair.Server}
		want[pods] = nil
		for _, r := range pair.Rules {
			want[pods] = appendEntries(want[pods], r)
		}
	}
	return d.writePolicy(want)
}

// readPolicy reads, the first time, the policy that an earlier process has left.
func (d *Datapath) readPolicy() error {
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
	d.policy = map[podPair][]entry{}
	for key, value := range have {
		pods := podPair{join(key.Client), join(key.Server)}
		d.policy[pods] = append(d.policy[pods], entry{key.Prefixlen, key.Port, value})
	}
	for pods, list := range d.policy {
		slices.SortFunc(list, compareKeys)
		// Their connections may have been made while no agent ran and the lease had ended.
		d.due(pods, nil)
	}
	return nil
}

// writePolicy writes the wanted entries of some pairs.
func (d *Datapath) writePolicy(want map[podPair][]entry) error {
	for pods, list := range want {
		slices.SortFunc(list, compareKeys)
		if slices.Equal(list, d.policy[pods]) {
			delete(want, pods)
		}
	}
	err := errors.Join(d.replacePairs(want), d.raiseGeneration())
	d.announceDue()
	return err
}

// raiseGeneration makes all directions look up the policy map again, if it has
// changed since they last did. It stays due until it succeeds.
func (d *Datapath) raiseGeneration() error {
	if !d.generationDue {
		return nil
	}
	err := d.setControl(func(s *bpf.ShortcutSettings) { s.Generation++ })
	d.generationDue = err != nil
	return err
}

// replacePairs writes some pairs in this order. Pairs that lose all rules come
// first: their ports are closed before the rest is written, which may take seconds,
// and they make room. Then those with few entries: if the map gets full, one pair
// with many entries must not keep out several small ones.
func (d *Datapath) replacePairs(want map[podPair][]entry) error {
	deleted := false
	for pods, list := range want {
		if len(list) == 0 {
			if err := d.replacePair(pods, nil, 0); err != nil {
				return err
			}
			delete(want, pods)
			deleted = true
		}
	}
	if len(want) == 0 {
		return nil
	}
	if deleted {
		if err := d.raiseGeneration(); err != nil {
			return err
		}
	}
	room := int(d.objects.Maps[bpf.ShortcutMapPolicies].MaxEntries()) - countPolicies(d.policy)
	order := slices.SortedFunc(maps.Keys(want), func(a, b podPair) int {
		return cmp.Or(cmp.Compare(len(want[a]), len(want[b])), cmp.Compare(a.client, b.client), cmp.Compare(a.server, b.server))
	})
	var failure error
	// Twice, since the first try may delete what the second needs room for.
	for range 2 {
		failure = nil
		order = slices.DeleteFunc(order, func(pods podPair) bool {
			before := len(d.policy[pods])
			err := d.replacePair(pods, want[pods], room)
			room += before - len(d.policy[pods])
			if err != nil {
				failure = err
			}
			return err == nil
		})
	}
	if failure != nil {
		return fmt.Errorf("%d pairs of pods stay on TCP: %w", len(order), failure)
	}
	return nil
}

// replacePair replaces the entries of one pair. Hazard: while it writes, a port must
// not be allowed that neither the old nor the new policy allows. For example, a
// change from "9000 Allow" to "all ports Allow, 22 Refuse": if the base came first,
// 22 would be allowed for a moment. Rule: overrides are written before the base
// changes, and stale ones deleted after it; if one cannot be written, the pair loses
// all its entries. room is how many entries more the map can take. It sets
// generationDue.
func (d *Datapath) replacePair(pods podPair, want []entry, room int) error {
	d.generationDue = true
	table := d.objects.Maps[bpf.ShortcutMapPolicies]
	have := d.policy[pods]
	had := slices.Clone(have)
	defer func() { d.due(pods, had) }()
	var failure error
	for _, e := range want {
		if _, found := slices.BinarySearchFunc(have, e, compareKeys); !found {
			room--
		}
	}
	if room < 0 && len(want) > 0 {
		// Checked first, since the kernel would refuse in the middle.
		failure = fmt.Errorf("write the policy map: %w", explainFull(unix.ENOSPC))
		want = nil
	}
	for _, e := range want { // the base is the last
		at, found := slices.BinarySearchFunc(have, e, compareKeys)
		if found && have[at] == e {
			continue
		}
		if err := table.Put(e.key(pods), e.value); err != nil {
			failure = fmt.Errorf("write the policy map: %w", explainFull(err))
			want = nil
			break
		}
		if found {
			have[at] = e
		} else {
			have = slices.Insert(have, at, e)
		}
	}
	// The base first: without it, no port becomes allowed when its override
	// goes.
	for at, e := range slices.Backward(have) {
		if _, found := slices.BinarySearchFunc(want, e, compareKeys); found {
			continue
		}
		if err := table.Delete(e.key(pods)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			failure = errors.Join(failure, fmt.Errorf("delete from the policy map: %w", err))
			break
		}
		have = slices.Delete(have, at, at+1)
	}
	if d.policy[pods] = have; len(have) == 0 {
		delete(d.policy, pods)
	}
	return failure
}

// podPair is the part of a policy's key that names the two pods, by netns cookies.
type podPair struct{ client, server uint64 }

// entry is the rest of the key, and the value: flow.h has the layout. Lists of
// entries are sorted by compareKeys.
type entry struct {
	prefixLength uint32
	port         uint16 // in network order
	value        bpf.ShortcutPolicy
}

// compareKeys orders the entries of a pair, the base last.
func compareKeys(a, b entry) int {
	return cmp.Or(-cmp.Compare(a.prefixLength, b.prefixLength), cmp.Compare(a.port, b.port))
}

func (e entry) key(pods podPair) bpf.ShortcutPolicyKey {
	return bpf.ShortcutPolicyKey{
		Prefixlen: e.prefixLength, Client: split(pods.client), Server: split(pods.server), Port: e.port,
	}
}

func split(cookie uint64) [2]uint32 { return [2]uint32{uint32(cookie), uint32(cookie >> 32)} }

func join(words [2]uint32) uint64 { return uint64(words[0]) | uint64(words[1])<<32 }

// appendEntries turns a rule into entries of the longest-prefix match.
func appendEntries(list []entry, r rule.Rule) []entry {
	value := bpf.ShortcutPolicy{Verdict: bpf.ShortcutVerdict(r.Verdict), Reason: r.Reason, Blocking: number(r.Blocking)}
	for port, length := range prefixes(r.First, r.Last) {
		list = append(list, entry{uint32(bpf.ShortcutPolicyPrefixPOLICY_PREFIX_PODS) + uint32(length), networkOrder(port), value})
	}
	return list
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

// networkOrder converts a port from host to network byte order.
func networkOrder(port uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

// explainFull adds what to do to the kernel's error for a full map of policies
// (ENOSPC, from an LPM trie), or of pods (E2BIG, from a hash), whose size follows
// from --max-policies.
func explainFull(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("the map is full, raise --max-policies: %w", err)
	}
	return err
}

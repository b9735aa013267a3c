// SPDX-License-Identifier: Apache-2.0

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

// SetPolicy makes the rules the whole policy, for new connections and with the
// next message of paired ones. Only what changed is written. Where the map is
// full, the pairs of pods that did not fit stay on TCP and the error says so;
// the others are in force.
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

// UpdatePolicy changes the rules of the pairs of pods that are named and of no
// others, each of which is named once. Else it is as SetPolicy.
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

// readPolicy reads what an earlier process has left, once.
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
	for _, list := range d.policy {
		slices.SortFunc(list, compareKeys)
	}
	return nil
}

// writePolicy makes the entries of some pairs those that are wanted.
func (d *Datapath) writePolicy(want map[podPair][]entry) error {
	for pods, list := range want {
		slices.SortFunc(list, compareKeys)
		if slices.Equal(list, d.policy[pods]) {
			delete(want, pods)
		}
	}
	return errors.Join(d.replacePairs(want), d.raiseGeneration())
}

// raiseGeneration lets all directions ask the policy map again, if they have not
// been told of its last change. It stays due until it has succeeded.
func (d *Datapath) raiseGeneration() error {
	if !d.generationDue {
		return nil
	}
	err := d.setControl(func(s *bpf.ShortcutSettings) { s.Generation++ })
	d.generationDue = err != nil
	return err
}

// replacePairs takes what goes away first: it may be the room that others lack, and
// is in force before the others are written, which may take seconds. So that a pair
// with many entries takes no room that several others need, small ones come first.
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
	// What the first try deletes may be room for the second.
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

// replacePair writes what differs and deletes what is stale. Overrides go in
// before the base changes and stale ones go out after it, so that no port is
// allowed meanwhile that neither policy allows; if one cannot be written, nothing
// is left for the pair. Room is how many entries more the map can take. From here on
// the generation is due.
func (d *Datapath) replacePair(pods podPair, want []entry, room int) error {
	d.generationDue = true
	table := d.objects.Maps[bpf.ShortcutMapPolicies]
	have := d.policy[pods]
	var failure error
	for _, e := range want {
		if _, found := slices.BinarySearchFunc(have, e, compareKeys); !found {
			room--
		}
	}
	if room < 0 && len(want) > 0 {
		// The kernel would say so in the middle.
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
	// The base first: without it nothing is allowed that an override refuses.
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

// podPair is the part of a policy's key that names pods, by netns cookies.
type podPair struct{ client, server uint64 }

// entry is the rest of the key, with the value: flow.h has the layout. Lists of
// them are sorted by compareKeys.
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
	value := bpf.ShortcutPolicy{Verdict: bpf.ShortcutVerdict(r.Verdict), Reason: r.Reason}
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

// networkOrder returns the number whose bytes in memory are port in network order.
func networkOrder(port uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

// explainFull adds what to do to the kernel's word for a full map of policies, or
// of pods, whose size follows from it: ENOSPC from an LPM trie, E2BIG from a hash.
func explainFull(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("the map is full, raise --max-policies: %w", err)
	}
	return err
}

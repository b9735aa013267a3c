// SPDX-License-Identifier: Apache-2.0

// How full the maps are, and sweeping entries whose sockets are gone.

package datapath

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// Maps returns how full the sized maps are; none after an unload. It does not hold
// the lock while it counts.
func (d *Datapath) Maps() ([]api.MapUsage, error) {
	d.mu.Lock()
	if d.unloaded {
		d.mu.Unlock()
		return nil, nil
	}
	table := d.objects.Maps
	policies := -1
	if d.policy != nil {
		policies = countPolicies(d.policy)
	}
	d.mu.Unlock()
	return countMaps(table, policies)
}

func countPolicies(policy map[podPair][]entry) int {
	n := 0
	for _, list := range policy {
		n += len(list)
	}
	return n
}

// countMaps counts the entries of maps. policies is the number of entries of the
// policy map, or below 0 if that has to be counted, too.
func countMaps(table map[string]*ebpf.Map, policies int) ([]api.MapUsage, error) {
	var usage []api.MapUsage
	for _, c := range []struct {
		name  string
		count func(*ebpf.Map) (int, error)
	}{
		{bpf.ShortcutMapPods, count[uint64, uint32]},
		{bpf.ShortcutMapPolicies, func(m *ebpf.Map) (int, error) {
			if policies >= 0 {
				return policies, nil
			}
			return count[bpf.ShortcutPolicyKey, bpf.ShortcutPolicy](m)
		}},
		{bpf.ShortcutMapFlows, count[uint64, bpf.ShortcutFlow]},
		{bpf.ShortcutMapSockets, countKeys},
		{bpf.ShortcutMapSyns, count[bpf.ShortcutClientKey, bpf.ShortcutSyn]},
		{bpf.ShortcutMapPending, count[bpf.ShortcutPendingKey, bpf.ShortcutPending]},
		{bpf.ShortcutMapLearned, count[bpf.ShortcutLearnedKey, bpf.ShortcutLearnedValue]},
	} {
		m := table[c.name]
		n, err := c.count(m)
		if err != nil {
			return nil, fmt.Errorf("count map %s: %w", c.name, err)
		}
		usage = append(usage, api.MapUsage{Name: c.name, Entries: n, Max: int(m.MaxEntries())})
	}
	return usage, nil
}

// Sweep deletes what nothing else deletes: entries of handshakes that are older than
// age and have never ended, what was learned of pods that no longer take part, and
// flows whose sockets are gone without a callback, because another program on the
// cgroup has switched callbacks off. It detaches the guards after the last flow. It
// does not hold the lock while it reads the maps that connections fill.
func (d *Datapath) Sweep(age time.Duration) error {
	table, err := d.cloneMaps(bpf.ShortcutMapSyns, bpf.ShortcutMapPending, bpf.ShortcutMapFlows, bpf.ShortcutMapSockets, bpf.ShortcutMapLearned)
	if err != nil || table == nil {
		return err
	}
	defer closeMaps(table)
	limit := uint64(max(0, monotonic()-age))
	handshakes := errors.Join(
		sweep(table[bpf.ShortcutMapSyns], func(_ bpf.ShortcutClientKey, h bpf.ShortcutSyn) bool { return h.WrittenNs < limit }),
		sweep(table[bpf.ShortcutMapPending], func(_ bpf.ShortcutPendingKey, h bpf.ShortcutPending) bool { return h.WrittenNs < limit }),
	)
	found, err := findContents(table, limit)
	if err != nil {
		return errors.Join(handshakes, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return handshakes
	}
	return errors.Join(handshakes, d.endFlows(found.ended), d.settle(found), d.updateGuards())
}

// cloneMaps returns handles of maps that may be read without the lock, or nil after
// an unload.
func (d *Datapath) cloneMaps(names ...string) (map[string]*ebpf.Map, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	table := map[string]*ebpf.Map{}
	for _, name := range names {
		m, err := d.objects.Maps[name].Clone()
		if err != nil {
			closeMaps(table)
			return nil, fmt.Errorf("open map %s once more: %w", name, err)
		}
		table[name] = m
	}
	return table, nil
}

func sweep[K comparable, V any](m *ebpf.Map, stale func(K, V) bool) error {
	all, err := entries[K, V](m)
	if err != nil {
		return fmt.Errorf("read handshakes: %w", err)
	}
	for key, value := range all {
		if !stale(key, value) {
			continue
		}
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete a stale handshake: %w", err)
		}
	}
	return nil
}

// batch entries are read with one system call. A hash bucket that has more could not
// be read.
const batch = 1024

// entries reads a whole map. It may miss entries that come or go meanwhile.
func entries[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	all := map[K]V{}
	return all, eachBatch(m, func(keys []K, values []V) {
		for i, key := range keys {
			all[key] = values[i]
		}
	})
}

// count returns the number of entries that entries would return.
func count[K, V any](m *ebpf.Map) (n int, err error) {
	err = eachBatch(m, func(keys []K, _ []V) { n += len(keys) })
	return n, err
}

// eachBatch calls visit with all entries, some at a time. It uses the slices again,
// so visit must not keep them.
func eachBatch[K, V any](m *ebpf.Map, visit func([]K, []V)) error {
	var (
		keys   = make([]K, batch)
		values = make([]V, batch)
		cursor ebpf.MapBatchCursor
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		visit(keys[:n], values[:n])
		if err != nil {
			return nil
		}
	}
}

// countKeys counts the entries of a map of any kind, one system call for each: the
// kernel has no batches for a SOCKHASH.
func countKeys(m *ebpf.Map) (int, error) {
	n := 0
	var last any
	for range m.MaxEntries() {
		key, err := m.NextKeyBytes(last)
		if err != nil || key == nil {
			return n, err
		}
		last = key
		n++
	}
	return n, nil
}

// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// Flows returns the paired connections, in no order. It reads the live map, so
// the numbers of one flow may be of slightly different moments.
func (d *Datapath) Flows() ([]Flow, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flows()
}

func (d *Datapath) flows() ([]Flow, error) {
	if d.unloaded || d.objects.Maps[bpf.ShortcutMapFlows] == nil {
		return nil, nil
	}
	records, err := entries[uint64, bpf.ShortcutFlow](d.objects.Maps[bpf.ShortcutMapFlows])
	if err != nil {
		return nil, fmt.Errorf("read the flows map: %w", err)
	}
	boot := time.Now().Add(-monotonic())
	flows := make([]Flow, 0, len(records))
	for id, p := range records {
		flows = append(flows, Flow{
			ID:          id,
			ServerID:    p.Cookie[server],
			ClientNetns: p.Netns[client],
			ServerNetns: p.Netns[server],
			Client:      address(p.ClientAddr, p.ClientPort),
			OrigDst:     address(p.OrigDstAddr, p.OrigDstPort),
			Server:      address(p.ServerAddr, p.ServerPort),
			Joined:      p.State&uint64(bpf.ShortcutFlowStateFLOW_SERVER_JOINED) != 0,
			Since:       boot.Add(time.Duration(p.SinceNs)),
			Unsupported: reasons(p.Unsupported[client] | p.Unsupported[server]),
			ToServer:    direction(&p, client),
			ToClient:    direction(&p, server),
		})
	}
	return flows, nil
}

// The sides of a flow.
const (
	client = 0
	server = 1
)

// direction describes what the socket of side from sends.
func direction(p *bpf.ShortcutFlow, from int) Direction {
	s, r := p.Side[from].Sending, p.Side[1-from].Receiving
	dir := Direction{
		Shortcut:      s.Shortcut != 0,
		Verdict:       rule.Verdict(s.Verdict),
		PolicyReason:  s.PolicyReason,
		ReadFlags:     r.UnsupportedFlags,
		Unsupported:   r.State&bpf.ShortcutReadStateREAD_UNSUPPORTED != 0,
		ShortcutBytes: s.ShortcutBytes,
		TCPBytes:      s.TcpBytes,
		Switches:      s.Switches,
	}
	evicted := bpf.ShortcutFlowStateFLOW_CLIENT_EVICTED
	if from == server {
		evicted = bpf.ShortcutFlowStateFLOW_SERVER_EVICTED
	}
	if p.State&uint64(evicted) != 0 {
		dir.Evicted, dir.Shortcut = true, false
		dir.Reason = outcomes()[bpf.ShortcutOutcomeOUTCOME_EVICTED].code
	} else if s.Reason != bpf.ShortcutOutcomeOUTCOME_SHORTCUT {
		dir.Reason = outcomes()[s.Reason].code
	}
	if !dir.Shortcut {
		dir.TCPBytes += uint64(s.LastSize) // write_seq counts it with the next message
	}
	read := r.ReadBytes + uint64(s.Missed)
	// A read may be seen before the count of what it read is.
	if sent := dir.ShortcutBytes + dir.TCPBytes; sent > read {
		dir.Unread = sent - read
	}
	// Redirected bytes are read before all TCP bytes that were sent after them.
	dir.Redirected = unread(p, 1-from)
	return dir
}

// address converts from v4-mapped words in network byte order.
func address(words [4]uint32, port uint16) netip.AddrPort {
	var b [16]byte
	for i, w := range words {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), port)
}

// monotonic returns the clock of bpf_ktime_get_ns.
func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0 // the clock exists on every Linux
	}
	return time.Duration(ts.Nano())
}

// Maps returns how full the sized maps are. Nobody waits while it counts.
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

// countMaps counts the entries of maps; those of the policy map are known if they are
// not below 0.
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

// Sweep deletes what handshakes older than age have left that never ended, and
// what is remembered of pods that do not take part any more. It ends the flows
// whose sockets are gone although the programs were not told, as when another
// program on the cgroup has switched their callbacks off. Guards go when the last
// flow has ended. Nobody waits while it reads the maps that connections fill.
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

// cloneMaps returns handles of maps that may be read without the lock, or nil
// once the removal has begun.
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

// batch is how many entries are read with one system call. It must not be
// smaller than the fullest bucket of a hash.
const batch = 1024

// entries reads a whole map. Entries that come or go meanwhile may be missed.
func entries[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	all := map[K]V{}
	return all, eachBatch(m, func(keys []K, values []V) {
		for i, key := range keys {
			all[key] = values[i]
		}
	})
}

// count is the number of entries of a map, as far as entries would see them.
func count[K, V any](m *ebpf.Map) (n int, err error) {
	err = eachBatch(m, func(keys []K, _ []V) { n += len(keys) })
	return n, err
}

// eachBatch calls visit with all entries; the slices are used again.
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

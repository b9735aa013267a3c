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
	if d.unloaded || d.objects.Maps[bpf.ShortcutMapPairs] == nil {
		return nil, nil
	}
	pairs, err := entries[uint64, bpf.ShortcutPair](d.objects.Maps[bpf.ShortcutMapPairs])
	if err != nil {
		return nil, fmt.Errorf("read the pairs map: %w", err)
	}
	boot := time.Now().Add(-monotonic())
	flows := make([]Flow, 0, len(pairs))
	for id, p := range pairs {
		flows = append(flows, Flow{
			ID:          id,
			ServerID:    p.Cookie[server],
			ClientNetns: p.Netns[client],
			ServerNetns: p.Netns[server],
			Client:      address(p.ClientAddr, p.ClientPort),
			Dialled:     address(p.DialledAddr, p.DialledPort),
			Server:      address(p.ServerAddr, p.ServerPort),
			Joined:      p.State&uint64(bpf.ShortcutPairStatePAIR_SERVER_JOINED) != 0,
			Since:       boot.Add(time.Duration(p.SinceNs)),
			Misfits:     reasons(p.Misfit[client] | p.Misfit[server]),
			ToServer:    direction(&p, client),
			ToClient:    direction(&p, server),
		})
	}
	return flows, nil
}

// The sides of a pair.
const (
	client = 0
	server = 1
)

// direction describes what the socket of side from sends.
func direction(p *bpf.ShortcutPair, from int) Direction {
	s, r := p.Side[from].Sending, p.Side[1-from].Receiving
	dir := Direction{
		Shortcut:      s.Shortcut != 0,
		Verdict:       Verdict(s.Verdict),
		PolicyReason:  s.PolicyReason,
		ReadFlags:     r.UnservedFlags,
		Unserved:      r.State&bpf.ShortcutReadStateREAD_UNSERVED != 0,
		ShortcutBytes: s.ShortcutBytes,
		TCPBytes:      s.TcpBytes,
		Switches:      s.Switches,
	}
	left := bpf.ShortcutPairStatePAIR_CLIENT_LEFT
	if from == server {
		left = bpf.ShortcutPairStatePAIR_SERVER_LEFT
	}
	if p.State&uint64(left) != 0 {
		dir.Left, dir.Shortcut = true, false
		dir.Reason = outcomes()[bpf.ShortcutOutcomeOUTCOME_LEFT].text
	} else if s.Reason != bpf.ShortcutOutcomeOUTCOME_SHORTCUT {
		dir.Reason = outcomes()[s.Reason].text
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

// Maps returns how full the sized maps are.
func (d *Datapath) Maps() ([]api.MapUsage, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	var usage []api.MapUsage
	for _, name := range []string{
		bpf.ShortcutMapPods, bpf.ShortcutMapPolicies, bpf.ShortcutMapPairs,
		bpf.ShortcutMapSockets, bpf.ShortcutMapHints, bpf.ShortcutMapHandshakes, bpf.ShortcutMapLearned,
	} {
		m := d.objects.Maps[name]
		n, err := size(m)
		if err != nil {
			return nil, fmt.Errorf("count map %s: %w", name, err)
		}
		usage = append(usage, api.MapUsage{Name: name, Entries: n, Max: int(m.MaxEntries())})
	}
	return usage, nil
}

// Sweep deletes what handshakes older than age have left that never ended, and
// what is remembered of pods that do not take part any more. It ends the flows
// whose sockets are gone although the programs were not told, as when another
// program on the cgroup has switched their callbacks off. Guards go when the last
// flow has ended.
func (d *Datapath) Sweep(age time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil
	}
	limit := uint64(max(0, monotonic()-age))
	return errors.Join(
		sweep(d.objects.Maps[bpf.ShortcutMapHints], func(_ bpf.ShortcutClientKey, h bpf.ShortcutHint) bool { return h.WrittenNs < limit }),
		sweep(d.objects.Maps[bpf.ShortcutMapHandshakes], func(_ bpf.ShortcutHandshakeKey, h bpf.ShortcutHandshake) bool { return h.WrittenNs < limit }),
		d.sweepPairs(limit),
		d.forgetReleased(),
		d.settleShares(),
		d.updateGuards(),
	)
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
	var (
		all    = map[K]V{}
		keys   = make([]K, batch)
		values = make([]V, batch)
		cursor ebpf.MapBatchCursor
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, err
		}
		for i, key := range keys[:n] {
			all[key] = values[i]
		}
		if err != nil {
			return all, nil
		}
	}
}

// size counts the entries of a map of any kind, also one whose values cannot be read.
func size(m *ebpf.Map) (int, error) {
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

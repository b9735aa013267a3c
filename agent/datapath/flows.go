// SPDX-License-Identifier: Apache-2.0

// The flows map, for people.

package datapath

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
)

// Flows returns the paired connections, in no order; none after an unload. It reads
// the live map, so the numbers of one flow may be of slightly different moments.
func (d *Datapath) Flows() ([]Flow, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flows()
}

func (d *Datapath) flows() ([]Flow, error) {
	if d.removing || d.objects.Maps[bpf.ShortcutMapFlows] == nil {
		return nil, nil
	}
	if d.other {
		return flowsOf(d.objects.Maps[bpf.ShortcutMapFlows])
	}
	var flows []Flow
	boot := time.Now().Add(-monotonic())
	add := func(id uint64, p *bpf.ShortcutFlow) {
		if p.Watched != 0 && p.State&uint64(bpf.ShortcutFlowStateFLOW_SERVER_JOINED) == 0 {
			return // not paired yet
		}
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
			ToServer:    direction(p, client),
			ToClient:    direction(p, server),
		})
	}
	err := eachBatch(d.objects.Maps[bpf.ShortcutMapFlows], func(ids []uint64, records []bpf.ShortcutFlow) {
		for i, id := range ids {
			add(id, &records[i])
		}
	})
	if err != nil {
		return nil, fmt.Errorf("read the flows map: %w", err)
	}
	return flows, nil
}

// The sides of a flow.
const (
	client = bpf.ShortcutSideIndexSIDE_CLIENT
	server = bpf.ShortcutSideIndexSIDE_SERVER
)

// direction describes the direction that the socket of side from sends in.
func direction(p *bpf.ShortcutFlow, from bpf.ShortcutSideIndex) Direction {
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
		dir.Reason = outcomes()[whyEvicted(p)].code
	} else if s.Reason != bpf.ShortcutOutcomeOUTCOME_SHORTCUT {
		dir.Reason = outcomes()[s.Reason].code
	}
	if !dir.Shortcut {
		dir.TCPBytes += uint64(s.LastSize) // write_seq counts it with the next message
	}
	read := r.ReadBytes + uint64(s.Missed)
	// A read may be counted before the bytes that it read are.
	if sent := dir.ShortcutBytes + dir.TCPBytes; sent > read {
		dir.Unread = sent - read
	}
	// Redirected bytes are read before all TCP bytes that were sent after them.
	dir.Redirected = unread(p, 1-from)
	return dir
}

// hasLeft reports whether a flow has left, or is about to.
func hasLeft(p *bpf.ShortcutFlow) bool {
	return p.Side[client].Sending.Leaves != 0 || p.Side[server].Sending.Leaves != 0
}

// whyEvicted returns why messages of a flow go by TCP from which a socket was evicted.
func whyEvicted(p *bpf.ShortcutFlow) bpf.ShortcutOutcome {
	leaves := cmp.Or(p.Side[client].Sending.Leaves, p.Side[server].Sending.Leaves)
	return cmp.Or(bpf.ShortcutOutcome(leaves), bpf.ShortcutOutcomeOUTCOME_EVICTED)
}

// address converts v4-mapped words in network byte order; port is in host byte
// order.
func address(words [4]uint32, port uint16) netip.AddrPort {
	var b [16]byte
	for i, w := range words {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), port)
}

// monotonic reads CLOCK_MONOTONIC, the clock of bpf_ktime_get_ns.
func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0 // the clock exists on every Linux
	}
	return time.Duration(ts.Nano())
}

// SPDX-License-Identifier: Apache-2.0

// What was learned of server ports, and forgetting it.

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/bpf"
)

// UnsupportedPort is a server port to which new connections are not paired, because an
// earlier one has used a call or option that does not work on the shortcut.
type UnsupportedPort struct {
	Netns uint64 // cookie of the server's network namespace
	// Client is 0 if the server's side made the call: then nobody's connections are
	// paired. Otherwise it is the netns cookie of the client that did, whose own
	// connections alone are not paired.
	Client uint64
	Port   uint16
	// Reasons has codes: "splice", for example.
	Reasons []string
	Since   time.Time
}

// UnsupportedBlocking is the code of a socket in blocking mode. It does not count between
// pods that accept such sockets.
const UnsupportedBlocking = "blocking"

// unsupportedCodes names the bits of enum unsupported, from the lowest on.
func unsupportedCodes() [bpf.ShortcutUnsupportedUNSUPPORTED_MAX]string {
	return [...]string{
		"msg_waitall", "msg_oob", "recv_flags", "so_rcvlowat", "fionread", "splice", "tcp_ulp", "so_zerocopy", "mptcp_listener", UnsupportedBlocking, "tcp_options",
	}
}

// UnsupportedReasons returns all codes of UnsupportedPort.Reasons.
func UnsupportedReasons() []string {
	codes := unsupportedCodes()
	return codes[:]
}

func reasons(bits uint32) []string {
	var codes []string
	for i, code := range unsupportedCodes() {
		if bits&(1<<i) != 0 {
			codes = append(codes, code)
		}
	}
	return codes
}

// UnsupportedPorts returns all unsupported ports, sorted by netns and port; none
// after an unload.
func (d *Datapath) UnsupportedPorts() ([]UnsupportedPort, error) {
	all, err := d.learned()
	if err != nil {
		return nil, err
	}
	boot := time.Now().Add(-monotonic())
	unsupported := make([]UnsupportedPort, 0, len(all))
	for key, value := range all {
		if value.Reasons == 0 {
			continue
		}
		unsupported = append(unsupported, UnsupportedPort{
			Netns: key.Server, Client: key.Client, Port: uint16(key.Port),
			Reasons: reasons(value.Reasons), Since: boot.Add(time.Duration(value.SinceNs)),
		})
	}
	slices.SortFunc(unsupported, func(a, b UnsupportedPort) int {
		return cmp.Or(cmp.Compare(a.Netns, b.Netns), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Client, b.Client))
	})
	return unsupported, nil
}

// JoinPort is a server port whose connections join sooner or later than those of others: at
// their handshake, as an earlier one has lived, and the shortcut has paid for it; or later, as
// earlier ones have ended too soon for that.
type JoinPort struct {
	Netns     uint64 // cookie of the server's network namespace
	Port      uint16
	JoinAfter uint32 // as in Config
}

// JoinPorts returns all such ports, sorted; none after an unload.
func (d *Datapath) JoinPorts() ([]JoinPort, error) {
	all, err := d.learned()
	if err != nil {
		return nil, err
	}
	var ports []JoinPort
	now := uint64(monotonic())
	for key, value := range all {
		after := value.JoinAfter >> ((now - min(now, value.JoinNs)) / uint64(d.cfg.joinHalves))
		p := JoinPort{Netns: key.Server, Port: uint16(key.Port), JoinAfter: max(d.cfg.JoinAfter, after)}
		if value.Early != 0 {
			p.JoinAfter = 0
		}
		if p.JoinAfter != d.cfg.JoinAfter {
			ports = append(ports, p)
		}
	}
	slices.SortFunc(ports, func(a, b JoinPort) int { return cmp.Or(cmp.Compare(a.Netns, b.Netns), cmp.Compare(a.Port, b.Port)) })
	return ports, nil
}

// learned returns the map of what is learned; nothing after an unload.
func (d *Datapath) learned() (map[bpf.ShortcutLearnedKey]bpf.ShortcutLearnedValue, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	return readLearned(d.objects.Maps[bpf.ShortcutMapLearned])
}

func readLearned(m *ebpf.Map) (map[bpf.ShortcutLearnedKey]bpf.ShortcutLearnedValue, error) {
	all, err := entries[bpf.ShortcutLearnedKey, bpf.ShortcutLearnedValue](m)
	if err != nil {
		return nil, fmt.Errorf("read the map of what is learned: %w", err)
	}
	return all, nil
}

// Forget deletes what was learned of the server ports for which forget returns true, and
// returns how many of these entries were marked unsupported, or had another JoinAfter. New
// connections to the ports may be paired again, join as to other ports, and their receivers
// begin a new trial. server and client are netns cookies, client is 0 in the entry of the server itself,
// and port is in host byte order. It returns ErrUnloaded after an unload.
func (d *Datapath) Forget(forget func(server, client uint64, port uint16) bool) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return 0, ErrUnloaded
	}
	all, err := readLearned(d.objects.Maps[bpf.ShortcutMapLearned])
	if err != nil {
		return 0, err
	}
	return d.forget(all, forget)
}

// forget deletes the chosen entries from the map and from all.
func (d *Datapath) forget(all map[bpf.ShortcutLearnedKey]bpf.ShortcutLearnedValue, forget func(server, client uint64, port uint16) bool) (int, error) {
	forgotten := 0
	for key, value := range all {
		if !forget(key.Server, key.Client, uint16(key.Port)) {
			continue
		}
		err := d.objects.Maps[bpf.ShortcutMapLearned].Delete(key)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return forgotten, fmt.Errorf("delete from the map of what is learned: %w", err)
		}
		delete(all, key)
		if value.Reasons != 0 || value.Early != 0 || value.JoinAfter != 0 {
			forgotten++
		}
	}
	return forgotten, nil
}

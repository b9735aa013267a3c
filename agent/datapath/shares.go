// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/bpf"
)

// sweepPairs ends flows that are older than limit (CLOCK_MONOTONIC) and none of
// whose sockets is in the SOCKHASH, although none has left it. The kernel takes a
// socket out when it is closed; that the program is not told means that another one
// on the cgroup has switched its callbacks off.
func (d *Datapath) sweepPairs(limit uint64) error {
	pairs, err := entries[uint64, bpf.ShortcutPair](d.objects.Maps[bpf.ShortcutMapPairs])
	if err != nil {
		return fmt.Errorf("read the pairs map: %w", err)
	}
	const left = uint64(bpf.ShortcutPairStatePAIR_CLIENT_LEFT | bpf.ShortcutPairStatePAIR_SERVER_LEFT)
	for id, p := range pairs {
		if p.SinceNs >= limit || p.State&left != 0 {
			continue
		}
		there, err := d.anySocket(p.Cookie)
		if err != nil {
			return err
		}
		if there {
			continue
		}
		_, err = d.objects.Programs[bpf.ShortcutProgEndFlow].Run(&ebpf.RunOptions{Context: bpf.ShortcutFlowId{Id: id}})
		if err != nil {
			return fmt.Errorf("end a flow whose sockets are gone: %w", err)
		}
	}
	return nil
}

// anySocket tells whether one of the cookies is that of a socket in the SOCKHASH.
func (d *Datapath) anySocket(cookies [2]uint64) (bool, error) {
	for _, cookie := range cookies {
		var value uint64
		err := d.objects.Maps[bpf.ShortcutMapSockets].Lookup(cookie, &value)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, fmt.Errorf("look for a socket: %w", err)
		}
	}
	return false, nil
}

// settleShares makes what pods are said to have of the maps what they have, once
// two sweeps have found the same difference: the maps go on changing meanwhile.
// Pods that have gone and have nothing left are deleted.
func (d *Datapath) settleShares() error {
	shares, err := entries[uint64, bpf.ShortcutShare](d.objects.Maps[bpf.ShortcutMapShares])
	if err != nil {
		return fmt.Errorf("read the shares map: %w", err)
	}
	has, err := d.countShares()
	if err != nil {
		return err
	}
	pods, err := entries[uint64, uint32](d.objects.Maps[bpf.ShortcutMapPods])
	if err != nil {
		return fmt.Errorf("read the pods map: %w", err)
	}
	var errs []error
	drift := map[uint64]bpf.ShortcutShare{}
	for netns, said := range shares {
		off := bpf.ShortcutShare{Flows: said.Flows - has[netns].Flows, Learned: said.Learned - has[netns].Learned}
		_, enrolled := pods[netns]
		switch none := (bpf.ShortcutShare{}); {
		case !enrolled && has[netns] == none:
			errs = append(errs, drop(d.objects.Maps[bpf.ShortcutMapShares], netns), drop(d.objects.Maps[bpf.ShortcutMapCharges], netns))
		case off == none:
		case off == d.drift[netns]:
			errs = append(errs, d.objects.Maps[bpf.ShortcutMapShares].Put(netns, has[netns]))
		default:
			drift[netns] = off
		}
	}
	d.drift = drift
	return errors.Join(errs...)
}

// countShares counts what pods have of the maps.
func (d *Datapath) countShares() (map[uint64]bpf.ShortcutShare, error) {
	pairs, err := entries[uint64, bpf.ShortcutPair](d.objects.Maps[bpf.ShortcutMapPairs])
	if err != nil {
		return nil, fmt.Errorf("read the pairs map: %w", err)
	}
	learned, err := d.learned()
	if err != nil {
		return nil, err
	}
	has := map[uint64]bpf.ShortcutShare{}
	add := func(netns uint64, flows, learned uint32) {
		share := has[netns]
		has[netns] = bpf.ShortcutShare{Flows: share.Flows + flows, Learned: share.Learned + learned}
	}
	for _, p := range pairs {
		add(p.Netns[client], 1, 0)
		if p.Netns[server] != p.Netns[client] {
			add(p.Netns[server], 1, 0)
		}
	}
	for key := range learned {
		if key.Client != 0 {
			add(key.Client, 0, 1)
		} else {
			add(key.Server, 0, 1)
		}
	}
	return has, nil
}

func drop(m *ebpf.Map, key uint64) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete what a pod that has gone had: %w", err)
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

// What each pod has of the maps that connections fill, counted anew.

package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/bpf"
)

// contents holds what a sweep has found in the maps that connections fill.
type contents struct {
	ended   []uint64     // flows to be ended
	flows   []podCookies // of all others
	learned map[bpf.ShortcutLearnedKey]bpf.ShortcutLearnedValue
}

type podCookies [2]uint64

// findContents reads the maps. It ends flows that are older than limit
// (CLOCK_MONOTONIC) and have no socket in the SOCKHASH, although none was evicted:
// the kernel has taken the sockets out when they were closed, and track was not
// called, because another program on the cgroup has switched its callbacks off.
func findContents(table map[string]*ebpf.Map, limit uint64) (found contents, err error) {
	const evicted = uint64(bpf.ShortcutFlowStateFLOW_CLIENT_EVICTED | bpf.ShortcutFlowStateFLOW_SERVER_EVICTED)
	type suspect struct {
		id            uint64
		cookies, pods [2]uint64
	}
	var suspects []suspect
	err = eachBatch(table[bpf.ShortcutMapFlows], func(ids []uint64, flows []bpf.ShortcutFlow) {
		for i, p := range flows {
			if p.SinceNs < limit && p.State&evicted == 0 {
				suspects = append(suspects, suspect{ids[i], p.Cookie, p.Netns})
			} else {
				found.flows = append(found.flows, p.Netns)
			}
		}
	})
	if err != nil {
		return contents{}, fmt.Errorf("read the flows map: %w", err)
	}
	for _, s := range suspects {
		there, err := anySocket(table[bpf.ShortcutMapSockets], s.cookies)
		if err != nil {
			return contents{}, err
		}
		if there {
			found.flows = append(found.flows, s.pods)
		} else {
			found.ended = append(found.ended, s.id)
		}
	}
	found.learned, err = readLearned(table[bpf.ShortcutMapLearned])
	return found, err
}

// anySocket reports whether a socket with one of the cookies is in the SOCKHASH. It
// asks for each, as the kernel has no batches for a SOCKHASH.
func anySocket(sockets *ebpf.Map, cookies [2]uint64) (bool, error) {
	for _, cookie := range cookies {
		var value uint64
		err := sockets.Lookup(cookie, &value)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, fmt.Errorf("look for a socket: %w", err)
		}
	}
	return false, nil
}

func (d *Datapath) endFlows(ids []uint64) error {
	for _, id := range ids {
		_, err := d.objects.Programs[bpf.ShortcutProgEndFlow].Run(&ebpf.RunOptions{Context: bpf.ShortcutFlowId{Id: id}})
		if err != nil {
			return fmt.Errorf("end a flow whose sockets are gone: %w", err)
		}
	}
	return nil
}

// settle deletes what was learned of pods that no longer take part, and the shares
// and charges of those that have nothing left. It corrects the shares of pods once
// two sweeps in a row have found the same difference: a single one may come from
// maps that change while they are read.
func (d *Datapath) settle(found contents) error {
	pods, err := entries[uint64, uint32](d.objects.Maps[bpf.ShortcutMapPods])
	if err != nil {
		return fmt.Errorf("read the pods map: %w", err)
	}
	_, err = d.forget(found.learned, func(server, client uint64, _ uint16) bool {
		_, serverIn := pods[server]
		_, clientIn := pods[client]
		return !serverIn || client != 0 && !clientIn
	})
	if err != nil {
		return err
	}
	shares, err := entries[uint64, bpf.ShortcutShare](d.objects.Maps[bpf.ShortcutMapShares])
	if err != nil {
		return fmt.Errorf("read the shares map: %w", err)
	}
	has := found.shares()
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

// shares counts the entries that each pod has in the maps.
func (c contents) shares() map[uint64]bpf.ShortcutShare {
	has := map[uint64]bpf.ShortcutShare{}
	add := func(netns uint64, flows, learned uint32) {
		share := has[netns]
		has[netns] = bpf.ShortcutShare{Flows: share.Flows + flows, Learned: share.Learned + learned}
	}
	for _, pods := range c.flows {
		add(pods[client], 1, 0)
		if pods[server] != pods[client] {
			add(pods[server], 1, 0)
		}
	}
	for key := range c.learned {
		if key.Client != 0 {
			add(key.Client, 0, 1)
		} else {
			add(key.Server, 0, 1)
		}
	}
	return has
}

func drop(m *ebpf.Map, key uint64) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete what is gone: %w", err)
	}
	return nil
}

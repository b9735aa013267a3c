// SPDX-License-Identifier: Apache-2.0

// The rounds in which sockets join, or are evicted: each is a run of join_sockets in the
// network namespaces of their pods.

package datapath

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/bpf"
)

// A socket that is not ready to join is asked again after joinPause, which doubles each
// time. After joinRounds, some 1.3 s later, it stays on TCP. The kernel needs joinPause,
// too: a thread that was between two instructions of a recv has gone on.
const (
	joinPause  = 5 * time.Millisecond
	joinRounds = 9
)

// joinAll lets connections join, and returns how many have not. Those that are not ready
// after joinRounds, or when ctx ends, stay as they were.
func (j *joiner) joinAll(ctx context.Context, found []bpf.ShortcutJoinEntry, pods map[uint64]Netns) (left int, err error) {
	before, err := j.counter(bpf.ShortcutOutcomeOUTCOME_JOINED)
	if err != nil {
		return len(found), err
	}
	table := j.objects.Maps[bpf.ShortcutMapJoining]
	for _, e := range found {
		for side, cookie := range e.Cookie {
			e.Side = uint8(side)
			if err := table.Put(cookie, e); err != nil {
				return len(found), errors.Join(fmt.Errorf("write map %s: %w", bpf.ShortcutMapJoining, err), j.giveUp(pods))
			}
		}
	}
	for round := range joinRounds {
		if j.killed != nil {
			if err := j.killed(); err != nil {
				return len(found), err
			}
		}
		waiting, roundErr := j.round(pods)
		err = errors.Join(err, roundErr)
		if roundErr != nil || waiting == 0 || round == joinRounds-1 || sleep(ctx, joinPause<<round) != nil {
			break
		}
	}
	err = errors.Join(err, j.giveUp(pods))
	after, countErr := j.counter(bpf.ShortcutOutcomeOUTCOME_JOINED)
	return len(found) - int(after-before), errors.Join(err, countErr)
}

func (j *joiner) counter(outcome bpf.ShortcutOutcome) (uint64, error) {
	sum, err := readCount(j.objects.Maps[bpf.ShortcutMapOutcomes], outcome)
	return sum.Number, err
}

// round lets each socket that is to join do its next step, and returns how many are
// left then.
func (j *joiner) round(pods map[uint64]Netns) (waiting int, err error) {
	table := j.objects.Maps[bpf.ShortcutMapJoining]
	before, err := entries[uint64, bpf.ShortcutJoinEntry](table)
	if err != nil {
		return 0, fmt.Errorf("read map %s: %w", bpf.ShortcutMapJoining, err)
	}
	// Pods with clients first: a server's socket waits for the flow, which its client makes.
	var order []uint64
	for side := range uint8(2) {
		for _, e := range before {
			if of := e.Netns[side]; e.Side == side && !slices.Contains(order, of) {
				order = append(order, of)
			}
		}
	}
	var errs []error
	for _, cookie := range order {
		if _, err := iterate(j.join, pods[cookie].Path); err != nil {
			errs = append(errs, err)
		}
	}
	after, err := entries[uint64, bpf.ShortcutJoinEntry](table)
	if err = errors.Join(append(errs, err)...); err != nil {
		return 0, err
	}
	for cookie, e := range after {
		if e.Visits != before[cookie].Visits {
			continue
		}
		// The socket has been closed. Its peer follows if it has begun, see leave.
		gone := []uint64{cookie}
		if peer := e.Cookie[1-e.Side]; after[peer].Step == uint8(bpf.ShortcutJoinStepJOIN_START) {
			gone = append(gone, peer)
		}
		for _, cookie := range gone {
			if err := drop(table, cookie); err != nil {
				return 0, err
			}
			delete(after, cookie)
		}
	}
	return len(after), nil
}

// giveUp undoes what has not joined.
func (j *joiner) giveUp(pods map[uint64]Netns) error {
	table := j.objects.Maps[bpf.ShortcutMapJoining]
	all, err := entries[uint64, bpf.ShortcutJoinEntry](table)
	if err != nil || len(all) == 0 {
		return err
	}
	for cookie, e := range all {
		if e.Step == uint8(bpf.ShortcutJoinStepJOIN_START) { // nothing to undo
			if err := drop(table, cookie); err != nil {
				return err
			}
			continue
		}
		e.Step = uint8(bpf.ShortcutJoinStepJOIN_GIVE_UP)
		// It is gone if it has been closed or has joined since.
		if err := table.Update(cookie, e, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write map %s: %w", bpf.ShortcutMapJoining, err)
		}
	}
	for range 2 { // once for each side
		if _, err = j.round(pods); err != nil {
			break
		}
	}
	return err
}

// EvictLate evicts the sockets that have joined late and do not suit any more, on a kernel
// where they get no callbacks: Linux evicts all others when an acknowledgement comes. Call
// it every second; it costs a system call if there is nothing to do. pods returns all pods
// that take part. Sockets with unread bytes are evicted in a later call.
func (d *Datapath) EvictLate(pods func() []Netns) error {
	j := d.getJoiner()
	if j == nil || !d.noCallbacks {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ended {
		return nil
	}
	due, err := j.counter(bpf.ShortcutOutcomeOUTCOME_EVICT_DUE)
	if err != nil || due == j.evicted {
		return err
	}
	found, err := toEvict(d.objects.Maps[bpf.ShortcutMapFlows])
	if err != nil {
		return err
	}
	known := map[uint64]Netns{}
	for _, p := range pods() {
		known[p.Cookie] = p
	}
	left, err := j.evictAll(found, known)
	if err == nil && left == 0 {
		j.evicted = due
	}
	return err
}

// toEvict returns the sockets of flows that are to be evicted.
func toEvict(flows *ebpf.Map) (found []bpf.ShortcutJoinEntry, err error) {
	all, err := entries[uint64, bpf.ShortcutFlow](flows)
	if err != nil {
		return nil, fmt.Errorf("read the flows map: %w", err)
	}
	evicted := [2]uint64{client: uint64(bpf.ShortcutFlowStateFLOW_CLIENT_EVICTED), server: uint64(bpf.ShortcutFlowStateFLOW_SERVER_EVICTED)}
	for id, p := range all {
		for side := range p.Side {
			if p.State&evicted[side] != 0 || p.Side[side].Sending.Evict == 0 && p.Side[1-side].Sending.EvictPeer == 0 && !hasLeft(&p) {
				continue
			}
			found = append(found, bpf.ShortcutJoinEntry{
				Flow: id, Cookie: p.Cookie, Netns: p.Netns, Side: uint8(side), Step: uint8(bpf.ShortcutJoinStepJOIN_EVICT),
			})
		}
	}
	return found, nil
}

// evictAll evicts sockets, and returns how many have unread bytes or are in pods that are
// not known.
func (j *joiner) evictAll(found []bpf.ShortcutJoinEntry, pods map[uint64]Netns) (left int, err error) {
	table := j.objects.Maps[bpf.ShortcutMapJoining]
	for _, e := range found {
		if _, known := pods[e.Netns[e.Side]]; !known {
			left++
			continue
		}
		if err := table.Put(e.Cookie[e.Side], e); err != nil {
			return 0, fmt.Errorf("write map %s: %w", bpf.ShortcutMapJoining, err)
		}
	}
	waiting, err := j.round(pods)
	for _, e := range found {
		err = errors.Join(err, drop(table, e.Cookie[e.Side]))
	}
	return left + waiting, err
}

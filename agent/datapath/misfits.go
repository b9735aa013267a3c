// SPDX-License-Identifier: Apache-2.0

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

// Misfit is a server port of a pod whose new connections are not paired, because
// one of them used what the kernel does not serve on a shortcut socket.
type Misfit struct {
	Netns   uint64 // cookie of the server's
	Port    uint16
	Reasons []string
	Since   time.Time
}

// reasonTexts names the bits of enum misfit_reason, from the lowest on.
func reasonTexts() [bpf.ShortcutMisfitReasonMISFIT_REASONS]string {
	return [...]string{
		"MSG_WAITALL", "MSG_OOB", "other flags of recv", "SO_RCVLOWAT", "FIONREAD", "splice", "TCP_ULP", "SO_ZEROCOPY", "MPTCP listener",
	}
}

func reasons(bits uint32) []string {
	var names []string
	for i, text := range reasonTexts() {
		if bits&(1<<i) != 0 {
			names = append(names, text)
		}
	}
	return names
}

// Misfits returns what is remembered, by netns and port.
func (d *Datapath) Misfits() ([]Misfit, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	all, err := entries[bpf.ShortcutMisfitKey, bpf.ShortcutMisfit](d.objects.Maps[bpf.ShortcutMapMisfits])
	if err != nil {
		return nil, fmt.Errorf("read the misfits map: %w", err)
	}
	boot := time.Now().Add(-monotonic())
	misfits := make([]Misfit, 0, len(all))
	for key, value := range all {
		misfits = append(misfits, Misfit{
			Netns: key.Netns, Port: uint16(key.Port),
			Reasons: reasons(value.Reasons), Since: boot.Add(time.Duration(value.SinceNs)),
		})
	}
	slices.SortFunc(misfits, func(a, b Misfit) int {
		return cmp.Or(cmp.Compare(a.Netns, b.Netns), cmp.Compare(a.Port, b.Port))
	})
	return misfits, nil
}

// Forget deletes what forget says yes to, and returns how many that were: new
// connections to these ports are paired again.
func (d *Datapath) Forget(forget func(netns uint64, port uint16) bool) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return 0, ErrUnloaded
	}
	return d.forget(forget)
}

func (d *Datapath) forget(forget func(netns uint64, port uint16) bool) (int, error) {
	table := d.objects.Maps[bpf.ShortcutMapMisfits]
	all, err := entries[bpf.ShortcutMisfitKey, bpf.ShortcutMisfit](table)
	if err != nil {
		return 0, fmt.Errorf("read the misfits map: %w", err)
	}
	forgotten := 0
	for key := range all {
		if !forget(key.Netns, uint16(key.Port)) {
			continue
		}
		err := table.Delete(key)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return forgotten, fmt.Errorf("delete from the misfits map: %w", err)
		}
		forgotten++
	}
	return forgotten, nil
}

// forgetReleased deletes what is remembered of pods that do not take part any more.
func (d *Datapath) forgetReleased() error {
	pods, err := entries[uint64, uint32](d.objects.Maps[bpf.ShortcutMapPods])
	if err != nil {
		return fmt.Errorf("read the pods map: %w", err)
	}
	_, err = d.forget(func(netns uint64, _ uint16) bool {
		_, enrolled := pods[netns]
		return !enrolled
	})
	return err
}

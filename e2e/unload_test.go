// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// attached counts the sock_ops programs on the sandbox's cgroup.
func (n *node) attached(t testing.TB) int {
	t.Helper()
	cgroup, err := os.Open(n.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	programs, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: ebpf.AttachCGroupSockOps})
	if err != nil {
		t.Fatal(err)
	}
	return len(programs.Programs)
}

// objects are ids in the kernel.
type objects struct {
	maps     []ebpf.MapID
	programs []ebpf.ProgramID
}

// mustObjects returns what the pins hold.
func (n *node) mustObjects(t testing.TB) (pinned objects) {
	t.Helper()
	pins, err := os.ReadDir(n.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		path := filepath.Join(n.PinDir, pin.Name())
		m, mapErr := ebpf.LoadPinnedMap(path, nil)
		if mapErr == nil {
			info, err := m.Info()
			if err = errors.Join(err, m.Close()); err != nil {
				t.Fatal(err)
			}
			id, _ := info.ID()
			pinned.maps = append(pinned.maps, id)
			continue
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			t.Fatal(errors.Join(mapErr, err))
		}
		info, err := l.Info()
		if err = errors.Join(err, l.Close()); err != nil {
			t.Fatal(err)
		}
		pinned.programs = append(pinned.programs, info.Program)
	}
	return pinned
}

// left names those that still exist.
func (o objects) left() (left []string) {
	for _, id := range o.maps {
		if m, err := ebpf.NewMapFromID(id); !errors.Is(err, fs.ErrNotExist) {
			left = append(left, fmt.Sprintf("map %v %v", m, err))
			m.Close()
		}
	}
	for _, id := range o.programs {
		if p, err := ebpf.NewProgramFromID(id); !errors.Is(err, fs.ErrNotExist) {
			left = append(left, fmt.Sprintf("program %v %v", p, err))
			p.Close()
		}
	}
	return left
}

// TestUnloadUnderLoad: everything goes, and no connection notices.
func TestUnloadUnderLoad(t *testing.T) {
	n := mustNode(t)
	n.MustWritePods(t, "client "+on, "web "+on)
	n.mustStart(t)
	s := mustService(t, n)
	l := newLoad(t)
	for i := range 8 {
		l.mustStream(t, s.client, s.streams[i%2])
	}
	l.churn(s.client, s.shorts[:]...)
	n.mustShortcut(t, l.streams...)
	// What an earlier test had attached goes with its bpffs.
	mustBecome(t, "attached programs", 1, func() int { return n.attached(t) })
	pinned := n.mustObjects(t)
	if len(pinned.maps) < 6 || len(pinned.programs) < 2 {
		t.Fatalf("got pins %+v, want six maps and two links or more", pinned)
	}

	text, err := n.Command("unload", n.Places()...)
	if err != nil {
		t.Fatal(err)
	}
	// Of a connection that has just ended at both ends a program may not have closed its socket yet.
	if !strings.HasPrefix(text, "unloaded: nothing of podshunt is left in the kernel") {
		t.Errorf("got %q, want it unloaded", text)
	}
	if _, err := os.Stat(n.PinDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pin directory: got %v, want it gone", err)
	}
	mustBecome(t, "attached programs", 0, func() int { return n.attached(t) })
	mustBecome(t, "objects", nil, pinned.left)
	reason := "podshunt was unloaded: restart the agent to take part again"
	wantDiff(t, "pods", []string{"client: " + reason, "web: " + reason}, n.MustStates(t))
	if status := n.MustStatus(t); !status.Unloaded || len(status.Maps)+len(status.Outcomes) > 0 {
		t.Errorf("got %+v, want it unloaded", status)
	}

	// A restart loads anew; those that were paired before stay on TCP.
	n.MustStop(t)
	n.mustStart(t)
	wantDiff(t, "pods", []string{"client: takes part", "web: takes part"}, n.MustStates(t))
	old := l.streams
	n.mustShortcut(t, l.mustStream(t, s.client, s.streams[0]), l.mustStream(t, s.client, s.streams[1]))
	flows := n.MustFlows(t)
	for _, s := range old {
		if f := s.flow(t, flows); f.Paired {
			t.Errorf("got %+v, want it unpaired", f)
		}
	}
	received := make([]int64, len(l.streams))
	for i, s := range l.streams {
		received[i] = s.toServer.received.Load()
	}
	mustBecome(t, "streams that stand still", nil, func() (still []netip.AddrPort) {
		for i, s := range l.streams {
			if s.toServer.received.Load() == received[i] {
				still = append(still, s.origDst)
			}
		}
		return still
	})
	l.finish(t)
	mustBecome(t, "entries after all sockets are closed", map[string]int{"flows": 0, "sockets": 0, "syns": 0, "pending": 0},
		func() map[string]int { return n.entries(t, "flows", "sockets", "syns", "pending") })
}

// TestUnloadAsksAgent: the agent of the run directory is meant, whatever the pin directory.
func TestUnloadAsksAgent(t *testing.T) {
	n := mustNode(t)
	n.MustWritePods(t, "web "+on)
	n.mustStart(t)
	mustBecome(t, "attached programs", 1, func() int { return n.attached(t) })
	if _, err := n.Command("unload", n.RunDir(), "--pin-dir="+filepath.Join(n.BPF, "other")); err != nil {
		t.Error(err)
	}
	if !n.MustStatus(t).Unloaded {
		t.Error("the agent is not unloaded")
	}
	mustBecome(t, "attached programs", 0, func() int { return n.attached(t) })
}

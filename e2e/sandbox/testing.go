// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// testTimeout is the deadline of connections that tests make.
const testTimeout = 2 * time.Minute

// MustNew is New for a test, which closes the Sandbox at its end. Without root
// the test is skipped, or fails if the environment has REQUIRE_ROOT=1. The plugin
// waits so long that on a busy machine, too, the agent knows a pod that is added.
func MustNew(tb testing.TB, cfg Config) *Sandbox {
	tb.Helper()
	s, err := New(cfg)
	if errors.Is(err, ErrNotRoot) && os.Getenv("REQUIRE_ROOT") != "1" {
		tb.Skip(err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	s.AgentTimeout = 10 * time.Second
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// MustAddPod is AddPod for a test.
func (s *Sandbox) MustAddPod(tb testing.TB, name string, opts PodOptions) *Pod {
	tb.Helper()
	p, err := s.AddPod(name, opts)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// MustListen is Listen for a test, which closes the listener at its end.
func (n *Netns) MustListen(tb testing.TB, network, address string) net.Listener {
	tb.Helper()
	l, err := n.Listen(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return l
}

// MustDial is Dial for a test, which closes the connection at its end. The
// connection has a deadline, testTimeout from now, which the test may change.
func (n *Netns) MustDial(tb testing.TB, network, address string) net.Conn {
	tb.Helper()
	c, err := n.Dial(network, address, testTimeout)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(testTimeout)); err != nil {
		tb.Fatal(err)
	}
	return c
}

// MustMisses returns how often the kernel has not run a program of this machine,
// because it was preempted in it on the same CPU.
func MustMisses(tb testing.TB) (total uint64) {
	tb.Helper()
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return total
		}
		if err != nil {
			tb.Fatal(err)
		}
		id = next
		program, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it is gone
		}
		stats, err := program.Stats()
		if err != nil {
			tb.Error(err)
		} else {
			total += stats.RecursionMisses
		}
		_ = program.Close()
	}
}

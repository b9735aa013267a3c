// SPDX-License-Identifier: Apache-2.0

// Package sandboxtest is what tests use of a sandbox: the same things, which fail
// the test if they cannot be had and are gone at its end, an agent and a datapath.
// Without root a test is skipped, or fails if the environment has REQUIRE_ROOT=1.
package sandboxtest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// Timeout is for what has to happen, on a busy machine, too. Connections have it as
// their deadline, which the test may change.
const Timeout = 2 * time.Minute

// MustNew is sandbox.New. The plugin waits so long that on a busy machine, too, the
// agent knows a pod that is added.
func MustNew(tb testing.TB, cfg sandbox.Config) *sandbox.Sandbox {
	tb.Helper()
	MustBeRoot(tb)
	s, err := sandbox.New(cfg)
	must(tb, err)
	s.AgentTimeout = 10 * time.Second
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// MustBeRoot skips a test without root, or has it fail: see above.
func MustBeRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		tb.Fatal(sandbox.ErrNotRoot)
	}
	tb.Skip(sandbox.ErrNotRoot)
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// podAdder is a sandbox, or has one.
type podAdder interface {
	AddPod(name string, opts sandbox.PodOptions) (*sandbox.Pod, error)
}

// MustAddPod is AddPod of a sandbox.
func MustAddPod(tb testing.TB, s podAdder, name string, opts sandbox.PodOptions) *sandbox.Pod {
	tb.Helper()
	p, err := s.AddPod(name, opts)
	must(tb, err)
	return p
}

// netns is a network namespace or a pod.
type netns interface {
	Listen(network, address string) (net.Listener, error)
	Dial(network, address string, timeout time.Duration) (net.Conn, error)
}

// MustListen is Listen in a pod.
func MustListen(tb testing.TB, n netns, network, address string) net.Listener {
	tb.Helper()
	l, err := n.Listen(network, address)
	must(tb, err)
	tb.Cleanup(func() { l.Close() })
	return l
}

// MustDial is Dial in a pod.
func MustDial(tb testing.TB, n netns, network, address string) net.Conn {
	tb.Helper()
	c, err := n.Dial(network, address, Timeout)
	must(tb, err)
	tb.Cleanup(func() { c.Close() })
	must(tb, c.SetDeadline(time.Now().Add(Timeout)))
	return c
}

// MustConnect dials an address that leads to l, and returns both ends.
func MustConnect(tb testing.TB, from netns, network, address string, l net.Listener) (client, server net.Conn) {
	tb.Helper()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			close(accepted)
			return
		}
		accepted <- c
	}()
	client = MustDial(tb, from, network, address)
	select {
	case server = <-accepted:
	case <-time.After(Timeout):
	}
	if server == nil {
		tb.Fatalf("connection to %s was not accepted", address)
	}
	tb.Cleanup(func() { server.Close() })
	must(tb, server.SetDeadline(time.Now().Add(Timeout)))
	return client, server
}

// MustPing exchanges messages of one size and checks every byte.
func MustPing(tb testing.TB, a, b io.ReadWriter, rounds, size int) {
	tb.Helper()
	message := bytes.Repeat([]byte("podshunt"), size/8+1)[:size]
	answer := make([]byte, size)
	for i := range rounds {
		message[0] = byte(i)
		for _, way := range [][2]io.ReadWriter{{a, b}, {b, a}} {
			if _, err := way[0].Write(message); err != nil {
				tb.Fatalf("round %d: %v", i, err)
			}
			if _, err := io.ReadFull(way[1], answer); err != nil {
				tb.Fatalf("round %d: %v", i, err)
			}
			if !bytes.Equal(answer, message) {
				tb.Fatalf("round %d: bytes differ", i)
			}
		}
	}
}

// WaitFor calls get until ok says yes to what it returns, and returns that.
func WaitFor[T any](tb testing.TB, what string, get func() T, ok func(T) bool) T {
	tb.Helper()
	for deadline := time.Now().Add(Timeout); ; time.Sleep(20 * time.Millisecond) {
		late := time.Now().After(deadline)
		got := get()
		if ok(got) {
			return got
		}
		if late {
			tb.Fatalf("%s: not after %v: %+v", what, Timeout, got)
		}
	}
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
		must(tb, err)
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

// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// What a large node has, and for how long it is left alone. At first the agent looks
// often at the rules in a pod, so that is no part of it.
const (
	scalePods   = 250
	scaleHeld   = 8000 // connections of a process, which may have no more than 20,000 files
	scaleSettle = 2 * time.Minute
	scaleIdle   = time.Minute
)

// BenchmarkNode has what the agent takes on a node with 250 pods in the shortcut: of a
// core while nothing happens, and the time of `flows` with no connection, with 9,000
// and with 50,000.
func BenchmarkNode(b *testing.B) {
	n := mustNode(b)
	var entries []string
	for i := range scalePods {
		entries = append(entries, fmt.Sprintf("pod-%d %s", i, on))
	}
	n.MustWritePods(b, entries...)
	n.mustStart(b, "--max-flows=65536")
	var pods []*sandbox.Pod
	for i := range scalePods {
		pods = append(pods, sandboxtest.MustAddPod(b, n, fmt.Sprintf("pod-%d", i), sandbox.PodOptions{}))
	}
	pid := mustAgentPID(b, n)
	mustBecome(b, "pods that take part", scalePods, func() int { return n.entries(b, "pods")["pods"] })

	b.Run("idle", func(b *testing.B) {
		time.Sleep(scaleSettle)
		before := mustCPUTime(b, pid)
		for b.Loop() {
			time.Sleep(scaleIdle)
		}
		used := mustCPUTime(b, pid) - before
		b.ReportMetric(100*used.Seconds()/(float64(b.N)*scaleIdle.Seconds()), "%core")
	})

	made := 0
	for _, flows := range []int{0, 9000, 50000} {
		for made < flows {
			more := min(flows-made, scaleHeld)
			mustHold(b, pods[0], pods[1], more)
			pods, made = pods[2:], made+more
		}
		b.Run(fmt.Sprintf("flows=%d", flows), func(b *testing.B) {
			before := mustCPUTime(b, pid)
			for b.Loop() {
				if _, err := n.Command("flows", n.RunDir()); err != nil {
					b.Fatal(err)
				}
			}
			used := mustCPUTime(b, pid) - before
			b.ReportMetric(used.Seconds()/float64(b.N), "agent-cpu-s/op")
			if got := len(n.MustFlows(b)); got != flows {
				b.Errorf("got %d flows, want %d", got, flows)
			}
		})
	}
}

// holdEnv makes a process of this binary one of hold.
const holdEnv = "PODSHUNT_HOLD"

// hold makes connections and keeps them until its standard input ends: it accepts them
// for "listen ADDRESS COUNT", and makes them for "dial ADDRESS COUNT". A line on its
// standard output says that it listens, or that all are made.
func hold(task string) error {
	var verb, address string
	var count int
	if _, err := fmt.Sscan(task, &verb, &address, &count); err != nil {
		return err
	}
	var connect func() (net.Conn, error)
	if verb == "listen" {
		config := net.ListenConfig{}
		config.SetMultipathTCP(false)
		l, err := config.Listen(context.Background(), "tcp", address)
		if err != nil {
			return err
		}
		connect = l.Accept
		fmt.Println("listens")
	} else {
		connect = func() (net.Conn, error) { return net.DialTimeout("tcp", address, loadTimeout) }
	}
	held := make([]net.Conn, count)
	for i := range held {
		var err error
		if held[i], err = connect(); err != nil {
			return err
		}
	}
	fmt.Println("done")
	_, err := io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(held)
	return err
}

// mustHold has processes in two pods that hold connections until b ends.
func mustHold(b *testing.B, client, server *sandbox.Pod, count int) {
	b.Helper()
	address := netip.AddrPortFrom(server.IPv4, 8080)
	start := func(p *sandbox.Pod, verb string) *bufio.Scanner {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", holdEnv, verb, address, count))
		cmd.Stderr = b.Output()
		stdin, err := cmd.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Start(cmd); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			stdin.Close()
			if err := cmd.Wait(); err != nil {
				b.Error(err)
			}
		})
		return bufio.NewScanner(stdout)
	}
	mustRead := func(s *bufio.Scanner) {
		b.Helper()
		if !s.Scan() {
			b.Fatal("the connections are not made")
		}
	}
	listener := start(server, "listen")
	mustRead(listener)
	mustRead(start(client, "dial"))
	mustRead(listener)
}

// mustAgentPID returns the process that serves the agent's socket.
func mustAgentPID(b *testing.B, n *node) int {
	b.Helper()
	conn, err := net.DialTimeout("unix", n.AgentSocket, loadTimeout)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	var peer *unix.Ucred
	control := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(control, err); err != nil {
		b.Fatal(err)
	}
	return int(peer.Pid)
}

// mustCPUTime returns how long a process has run on the processors, to 10 ms.
func mustCPUTime(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		tb.Fatal(err)
	}
	// The fields after the name in brackets begin with the third: utime and stime are 14 and 15.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			tb.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

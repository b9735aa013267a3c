// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// What a large node has, and for how long it is left alone. At first the agent looks
// often at the rules in a pod, so that is no part of it.
const (
	scalePods    = 250
	scaleServers = 10
	scaleSettle  = 2 * time.Minute
	scaleIdle    = time.Minute
)

// BenchmarkNode has what the agent takes on a node with 250 pods in the shortcut: of a
// core while nothing happens, and the time of `flows` with no connection, with 9,000
// and with 50,000.
func BenchmarkNode(b *testing.B) {
	// Two for each connection, and some. Root in a container may not raise it.
	files := unix.Rlimit{Cur: 1 << 17, Max: 1 << 17}
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &files)
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		b.Fatal(err)
	}
	n := mustNode(b)
	var entries []string
	for i := range scalePods {
		entries = append(entries, fmt.Sprintf("pod-%d %s", i, on))
	}
	n.mustWritePods(b, entries...)
	n.mustStart(b, "--max-flows=65536")
	var pods []*sandbox.Pod
	for i := range scalePods {
		pods = append(pods, n.MustAddPod(b, fmt.Sprintf("pod-%d", i), sandbox.PodOptions{}))
	}
	mustBecome(b, "pods that take part", scalePods, func() int { return n.entries(b, "pods")["pods"] })

	b.Run("idle", func(b *testing.B) {
		time.Sleep(scaleSettle)
		before := mustCPUTime(b, n.cmd.Process.Pid)
		for b.Loop() {
			time.Sleep(scaleIdle)
		}
		used := mustCPUTime(b, n.cmd.Process.Pid) - before
		b.ReportMetric(100*used.Seconds()/(float64(b.N)*scaleIdle.Seconds()), "%core")
	})

	var servers []endpoint
	for _, p := range pods[:scaleServers] {
		address := netip.AddrPortFrom(p.IPv4, 8080)
		servers = append(servers, endpoint{address, p.MustListen(b, "tcp", address.String())})
	}
	made := 0
	for _, flows := range []int{0, 9000, 50000} {
		if uint64(flows)*2+1000 > files.Cur {
			b.Logf("no more than %d files may be open: %d flows are left out", files.Cur, flows)
			continue
		}
		for ; made < flows; made++ {
			client := pods[scaleServers+made%(scalePods-scaleServers)]
			c, s, err := connect(client, servers[made%scaleServers])
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _, _ = c.Close(), s.Close() })
		}
		b.Run(fmt.Sprintf("flows=%d", flows), func(b *testing.B) {
			before := mustCPUTime(b, n.cmd.Process.Pid)
			for b.Loop() {
				if _, err := n.run("flows", n.runDir()); err != nil {
					b.Fatal(err)
				}
			}
			used := mustCPUTime(b, n.cmd.Process.Pid) - before
			b.ReportMetric(used.Seconds()/float64(b.N), "agent-cpu-s/op")
			list := mustShow[api.FlowList](b, n, "flows")
			if got := len(list.Items); got != flows {
				b.Errorf("got %d flows, want %d", got, flows)
			}
		})
	}
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

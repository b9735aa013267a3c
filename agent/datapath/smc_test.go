// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// hasSMC reports whether this kernel has AF_SMC. One that has its module must have it.
func hasSMC(tb testing.TB) bool {
	tb.Helper()
	fd, err := unix.Socket(unix.AF_SMC, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		if err := unix.Close(fd); err != nil {
			tb.Error(err)
		}
		return true
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		tb.Fatal(err)
	}
	module := filepath.Join("/lib/modules", unix.ByteSliceToString(name.Release[:]), "kernel/net/smc/smc.ko*")
	if there, _ := filepath.Glob(module); len(there) > 0 || !errors.Is(err, unix.EAFNOSUPPORT) {
		tb.Fatalf("open a socket of AF_SMC: %v; modules are %v", err, there)
	}
	return false
}

// kernelLog reads what the kernel says from now on.
type kernelLog struct{ fd int }

func mustFollowKernelLog(tb testing.TB) kernelLog {
	tb.Helper()
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.Seek(fd, 0, io.SeekEnd); err != nil {
		tb.Fatal(err)
	}
	return kernelLog{fd}
}

// warnings returns the lines in which the kernel complains of itself.
func (l kernelLog) warnings(tb testing.TB) (lines []string) {
	tb.Helper()
	record := make([]byte, 8192) // one a read
	for {
		n, err := unix.Read(l.fd, record)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return lines
		case errors.Is(err, unix.EPIPE): // overwritten meanwhile
			tb.Error("the kernel's log was overwritten before it was read")
		case err != nil:
			tb.Fatal(err)
		}
		text := string(record[:max(n, 0)])
		for _, sign := range []string{"WARNING", "BUG:", "Oops", "refcount_t", "Call Trace"} {
			if strings.Contains(text, sign) {
				lines = append(lines, strings.TrimSpace(text))
				break
			}
		}
	}
}

// tcpSockets returns how many TCP sockets the kernel has allocated, in all network namespaces.
func tcpSockets(tb testing.TB) (allocated int) {
	tb.Helper()
	stat, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(stat)) {
		if _, rest, ok := strings.Cut(line, " alloc "); ok && strings.HasPrefix(line, "TCP:") {
			if _, err := fmt.Sscan(rest, &allocated); err != nil {
				tb.Fatal(err)
			}
			return allocated
		}
	}
	tb.Fatalf("got %q, want a line with TCP sockets", stat)
	return 0
}

// TestKernelSockets: a socket that the kernel has made for a socket of AF_SMC is
// not paired, whichever end it is. AF_SMC would take the SOCKHASH's hold of it away,
// and the kernel complain and leak it, or never end the close.
func TestKernelSockets(t *testing.T) {
	if !hasSMC(t) {
		t.Log("this kernel has NO AF_SMC: its sockets cannot be tried here")
		return
	}
	for _, tc := range []struct {
		name           string
		client, server int // address families
		want           map[string]uint64
	}{
		{"client", unix.AF_SMC, unix.AF_INET, map[string]uint64{"connection_kernel_socket": 1}},
		// The client has joined, and finds nobody.
		{"server", unix.AF_INET, unix.AF_SMC, map[string]uint64{"connection_kernel_socket": 1, "message_peer_missing": 10}},
		{"both", unix.AF_SMC, unix.AF_SMC, map[string]uint64{"connection_kernel_socket": 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log := mustFollowKernelLog(t)
			n := mustNode(t, nil)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			l := mustSocket(t, pods[1].Netns, tc.server, 0)
			l.mustListenOn(t, netip.AddrPortFrom(pods[1].IPv4, 0))
			address := l.mustAddress(t)
			sockets := tcpSockets(t)
			const connections = 20
			for range connections {
				before := n.counts(t)
				oneConnection(t, pods[0], tc.client, l, address)
				n.mustCount(t, before, tc.want)
			}
			n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
			// A few of the machine's own may come and go.
			waitUntil(t, fmt.Sprintf("at most half of %d sockets are left", connections), func() bool {
				return tcpSockets(t) < sockets+connections/2
			})
			if lines := log.warnings(t); len(lines) > 0 {
				t.Errorf("the kernel says:\n%s", strings.Join(lines, "\n"))
			}
		})
	}
}

// oneConnection makes a connection, exchanges messages and closes it.
func oneConnection(tb testing.TB, from *sandbox.Pod, family int, l *rawSocket, to netip.AddrPort) {
	tb.Helper()
	c := mustSocket(tb, from.Netns, family, 0)
	c.mustConnect(tb, to)
	s := l.mustAccept(tb)
	sandboxtest.MustPing(tb, c, s, 10, 100)
	c.mustClose(tb)
	if err := wantEOF(s); err != nil {
		tb.Error(err)
	}
	s.mustClose(tb)
}

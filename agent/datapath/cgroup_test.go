// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

const (
	// receiverEnv makes the test binary a receiver, with the address to listen on.
	receiverEnv = "PODSHUNT_TEST_RECEIVER"
	// What the receiver does with each connection before it rests.
	receiverConnections, receiverRounds, receiverSize = 12, 5, 100
)

// runReceiver returns the exit status.
func runReceiver(address string) int {
	if err := receive(address); err != nil {
		fmt.Fprintln(os.Stderr, "receiver:", err)
		return 1
	}
	return 0
}

// receive is what a receiver does: it accepts connections, answers the first
// messages of each and rests. Then it reads from connection I the N bytes of seed
// I for each line "I N" that it is sent, and answers "ok".
func receive(address string) error {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp4", address)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	var all []net.Conn
	for range receiverConnections {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if err := c.SetDeadline(time.Now().Add(5 * deadline)); err != nil {
			return err
		}
		message := make([]byte, receiverSize)
		for range receiverRounds {
			if _, err := io.ReadFull(c, message); err != nil {
				return err
			}
			if _, err := c.Write(message); err != nil {
				return err
			}
		}
		all = append(all, c)
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var connection, bytes int
		if _, err := fmt.Sscan(lines.Text(), &connection, &bytes); err != nil {
			return err
		}
		if err := (traffic{seed: byte(connection), bytes: bytes, maxRead: 100_000}).read(all[connection]); err != nil {
			return fmt.Errorf("connection %d: %w", connection, err)
		}
		fmt.Println("ok")
	}
	return nil
}

// memoryCgroup is a cgroup with a limit of memory.
type memoryCgroup string

func mustMemoryCgroup(t *testing.T, root string, limit int) memoryCgroup {
	t.Helper()
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil || !strings.Contains(string(controllers), "memory") {
		t.Fatalf("%s has the controllers %q (%v), needed is memory", root, controllers, err)
	}
	control := filepath.Join(root, "cgroup.subtree_control")
	if err := os.WriteFile(control, []byte("+memory"), 0); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, fmt.Sprintf("podshunt-receiver-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// It is busy until the kernel is done with its last process.
		waitUntil(t, "the cgroup of the receiver is empty", func() bool { return os.Remove(dir) == nil })
		if err := os.WriteFile(control, []byte("-memory"), 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte(strconv.Itoa(limit)), 0); err != nil {
		t.Fatal(err)
	}
	return memoryCgroup(dir)
}

// value returns a number of one of its files with a name on each line.
func (m memoryCgroup) value(tb testing.TB, file, name string) int {
	tb.Helper()
	text, err := os.ReadFile(filepath.Join(string(m), file))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if key, number, ok := strings.Cut(strings.TrimSpace(line), " "); ok && key == name {
			n, err := strconv.Atoi(number)
			if err != nil {
				tb.Fatal(err)
			}
			return n
		}
	}
	tb.Fatalf("%s has no %s", file, name)
	return 0
}

// settledSockets returns the memory of its sockets once it does not change: the
// kernel sums it up now and then.
func (m memoryCgroup) settledSockets(tb testing.TB) int {
	tb.Helper()
	last, since := -1, time.Now()
	for limit := time.Now().Add(deadline); time.Now().Before(limit); time.Sleep(200 * time.Millisecond) {
		if now := m.value(tb, "memory.stat", "sock"); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) > 5*time.Second {
			break
		}
	}
	return last
}

// receiverInCgroup: a pod with a limit of memory is not killed by what its peers
// send to it and it does not read; that is a few times what TCP holds at most.
func receiverInCgroup(t *testing.T) {
	const limit, most = 64 << 20, 7 << 20
	n := mustNode(t, func(c *datapath.Config) {
		atOnce(c)
		// The receiver is in no cgroup below the sandbox's.
		c.Cgroup = filepath.Dir(c.Cgroup)
		c.Budget, c.PodBudget = 8<<20, 256<<20
	})
	pods, cookies := n.MustEnrol(t, "client", "server")
	// fill returns what the receiver holds when nobody can send more to it.
	fill := func(t *testing.T, verdict rule.Verdict) (held int) {
		n.MustSetPolicy(t, sandbox.Between(verdict, cookies...))
		m := mustMemoryCgroup(t, filepath.Dir(n.Sandbox.Cgroup), limit)
		r := mustStartReceiver(t, pods[1], m)
		var all []*backlog
		for i := range receiverConnections {
			c := sandboxtest.MustDial(t, pods[0], "tcp4", r.address.String())
			message := make([]byte, receiverSize)
			for range receiverRounds {
				if _, err := c.Write(message); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(c, message); err != nil {
					t.Fatal(err)
				}
			}
			all = append(all, newBacklog(c, nil, byte(i)))
		}
		sockets, before := m.settledSockets(t), mustReadSlabs(t)
		messages, bytes := n.redirected(t, func() {
			sizes := rand.New(rand.NewPCG(1, 1))
			for _, b := range all {
				for b.bytes < most && b.write(t, 1+sizes.IntN(64<<10)) {
				}
			}
		})
		held = m.settledSockets(t) - sockets + max(0, readSlabs(t).all-before.all)
		accepted := 0
		for _, b := range all {
			accepted += b.bytes
		}
		t.Logf("%s: %d bytes unread, %d of them in %d messages by shortcut; the receiver holds %d KiB, %d KiB for its sockets", wayOf(verdict),
			accepted, bytes, messages, held>>10, (m.value(t, "memory.stat", "sock")-sockets)>>10)
		if (bytes > 0) != (verdict == rule.Allow) {
			t.Errorf("got %d bytes by shortcut", bytes)
		}
		for i, b := range all {
			if err := b.from.SetDeadline(time.Now().Add(deadline)); err != nil {
				t.Fatal(err)
			}
			if err := r.read(i, b.bytes); err != nil {
				t.Errorf("%s: connection %d: %v", wayOf(verdict), i, err)
			}
		}
		if kills := m.value(t, "memory.events", "oom_kill"); kills != 0 {
			t.Errorf("%s: got %d processes killed for want of memory", wayOf(verdict), kills)
		}
		for _, b := range all {
			b.from.Close()
		}
		return held
	}
	var plain, shortcut int
	t.Run("TCP", func(t *testing.T) { plain = fill(t, rule.Hold) })
	t.Run("shortcut", func(t *testing.T) { shortcut = fill(t, rule.Allow) })
	if shortcut > 4*plain {
		t.Errorf("the receiver holds %d KiB, want at most four times the %d KiB that it holds on TCP", shortcut>>10, plain>>10)
	}
}

// receiver is a process that runs receive.
type receiver struct {
	address netip.AddrPort
	stdin   io.Writer
	stdout  *bufio.Reader
}

func mustStartReceiver(t *testing.T, pod *sandbox.Pod, m memoryCgroup) receiver {
	t.Helper()
	cgroup, err := os.Open(string(m))
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), receiverEnv+"="+net.JoinHostPort(pod.IPv4.String(), "0"))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	stdin, err := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if err := pod.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// It ends with its standard input.
		if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
			t.Errorf("receiver: %v", err)
		}
	})
	r := receiver{stdin: stdin, stdout: bufio.NewReader(stdout)}
	line, err := r.stdout.ReadString('\n')
	if err == nil {
		r.address, err = netip.ParseAddrPort(strings.TrimSpace(line))
	}
	if err != nil {
		t.Fatalf("receiver: got %q (%v), want its address", line, err)
	}
	return r
}

// read has the receiver read and check bytes of a connection.
func (r receiver) read(connection, bytes int) error {
	if _, err := fmt.Fprintln(r.stdin, connection, bytes); err != nil {
		return err
	}
	line, err := r.stdout.ReadString('\n')
	if err != nil || line != "ok\n" {
		return fmt.Errorf("receiver: got %q (%v), want ok", line, err)
	}
	return nil
}

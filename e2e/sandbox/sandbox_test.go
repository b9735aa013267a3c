// SPDX-License-Identifier: Apache-2.0

package sandbox_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// bodyEnv makes the test binary a run of another kind, for tests of Main.
const bodyEnv = "PODSHUNT_SANDBOX_TEST_BODY"

func TestMain(m *testing.M) {
	body := m.Run
	switch os.Getenv(bodyEnv) {
	case "hang":
		body = func() int { return report(hang) }
	case "leak":
		body = func() int { return report(leak) }
	}
	os.Exit(sandbox.Main(body))
}

func report(fn func(*sandbox.Sandbox, *sandbox.Pod) error) int {
	s, err := sandbox.New(sandbox.Config{})
	if err != nil {
		fmt.Println(err)
		return 3
	}
	p, err := s.AddPod("pod", sandbox.PodOptions{})
	if err == nil {
		err = fn(s, p)
	}
	if err != nil {
		fmt.Println(err)
		return 3
	}
	return 0
}

// hang prints what it owns and leaves the rest to the test.
func hang(s *sandbox.Sandbox, p *sandbox.Pod) error {
	cmd := exec.Command("sleep", "60")
	if err := p.Start(cmd); err != nil {
		return err
	}
	fmt.Println(filepath.Dir(s.Base), s.Cgroup, os.Getpid(), cmd.Process.Pid)
	time.Sleep(time.Minute)
	return errors.New("nobody ended this run")
}

// leak leaves one thing of each kind.
func leak(s *sandbox.Sandbox, p *sandbox.Pod) error {
	if err := os.Mkdir(filepath.Join(s.Cgroup, "child"), 0o755); err != nil {
		return err
	}
	// A plain descriptor, which no finalizer closes.
	if _, err := unix.Open(p.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	return p.Start(exec.Command("sleep", "60"))
}

// rerun prepares a run of its own of this test binary.
func rerun(t *testing.T, body string) *exec.Cmd {
	t.Helper()
	// Without root it ends the test here.
	sandboxtest.MustNew(t, sandbox.Config{})
	ctx, cancel := context.WithTimeout(t.Context(), sandboxtest.Timeout)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), bodyEnv+"="+body)
	cmd.WaitDelay = time.Second
	return cmd
}

// hanging is a run that does nothing, and what it owns.
type hanging struct {
	cmd         *exec.Cmd
	dir, cgroup string
	// main is the process inside the run, sleeper the one in its pod.
	main, sleeper int
}

func startHanging(t *testing.T) hanging {
	t.Helper()
	h := hanging{cmd: rerun(t, "hang")}
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &h.dir, &h.cgroup, &h.main, &h.sleeper); err != nil {
		t.Fatalf("run printed %q: %v", line, err)
	}
	return h
}

func (h hanging) mustBeGone(t *testing.T) {
	t.Helper()
	for _, path := range []string{h.dir, h.cgroup} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %v, want it gone", path, err)
		}
	}
	for _, pid := range []int{h.main, h.sleeper} {
		if name, err := sandbox.ProcessName(pid); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("process %d: got %q, %v; want it gone", pid, name, err)
		}
	}
}

// exchange connects from client to address, behind which listener is, sends a
// byte each way and returns the address that the server sees.
func exchange(t *testing.T, client *sandbox.Netns, listener net.Listener, address string) netip.AddrPort {
	t.Helper()
	if err := listener.(*net.TCPListener).SetDeadline(time.Now().Add(sandboxtest.Timeout)); err != nil {
		t.Fatal(err)
	}
	seen := make(chan netip.AddrPort, 1)
	go func() {
		defer close(seen)
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if conn.SetDeadline(time.Now().Add(sandboxtest.Timeout)) != nil {
			return
		}
		if _, err := io.CopyN(conn, conn, 1); err != nil {
			return
		}
		seen <- conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	}()
	conn := sandboxtest.MustDial(t, client, "tcp", address)
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "x" {
		t.Fatalf("echo by %s: got %q, %v", address, got, err)
	}
	from, ok := <-seen
	if !ok {
		t.Fatalf("server behind %s gave up", address)
	}
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func TestPaths(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	client, server := sandboxtest.MustAddPod(t, s, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, s, "server", sandbox.PodOptions{})
	for _, tc := range []struct {
		name   string
		from   *sandbox.Netns
		to     netip.Addr
		source netip.Addr
	}{
		{"pod to pod, IPv4", client.Netns, server.IPv4, client.IPv4},
		{"pod to pod, IPv6", client.Netns, server.IPv6, client.IPv6},
		{"own address", server.Netns, server.IPv4, server.IPv4},
		{"loopback, IPv4", server.Netns, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1")},
		{"loopback, IPv6", server.Netns, netip.IPv6Loopback(), netip.IPv6Loopback()},
		{"node to pod", s.Node, server.IPv4, netip.MustParseAddr("10.244.0.1")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := sandboxtest.MustListen(t, server, "tcp", net.JoinHostPort(tc.to.String(), "0"))
			if got := exchange(t, tc.from, l, l.Addr().String()).Addr(); got != tc.source {
				t.Errorf("source: got %v, want %v", got, tc.source)
			}
		})
	}
	t.Run("not from outside", func(t *testing.T) {
		l := sandboxtest.MustListen(t, server, "tcp", "127.0.0.1:0")
		if conn, err := net.DialTimeout("tcp", l.Addr().String(), time.Second); err == nil {
			conn.Close()
			t.Error("the machine's own loopback reaches a pod's")
		}
	})
}

func TestServiceAddress(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	client, server := sandboxtest.MustAddPod(t, s, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, s, "server", sandbox.PodOptions{})
	for _, tc := range []struct {
		name       string
		vip        string
		to, source netip.Addr
		masquerade bool
	}{
		{"IPv4", "10.96.0.1:80", server.IPv4, client.IPv4, false},
		{"IPv6", "[fd00:96::1]:80", server.IPv6, client.IPv6, false},
		{"IPv4 masqueraded", "10.96.0.2:80", server.IPv4, netip.MustParseAddr("10.244.0.1"), true},
		{"IPv6 masqueraded", "[fd00:96::2]:80", server.IPv6, netip.MustParseAddr("fd00:244::1"), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			vip := netip.MustParseAddrPort(tc.vip)
			l := sandboxtest.MustListen(t, server, "tcp", net.JoinHostPort(tc.to.String(), "0"))
			if err := s.DNAT(vip, l.Addr().(*net.TCPAddr).AddrPort()); err != nil {
				t.Fatal(err)
			}
			if tc.masquerade {
				if err := s.Masquerade(vip); err != nil {
					t.Fatal(err)
				}
			}
			if got := exchange(t, client.Netns, l, tc.vip).Addr(); got != tc.source {
				t.Errorf("source: got %v, want %v", got, tc.source)
			}
		})
	}
}

func TestProcess(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	p := sandboxtest.MustAddPod(t, s, "pod", sandbox.PodOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), sandboxtest.Timeout)
	defer cancel()
	// It ends with its standard input.
	cmd := exec.CommandContext(ctx, "cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(cmd); err != nil {
		t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d/", cmd.Process.Pid)
	cgroup, err := os.ReadFile(proc + "cgroup")
	if want := "0::/" + filepath.Base(s.Cgroup) + "\n"; err != nil || !strings.HasSuffix(string(cgroup), want) {
		t.Errorf("cgroup: got %q, %v; want %q at the end", cgroup, err, want)
	}
	for path, want := range map[string]string{"ns/net": p.Path, "ns/mnt": "/proc/self/ns/mnt"} {
		var got, wanted unix.Stat_t
		if err := errors.Join(unix.Stat(proc+path, &got), unix.Stat(want, &wanted)); err != nil || got.Ino != wanted.Ino {
			t.Errorf("%s: got inode %d, %v; want %d, as %s", path, got.Ino, err, wanted.Ino, want)
		}
	}
	if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
		t.Error(err)
	}
	if outer, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", os.Getppid())); err != nil || outer == mustReadlink(t, "/proc/self/ns/mnt") {
		t.Errorf("mount namespace %s, %v: the run shares that of its owner", outer, err)
	}
	var bpffs unix.Statfs_t
	if err := unix.Statfs(s.BPF, &bpffs); err != nil || bpffs.Type != unix.BPF_FS_MAGIC {
		t.Errorf("%s: got file system %#x, %v; want bpffs", s.BPF, bpffs.Type, err)
	}
}

func mustReadlink(t *testing.T, path string) string {
	t.Helper()
	link, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func TestDo(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	home := mustReadlink(t, sandbox.ThreadNetns)
	wrong := errors.New("wrong")
	var inside string
	err := s.Node.Do(func() error {
		inside = mustReadlink(t, sandbox.ThreadNetns)
		return wrong
	})
	if !errors.Is(err, wrong) {
		t.Errorf("error: got %v, want that of the function", err)
	}
	if inside == home {
		t.Error("the function ran outside of the namespace")
	}
	if err := s.Node.Sysctl("net.ipv4.tcp_syncookies", "2"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"kernel.panic", "net.ipv4.no_such_parameter"} {
		if err := s.Node.Sysctl(name, "1"); err == nil {
			t.Errorf("sysctl %s was accepted", name)
		}
	}
	if _, err := s.Node.Dial("tcp", "localhost:1", time.Second); err == nil || !strings.Contains(err.Error(), "localhost") {
		t.Errorf("dial a name: got %v, want an error that shows it", err)
	}
}

func TestVerbs(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	kept := sandboxtest.MustAddPod(t, s, "pod", sandbox.PodOptions{Namespace: "shop", UID: "a-b-c"})
	stale := sandboxtest.MustAddPod(t, s, "pod", sandbox.PodOptions{})
	if err := errors.Join(s.Status(""), s.Check(kept), s.Check(stale)); err != nil {
		t.Fatal(err)
	}
	if err := s.GC("", kept); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(kept); err != nil {
		t.Errorf("CHECK of the valid pod: %v", err)
	}
	if err := s.Check(stale); err == nil {
		t.Error("CHECK after GC: got no error for a pod that was not valid")
	}
	for range 2 {
		if err := s.DelPod(kept); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	if _, err := kept.Dial("tcp", "127.0.0.1:1", time.Second); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dial in a deleted pod: got %v, want %v", err, fs.ErrNotExist)
	}
}

func TestFailedAdd(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	for _, tc := range []struct{ name, conflist, want string }{
		{"no plugin", s.Conflist(`{"type":"absent"}`), `"absent"`},
		{"no JSON", s.Conflist(`{`), "invalid character"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := s.AddPod("pod", sandbox.PodOptions{Conflist: tc.conflist}); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %s", err, tc.want)
			}
		})
	}
	left, err := os.ReadDir(filepath.Dir(s.Node.Path))
	if err != nil || len(left) != 1 {
		t.Errorf("namespaces: got %v, %v; want only the node's", left, err)
	}
}

// The plugin lets the pod start without an agent.
func TestPodshuntChained(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{Podshunt: true})
	p := sandboxtest.MustAddPod(t, s, "pod", sandbox.PodOptions{})
	if !p.IPv4.Is4() || !p.IPv6.Is6() {
		t.Errorf("addresses: got %v and %v, want one of each family", p.IPv4, p.IPv6)
	}
	if left, err := os.ReadDir(s.AttachmentsDir); err != nil || len(left) != 1 {
		t.Errorf("word for the agent: got %v, %v; want one file", left, err)
	}
}

func TestMissingPlugins(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	_, err := sandbox.New(sandbox.Config{BinDir: s.Base})
	if err == nil || !strings.Contains(err.Error(), "make build cni") {
		t.Errorf("got %v, want an error that says how to build them", err)
	}
}

func TestClose(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	sandboxtest.MustAddPod(t, s, "pod", sandbox.PodOptions{})
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if _, err := os.Stat(s.Base); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: got %v, want it gone", s.Base, err)
	}
}

func TestMainCleansUpAfterSignals(t *testing.T) {
	for _, tc := range []struct {
		name   string
		signal syscall.Signal
		target func(hanging) int
	}{
		{"passed on", syscall.SIGTERM, func(h hanging) int { return h.cmd.Process.Pid }},
		{"killed inside", syscall.SIGKILL, func(h hanging) int { return h.main }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := startHanging(t)
			if err := syscall.Kill(tc.target(h), tc.signal); err != nil {
				t.Fatal(err)
			}
			if err := h.cmd.Wait(); h.cmd.ProcessState.ExitCode() != 128+int(tc.signal) {
				t.Errorf("got %v, want exit status %d", err, 128+tc.signal)
			}
			h.mustBeGone(t)
		})
	}
}

func TestMainSweepsDeadRuns(t *testing.T) {
	dead, live := startHanging(t), startHanging(t)
	if err := dead.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// The kill is its error.
	_ = dead.cmd.Wait()
	if _, err := os.Stat(dead.cgroup); err != nil {
		t.Errorf("killed run: got %v, want it to leave its cgroup to the next", err)
	}
	if out, err := rerun(t, "").CombinedOutput(); err != nil {
		t.Errorf("next run: %v: %s", err, out)
	}
	dead.mustBeGone(t)

	if _, err := sandbox.ProcessName(live.sleeper); err != nil {
		t.Errorf("process of the live run: %v", err)
	}
	if err := live.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	// The signal is its error.
	_ = live.cmd.Wait()
	live.mustBeGone(t)
}

func TestMainReportsLeaks(t *testing.T) {
	out, err := rerun(t, "leak").CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("got %v, want exit status 1", err)
	}
	for _, want := range []string{
		"leaked mount /", "/bpf\n", "/netns/node\n", "/netns/pod-1\n",
		"leaked network namespace ", " held by /proc/self/fd/",
		"leaked process", "(sleep)",
		"leaked /tmp/podshunt-",
		"/child",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("output lacks %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

func BenchmarkAddPod(b *testing.B) {
	s := sandboxtest.MustNew(b, sandbox.Config{})
	for b.Loop() {
		p := sandboxtest.MustAddPod(b, s, "pod", sandbox.PodOptions{})
		b.StopTimer()
		if err := s.DelPod(p); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// programTimeout is how long one run of a program may take: a connection that stalls fails by it.
var programTimeout = flag.Duration("program-timeout", 2*time.Minute, "how long one run of a program may take")

// large is the size of large bodies: more than all buffers of a connection together.
const large = 16 << 20

// stage is where one run of a program takes place. Its methods fail the test
// where something goes wrong, and undo at the end what they have made.
type stage struct {
	testing.TB
	cast
	node *node
	ctx  context.Context
	// dir is a directory of the account's.
	dir string
	// answers are what the program has delivered: the same on TCP and with the shortcut.
	answers []string
}

// cast are the pods of a program. What is learned of a pod lasts for several runs.
type cast struct{ client, proxy, server *sandbox.Pod }

// mustCast makes pods, which end with the test.
func (n *node) mustCast(t testing.TB, namespace string) (c cast) {
	t.Helper()
	for name, pod := range map[string]**sandbox.Pod{"client": &c.client, "proxy": &c.proxy, "server": &c.server} {
		*pod = sandboxtest.MustAddPod(t, n, name, sandbox.PodOptions{Namespace: namespace})
		t.Cleanup(func() {
			if err := n.DelPod(*pod); err != nil {
				t.Errorf("delete pod: %v", err)
			}
		})
	}
	return c
}

func newStage(t testing.TB, n *node, c cast) *stage {
	t.Helper()
	s := &stage{TB: t, node: n, cast: c}
	s.dir = t.TempDir()
	// The directory that it is in is root's alone.
	s.must("open directory", os.Chmod(filepath.Dir(s.dir), 0o711))
	s.must("give directory", os.Chown(s.dir, accountID, accountID))
	ctx, cancel := context.WithTimeout(t.Context(), *programTimeout)
	t.Cleanup(cancel)
	s.ctx = ctx
	s.watch()
	return s
}

// watch logs the flows when most of the time is over: with the deadline the
// connections of a program that stalls end.
func (s *stage) watch() {
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-over:
		case <-time.After(*programTimeout * 3 / 4):
			s.logFlows()
		}
	}()
	s.Cleanup(func() {
		close(over)
		<-ended
	})
}

// logFlows logs the table of flows, and how much of each is unread, which only the
// other format has.
func (s *stage) logFlows() {
	s.Helper()
	for _, format := range []string{"text", "json"} {
		out, err := s.node.Command("flows", "-o", format, s.node.RunDir())
		s.Logf("flows (%v):\n%s", err, out)
	}
}

// Fatalf logs the flows as well.
func (s *stage) Fatalf(format string, args ...any) {
	s.Helper()
	s.logFlows()
	s.TB.Fatalf(format, args...)
}

func (s *stage) must(what string, err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("%s: %v", what, err)
	}
}

// check is must for what must not stop a clean-up.
func (s *stage) check(what string, err error) {
	s.Helper()
	if err != nil {
		s.Errorf("%s: %v", what, err)
	}
}

func (s *stage) answer(format string, args ...any) {
	s.answers = append(s.answers, fmt.Sprintf(format, args...))
}

// mkdir makes a directory of the account's below dir.
func (s *stage) mkdir(name string) string {
	s.Helper()
	path := filepath.Join(s.dir, name)
	s.must("make directory", os.Mkdir(path, 0o755))
	s.must("make directory", os.Chown(path, accountID, accountID))
	return path
}

// file makes a file of the account's below dir.
func (s *stage) file(name string, from io.Reader) string {
	s.Helper()
	path := filepath.Join(s.dir, name)
	text, err := io.ReadAll(from)
	s.must("make "+name, err)
	// Private, as ssh wants its keys.
	s.must("make "+name, os.WriteFile(path, text, 0o600))
	s.must("make "+name, os.Chown(path, accountID, accountID))
	return path
}

// command prepares a process of the account's.
func (s *stage) command(name string, args ...string) *exec.Cmd {
	return s.commandUntil(s.ctx, name, args...)
}

// commandUntil is command with a context that ends the process.
func (s *stage) commandUntil(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "HOME="+s.dir, "USER="+accountName)
	cmd.WaitDelay = time.Minute // what it has printed may be large, and the machine busy
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: accountID, Gid: accountID}}
	return cmd
}

// try runs a program in a pod to its end and returns what it prints.
func (s *stage) try(p *sandbox.Pod, stdin io.Reader, name string, args ...string) (string, error) {
	cmd := s.command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := p.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, tail(stdout.Bytes()), tail(stderr.Bytes()))
	}
	return stdout.String(), err
}

func (s *stage) run(p *sandbox.Pod, stdin io.Reader, name string, args ...string) string {
	s.Helper()
	out, err := s.try(p, stdin, name, args...)
	s.must("run", err)
	return out
}

// serve starts a program in a pod, which the signal ends, and returns its
// address when it listens on the port.
func (s *stage) serve(p *sandbox.Pod, port uint16, end syscall.Signal, name string, args ...string) netip.AddrPort {
	s.Helper()
	address, _ := s.serveProcess(p, port, end, name, args...)
	return address
}

// serveProcess is serve, and returns the process as well.
func (s *stage) serveProcess(p *sandbox.Pod, port uint16, end syscall.Signal, name string, args ...string) (netip.AddrPort, *os.Process) {
	s.Helper()
	// It outlives the run's context, to be ended in its own way: one that is killed
	// leaves its children and their ports to the next run.
	cmd := s.commandUntil(context.WithoutCancel(s.ctx), name, args...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	s.must("start "+name, p.Start(cmd))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // many a server calls its signal an error
	}()
	s.Cleanup(func() {
		_ = cmd.Process.Signal(end) // it fails if the server has ended, which shows elsewhere
		select {
		case <-ended:
		case <-time.After(*programTimeout):
			s.Errorf("%s does not end; kill: %v", name, cmd.Process.Kill())
			<-ended
		}
		if s.Failed() {
			s.Logf("%s says:\n%s", name, tail(log.Bytes()))
		}
	})
	return s.listening(p, port), cmd.Process
}

// listening returns a pod's address when the port is open. It tries from the
// node, whose connections are never paired.
func (s *stage) listening(p *sandbox.Pod, port uint16) netip.AddrPort {
	s.Helper()
	address := netip.AddrPortFrom(p.IPv4, port)
	for ; ; time.Sleep(20 * time.Millisecond) {
		c, err := s.node.Node.Dial("tcp", address.String(), *programTimeout)
		if err == nil {
			c.Close()
			return address
		}
		if s.ctx.Err() != nil {
			s.Fatalf("nothing listens on %s: %v", address, err)
		}
	}
}

// listen returns a listener of the test's own in a pod, and its address.
func (s *stage) listen(p *sandbox.Pod, port uint16) (net.Listener, netip.AddrPort) {
	s.Helper()
	address := netip.AddrPortFrom(p.IPv4, port)
	return sandboxtest.MustListen(s, p, "tcp", address.String()), address
}

// dial connects from a pod; the connection has the deadline of the run.
func (s *stage) dial(p *sandbox.Pod, address string) (net.Conn, error) {
	c, err := p.Dial("tcp", address, *programTimeout)
	if err != nil {
		return nil, err
	}
	deadline, _ := s.ctx.Deadline()
	return c, c.SetDeadline(deadline)
}

// content is size bytes that only the seed decides.
func content(seed int, size int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), size)
}

// contentBytes is content for those who need it at once.
func contentBytes(seed int, size int64) []byte {
	b, _ := io.ReadAll(content(seed, size)) // it never fails
	return b
}

// digest reads to the end.
func digest(r io.Reader) (string, error) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	return fmt.Sprintf("%d bytes, sha256 %s", n, hex.EncodeToString(h.Sum(nil))), err
}

// want compares two texts, however long, and counts the first as an answer.
func (s *stage) want(what string, got, want io.Reader) {
	s.Helper()
	g, err := digest(got)
	s.must("read "+what, err)
	w, err := digest(want)
	s.must("make "+what, err)
	if g != w {
		s.Fatalf("%s: got %s, want %s", what, g, w)
	}
	s.answer("%s: %s", what, g)
}

// wantFile is want for the content of a file.
func (s *stage) wantFile(path string, want io.Reader) {
	s.Helper()
	f, err := os.Open(path)
	s.must("read what was copied", err)
	defer f.Close()
	s.want(filepath.Base(path), f, want)
}

// tail is the end of a text that may be long.
func tail(text []byte) []byte { return text[max(0, len(text)-2048):] }

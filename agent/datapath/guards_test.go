// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/hazards"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

var measured = sync.OnceValue(func() []api.Hazard { return hazards.Measure(nil) })

// hazard reports whether this kernel has a hazard.
func hazard(tb testing.TB, name string) bool {
	tb.Helper()
	for _, h := range measured() {
		if h.Name == name {
			return h.Present
		}
	}
	tb.Fatalf("no hazard %s", name)
	return false
}

// harms returns for each guard what a program does on a connection whose two
// directions take the shortcut. It returns what went wrong, or "".
func harms() map[string]map[string]func(tb testing.TB, c, s net.Conn) string {
	return map[string]map[string]func(testing.TB, net.Conn, net.Conn) string{
		datapath.GuardSplice: {
			"splice": func(tb testing.TB, c, s net.Conn) (harm string) {
				mustWrite(tb, c, "hello")
				control(tb, s.(*net.TCPConn), func(fd int) error {
					var pipe [2]int
					if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
						return err
					}
					defer unix.Close(pipe[0])
					defer unix.Close(pipe[1])
					if n, err := unix.Splice(fd, nil, pipe[1], nil, 5, unix.SPLICE_F_NONBLOCK); !errors.Is(err, unix.EINVAL) {
						harm = fmt.Sprintf("splice gives %d (%v)", n, err)
					}
					// The other way is served, and so is splice from a pipe.
					if _, err := unix.Write(pipe[1], []byte("answer")); err != nil {
						return err
					}
					if n, err := unix.Splice(pipe[0], nil, fd, nil, 6, 0); n != 6 {
						tb.Errorf("splice to the socket: got %d (%v), want 6", n, err)
					}
					return nil
				})
				mustRead(tb, s, "hello")
				mustRead(tb, c, "answer")
				return harm
			},
			// Go splices between two TCP connections, and reads and writes if it cannot.
			"io.Copy": func(tb testing.TB, c, s net.Conn) string {
				from, to := tcpPair(tb)
				const size = 1 << 20
				mustWrite(tb, c, "first") // redirected before the copy begins
				copied := make(chan error, 1)
				go func() {
					_, err := io.Copy(from, s)
					copied <- errors.Join(err, from.CloseWrite())
				}()
				go func() {
					_, err := c.Write(make([]byte, size))
					copied <- errors.Join(err, closeWrite(c))
				}()
				if err := to.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
					tb.Fatal(err)
				}
				n, err := io.Copy(io.Discard, to)
				if n != size+5 || err != nil {
					s.Close()
					c.Close()
					from.Close()
				}
				err = errors.Join(err, <-copied, <-copied)
				if n != size+5 || err != nil {
					return fmt.Sprintf("%d of %d bytes are copied (%v)", n, size+5, err)
				}
				return ""
			},
		},
		datapath.GuardULP: {
			"TCP_ULP": func(tb testing.TB, _, s net.Conn) (harm string) {
				control(tb, s.(*net.TCPConn), func(fd int) error {
					if err := unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_ULP, "tls"); !errors.Is(err, unix.ENOENT) {
						harm = fmt.Sprintf("TCP_ULP gives %v", err)
					}
					return unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1)
				})
				return harm
			},
		},
		datapath.GuardFIONREAD: {
			"FIONREAD": func(tb testing.TB, c, s net.Conn) (harm string) {
				unread := func() (n int) {
					control(tb, s.(*net.TCPConn), func(fd int) (err error) {
						n, err = unix.IoctlGetInt(fd, unix.TIOCINQ)
						return err
					})
					return n
				}
				if n := unread(); n != 0 {
					tb.Errorf("FIONREAD: got %d, want 0", n)
				}
				mustWrite(tb, c, "hello")
				if err := waitReadable(s); err != nil {
					tb.Fatal(err)
				}
				if n := unread(); n != 5 {
					harm = fmt.Sprintf("FIONREAD says %d for 5 bytes", n)
				}
				mustRead(tb, s, "hello")
				return harm
			},
		},
		datapath.GuardFlags: {
			"MSG_WAITALL": func(tb testing.TB, c, s net.Conn) (harm string) {
				fd := int(blocking(tb, s).(blockingSocket))
				for range 5 { // A receiver that begins late gets both halves.
					var n int
					if err := together(onThread(func() (err error) {
						n, _, err = unix.Recvfrom(fd, make([]byte, 100), unix.MSG_WAITALL)
						return err
					}), func() error {
						for range 2 {
							time.Sleep(100 * time.Millisecond) // until the receiver sleeps
							if _, err := c.Write(make([]byte, 50)); err != nil {
								return err
							}
						}
						return nil
					}); err != nil {
						tb.Fatal(err)
					}
					if n != 100 {
						return fmt.Sprintf("recv of 100 bytes with MSG_WAITALL gives %d", n)
					}
				}
				return ""
			},
			"MSG_OOB": func(tb testing.TB, c, s net.Conn) (harm string) {
				control(tb, c.(*net.TCPConn), func(fd int) error { return unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil) })
				got := make([]byte, 2)
				control(tb, s.(*net.TCPConn), func(fd int) error {
					// Where a byte comes in line, it is given for an urgent one as well; only that cannot be urgent by poll.
					n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, 3000)
					if err == nil && n == 0 {
						harm = "no urgent byte is there"
					}
					return err
				})
				control(tb, s.(*net.TCPConn), func(fd int) error {
					n, _, err := unix.Recvfrom(fd, got, unix.MSG_OOB)
					if err != nil || n != 1 || got[0] != '!' {
						harm = fmt.Sprintf("recv with MSG_OOB gives %q (%v)", got[:max(n, 0)], err)
					}
					return nil
				})
				return harm
			},
		},
	}
}

// TestGuards: with its guard, a call that the kernel does not serve on a
// shortcut socket does no harm; without it, it does. Where the kernel refuses
// trampolines, no pod can be enrolled with a guard.
func TestGuards(t *testing.T) {
	if hazard(t, "no-trampolines") {
		for _, name := range datapath.GuardNames() {
			n := mustNode(t, func(c *datapath.Config) { c.Guards = []string{name} })
			pod := sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{})
			if err := n.Enrol(sandboxtest.MustCookie(t, pod)); !errors.Is(err, unix.EPERM) {
				t.Errorf("enrol with guard %s: got error %v, want EPERM", name, err)
			}
			n.waitUsage(t, map[string]int{})
		}
		return
	}
	for guard, calls := range harms() {
		// Where FIONREAD counts redirected bytes, or kTLS is refused, the guard is not attached.
		if guard == datapath.GuardFIONREAD && !hazard(t, "fionread-redirected") || guard == datapath.GuardULP && !hazard(t, "ktls") {
			continue
		}
		for name, call := range calls {
			for _, on := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s guard=%v", name, on), func(t *testing.T) {
					n := mustNode(t, func(c *datapath.Config) {
						c.AllowBlocking, c.Guards = true, nil
						if on {
							c.Guards = []string{guard}
						}
					})
					pods, cookies := n.MustEnrol(t, "client", "server")
					n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
					l, address := mustListenOn(t, pods[1])
					c, s := connect(t, pods[0].Netns, l, "tcp4", address)
					n.warmUp(t, c, s)
					harm := call(t, c, s)
					t.Logf("harm: %q", harm)
					if on && harm != "" {
						t.Errorf("with guard %s: %s", guard, harm)
					}
					if !on && harm == "" {
						t.Error("no harm is done without the guard: the test shows nothing")
					}
					if !on {
						return
					}
					// The client sends the urgent byte, and the server asks for it.
					wantClients := []uint64{0}
					if name == "MSG_OOB" {
						wantClients = append(wantClients, cookies[0])
					}
					var clients []uint64
					for _, m := range n.unsupported(t) {
						if m.Netns != cookies[1] || m.Port != address.Port() {
							t.Errorf("got unsupported port %+v, want none but for the server's port", m)
						}
						clients = append(clients, m.Client)
					}
					if !slices.Equal(clients, wantClients) {
						t.Errorf("got unsupported ports of clients %v, want %v", clients, wantClients)
					}
					before := n.counts(t)
					c2, s2 := connect(t, pods[0].Netns, l, "tcp4", address)
					sandboxtest.MustPing(t, c2, s2, 2, 100)
					n.mustCount(t, before, map[string]uint64{"connection_unsupported": 1})
				})
			}
		}
	}
}

// TestGuardsComeAndGo: guards are attached while a pod takes part or a flow is
// left, survive the agent, and go if they are configured no more.
func TestGuardsComeAndGo(t *testing.T) {
	if hazard(t, "no-trampolines") {
		return // TestGuards has the refusal
	}
	n := mustNode(t, func(c *datapath.Config) { c.Guards = []string{datapath.GuardSplice, datapath.GuardFlags} })
	check := func(when string, want ...string) {
		t.Helper()
		if got := n.Guards(); !slices.Equal(got, want) {
			t.Errorf("guards %s: got %v, want %v", when, got, want)
		}
		pins, err := filepath.Glob(filepath.Join(n.Config.PinDir, "link_guard_*"))
		if err != nil {
			t.Fatal(err)
		}
		programs := []string{}
		for _, pin := range pins {
			programs = append(programs, strings.TrimPrefix(filepath.Base(pin), "link_guard_"))
		}
		wantPrograms := []string{}
		for _, guard := range want {
			wantPrograms = append(wantPrograms, map[string][]string{
				datapath.GuardFlags:  {"flags_of_recv", "flags_of_send"},
				datapath.GuardSplice: {"splice_begins", "splice_ends", "splice_refused", "splice_seen"},
			}[guard]...)
		}
		if diff := cmp.Diff(wantPrograms, programs); diff != "" {
			t.Errorf("pins %s (-want +got):\n%s", when, diff)
		}
	}
	reopen := func(guards ...string) {
		t.Helper()
		if err := n.Datapath.Close(); err != nil {
			t.Fatal(err)
		}
		n.Config.Guards = guards
		n.MustOpen(t)
	}
	check("before a pod takes part")
	pods, cookies := n.MustEnrol(t, "client", "server")
	check("with pods", "flags", "splice")
	reopen("flags", "splice")
	check("after a take-over", "flags", "splice")
	if err := os.Remove(filepath.Join(n.Config.PinDir, "link_guard_splice_ends")); err != nil {
		t.Fatal(err)
	}
	reopen("flags", "splice")
	check("after a pin was deleted", "flags", "splice")
	reopen("splice")
	check("with one switched off", "splice")

	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(t, pods[1])
	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	n.warmUp(t, c, s)
	for _, cookie := range cookies {
		if err := n.Release(cookie); err != nil {
			t.Fatal(err)
		}
	}
	check("with a flow left", "splice")
	n.closeAll(t, c, s)
	if err := n.Sweep(time.Hour); err != nil {
		t.Fatal(err)
	}
	check("with nothing left")
}

func mustWrite(tb testing.TB, w io.Writer, text string) {
	tb.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		tb.Fatal(err)
	}
}

func mustRead(tb testing.TB, r io.Reader, want string) {
	tb.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, []byte(want)) {
		tb.Fatalf("got %q (%v), want %q", got, err, want)
	}
}

func waitReadable(c net.Conn) error {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	ready := 0
	for end := time.Now().Add(deadline); err == nil && ready == 0 && time.Now().Before(end); {
		control := raw.Control(func(fd uintptr) {
			ready, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		})
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
		err = errors.Join(err, control)
	}
	return err
}

// tcpPair returns a connection of the test's own over loopback.
func tcpPair(tb testing.TB) (from, to *net.TCPConn) {
	tb.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// taskEnv makes the test binary run a task instead of tests.
const taskEnv = "PODSHUNT_TEST_TASK"

// task is what a child process does to pins until it is killed.
type task struct {
	Unload         bool // otherwise it opens
	Cgroup, PinDir string
	MaxFlows       uint32
	// KillAt is the step before which the process kills itself; 0 never.
	KillAt int
}

// runTask prints the steps that it comes by, and returns the exit status.
func runTask(text string) int {
	var t task
	err := json.Unmarshal([]byte(text), &t)
	if err == nil {
		err = t.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (t task) run() error {
	n := 0
	step := func(name string) error {
		if n++; n == t.KillAt {
			return unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		fmt.Println(name)
		return nil
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if t.Unload {
		d, err := datapath.OpenPinsInSteps(t.PinDir, log, step)
		if err != nil {
			return err
		}
		_, err = d.Unload(ctx)
		return errors.Join(err, d.Close())
	}
	cfg := datapath.DefaultConfig()
	cfg.Cgroup, cfg.PinDir, cfg.MaxFlows = t.Cgroup, t.PinDir, t.MaxFlows
	d, err := datapath.OpenInSteps(cfg, log, step)
	if err != nil {
		return err
	}
	return d.Close()
}

// mustRunTask runs a task in a process of its own and returns the steps that it
// came by. It must be killed at killAt, or end well if that is 0.
func (n *node) mustRunTask(tb testing.TB, unload bool, killAt int) (steps []string) {
	tb.Helper()
	text, err := json.Marshal(task{Unload: unload, Cgroup: n.Config.Cgroup, PinDir: n.Config.PinDir, MaxFlows: n.Config.MaxFlows, KillAt: killAt})
	if err != nil {
		tb.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), taskEnv+"="+string(text))
	cmd.Stderr = tb.Output()
	out, err := cmd.Output()
	if ctx.Err() != nil {
		tb.Fatalf("task: %v", ctx.Err())
	}
	if exit := (*exec.ExitError)(nil); killAt > 0 && errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == unix.SIGKILL {
			err = nil
		}
	} else if killAt > 0 {
		tb.Fatalf("task: got %v, want it killed at step %d", err, killAt)
	}
	if err != nil {
		tb.Fatalf("task: %v", err)
	}
	return strings.Fields(strings.ReplaceAll(string(out), " ", "_"))
}

// killSteps returns at which of the steps to kill: at all of them, or with
// -test.short at the first and the last one of each kind.
func killSteps(steps []string) (at []int) {
	for i, step := range steps {
		before, after := slices.Contains(steps[:i], step), slices.Contains(steps[i+1:], step)
		if !testing.Short() || !before || !after {
			at = append(at, i+1)
		}
	}
	return at
}

// wantPinned wants these directories of ours in the bpffs, and no others.
func (n *node) wantPinned(tb testing.TB, want ...string) {
	tb.Helper()
	entries, err := os.ReadDir(n.BPF)
	if err != nil {
		tb.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(n.Config.PinDir)) {
			got = append(got, e.Name())
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		tb.Errorf("directories of pins (-want +got):\n%s", diff)
	}
}

// kernelObjects are what pins hold, by id.
type kernelObjects struct {
	maps  []ebpf.MapID
	links []link.ID
}

// mustObjects returns what is pinned in a directory.
func mustObjects(tb testing.TB, dir string) (objects kernelObjects) {
	tb.Helper()
	pins, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatal(err)
	}
	for _, pin := range pins {
		path := filepath.Join(dir, pin.Name())
		if strings.HasPrefix(pin.Name(), "link_") {
			l, err := link.LoadPinnedLink(path, nil)
			if err != nil {
				tb.Fatal(err)
			}
			info, err := l.Info()
			if err := errors.Join(err, l.Close()); err != nil {
				tb.Fatal(err)
			}
			objects.links = append(objects.links, info.ID)
			continue
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			tb.Fatal(err)
		}
		info, err := m.Info()
		if err := errors.Join(err, m.Close()); err != nil {
			tb.Fatal(err)
		}
		id, _ := info.ID()
		objects.maps = append(objects.maps, id)
	}
	return objects
}

// left counts those that the kernel still has.
func (o kernelObjects) left(tb testing.TB) (left int) {
	tb.Helper()
	for _, id := range o.maps {
		m, err := ebpf.NewMapFromID(id)
		if err == nil {
			left++
			m.Close()
		} else if !errors.Is(err, fs.ErrNotExist) {
			tb.Fatal(err)
		}
	}
	for _, id := range o.links {
		l, err := link.NewFromID(id)
		if err == nil {
			left++
			l.Close()
		} else if !errors.Is(err, fs.ErrNotExist) {
			tb.Fatal(err)
		}
	}
	return left
}

func (o kernelObjects) waitGone(tb testing.TB) {
	tb.Helper()
	waitUntil(tb, "the end of all kernel objects", func() bool { return o.left(tb) == 0 })
}

// closedUnread makes a connection that has ended at both ends, with a message
// that the server's program has not read and by the shortcut. No pair tells of it.
func closedUnread(tb testing.TB, n *node, from *sandbox.Netns, l net.Listener) (server net.Conn, message traffic) {
	tb.Helper()
	message = traffic{seed: 9, bytes: 20_000, maxWrite: 5000, maxRead: 7000}
	before, pairs := n.counts(tb), n.usage(tb)["flows"]
	c, s := connect(tb, from, l, "tcp4", l.Addr().(*net.TCPAddr).AddrPort())
	sandboxtest.MustPing(tb, c, s, 2, 100)
	if err := errors.Join(closeWrite(s), wantEOF(c), message.write(c), c.Close()); err != nil {
		tb.Fatal(err)
	}
	if got := n.since(tb, before)["message_shortcut"]; got < 4 {
		tb.Fatalf("got %d messages by shortcut, want 4 or more", got)
	}
	waitUntil(tb, "the end of the pair", func() bool { return n.usage(tb)["flows"] == pairs })
	return s, message
}

// readClosed reads what such a connection has left, and closes it.
func readClosed(tb testing.TB, server net.Conn, message traffic) {
	tb.Helper()
	if err := errors.Join(message.read(server), wantEOF(server), server.Close()); err != nil {
		tb.Errorf("what a closed connection has left unread: %v", err)
	}
}

// load is what the connections of a node with two pods are when it is killed.
type load struct {
	pods []*sandbox.Pod
	c, s net.Conn
	// unread is a connection that has ended, with message unread.
	unread  net.Conn
	message traffic
	old     kernelObjects
}

func (n *node) mustLoad(tb testing.TB, pods []*sandbox.Pod) load {
	tb.Helper()
	w := load{pods: pods, old: mustObjects(tb, n.Config.PinDir)}
	var cookies []uint64
	for _, pod := range pods {
		cookie := sandboxtest.MustCookie(tb, pod)
		if err := n.Enrol(cookie); err != nil {
			tb.Fatal(err)
		}
		cookies = append(cookies, cookie)
	}
	n.MustSetPolicy(tb, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(tb, pods[1])
	w.c, w.s = connect(tb, pods[0].Netns, l, "tcp4", address)
	before := n.counts(tb)
	sandboxtest.MustPing(tb, w.c, w.s, 10, 100)
	if got := n.since(tb, before)["message_shortcut"]; got != 18 {
		tb.Fatalf("got %d messages by shortcut, want 18", got)
	}
	w.unread, w.message = closedUnread(tb, n, pods[0].Netns, l)
	return w
}

// mustEnd wants that nothing was lost, and that nothing of before is left once
// the closed connection's program has closed it.
func (w load) mustEnd(tb testing.TB) {
	tb.Helper()
	sandboxtest.MustPing(tb, w.c, w.s, 10, 1000)
	readClosed(tb, w.unread, w.message)
	w.old.waitGone(tb)
	sandboxtest.MustPing(tb, w.c, w.s, 10, 1000)
	w.c.Close()
	w.s.Close()
}

// mustFinish ends what a killed process has left, by an unload or by a new start,
// and leaves the node open.
func (n *node) mustFinish(tb testing.TB, unload bool) {
	tb.Helper()
	if unload {
		n.mustUnloadPins(tb)
		n.wantPinned(tb)
	}
	n.MustOpen(tb)
	n.wantPinned(tb, "podshunt", "podshunt_lock")
}

// mustUnloadPins unloads as the command does where no agent runs.
func (n *node) mustUnloadPins(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), deadline)
	defer cancel()
	d, err := datapath.OpenPins(n.Config.PinDir, n.Log)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		tb.Fatal(err)
	}
	waiting, err := d.Unload(ctx)
	if err := errors.Join(err, d.Close()); err != nil {
		tb.Fatalf("unload: %v, waiting for %+v", err, waiting)
	}
}

// TestUnloadKilled: an unload that is killed at any step is finished by the next
// start, and by the next unload. No connection loses a byte.
func TestUnloadKilled(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	w := n.mustLoad(t, pods)
	n.mustClose(t)
	steps := n.mustRunTask(t, true, 0)
	n.wantPinned(t)
	w.mustEnd(t)
	n.MustOpen(t)
	for _, step := range []string{"drained", "renamed", "track_detached", "take_out_a_socket", "delete_a_pin", "delete_the_directory"} {
		if !slices.Contains(steps, step) {
			t.Fatalf("got steps %q, want %s among them", steps, step)
		}
	}
	for _, at := range killSteps(steps) {
		for _, unload := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d %s, then unload %v", at, steps[at-1], unload), func(t *testing.T) {
				w := n.mustLoad(t, pods)
				n.mustClose(t)
				n.mustRunTask(t, true, at)
				// Whatever was left is as good for connections as what was there before.
				sandboxtest.MustPing(t, w.c, w.s, 2, 100)
				n.mustFinish(t, unload)
				if steps[at-1] == "drained" && !unload {
					// The pins had not been touched: they are taken over.
					n.mustUnloadPinsOf(t, w)
					return
				}
				w.mustEnd(t)
			})
		}
	}
}

// mustUnloadPinsOf takes down what was taken over, and loads anew.
func (n *node) mustUnloadPinsOf(tb testing.TB, w load) {
	tb.Helper()
	if w.old.left(tb) < len(w.old.maps) {
		tb.Error("got new maps, want those of before taken over")
	}
	n.mustClose(tb)
	n.mustFinish(tb, true)
	w.mustEnd(tb)
}

// TestOpenKilled: a bring-up that is killed at any step is deleted, or, if it was
// complete, taken over; a take-over that is killed can be done again.
func TestOpenKilled(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	for _, published := range []bool{false, true} {
		prepare := func(t *testing.T) {
			n.mustClose(t)
			n.mustUnloadPins(t)
			if published {
				n.MustOpen(t)
				n.mustClose(t)
			}
		}
		prepare(t)
		steps := n.mustRunTask(t, false, 0)
		n.MustOpen(t)
		want := []string{"directory_made", "map_pinned", "next_attachment", "all_attached", "published"}
		if published {
			want = []string{"next_attachment"}
		}
		for _, step := range want {
			if !slices.Contains(steps, step) {
				t.Fatalf("got steps %q, want %s among them", steps, step)
			}
		}
		for i, at := range killSteps(steps) {
			for _, unload := range []bool{false, true} {
				if testing.Short() && unload == (i%2 == 0) {
					continue // the other half: each of these loads programs five times
				}
				t.Run(fmt.Sprintf("published %v, %d %s, then unload %v", published, at, steps[at-1], unload), func(t *testing.T) {
					prepare(t)
					n.mustRunTask(t, false, at)
					complete := published || steps[at-1] == "published"
					dir := n.Config.PinDir
					if complete {
						n.wantPinned(t, "podshunt", "podshunt_lock")
					} else {
						dir += "_new"
						n.wantPinned(t, "podshunt_lock", "podshunt_new")
					}
					killed := mustObjects(t, dir)
					n.mustFinish(t, unload)
					if unload || !complete {
						killed.waitGone(t)
					}
					w := n.mustLoad(t, pods)
					n.mustClose(t)
					n.mustUnloadPins(t)
					w.mustEnd(t)
					n.MustOpen(t)
				})
			}
		}
	}
}

// TestUnloadGoesOn: an unload that fails at any step is not done, and deletes no
// pin before all sockets are out; the next one goes on.
func TestUnloadGoesOn(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	n.mustClose(t)
	errBroken := errors.New("broken on purpose")
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	for at, last := 1, false; !last; at++ {
		calls, failed := 0, ""
		counting := false
		d, err := datapath.OpenInSteps(n.Config, n.Log, func(step string) error {
			if counting {
				if calls++; calls == at {
					failed = step
					return errBroken
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		n.Datapath = d
		w := n.mustLoad(t, pods)
		pinned := len(w.old.maps)
		counting = true
		_, err = n.Unload(ctx)
		if last = failed == ""; last {
			if err != nil {
				t.Fatal(err)
			}
		} else {
			if !errors.Is(err, errBroken) {
				t.Fatalf("%s: got %v, want %v", failed, err, errBroken)
			}
			if failed == "take out a socket" {
				left := mustObjects(t, n.Config.PinDir+"_old")
				if len(left.maps) != pinned {
					t.Errorf("got %d maps pinned, want all %d: a socket is still in the SOCKHASH", len(left.maps), pinned)
				}
			}
			sandboxtest.MustPing(t, w.c, w.s, 2, 100)
			if err := n.Enrol(sandboxtest.MustCookie(t, pods[0])); failed != "" && !errors.Is(err, datapath.ErrUnloaded) {
				t.Errorf("%s: enrol: got %v, want %v", failed, err, datapath.ErrUnloaded)
			}
			if waiting, err := n.Unload(ctx); err != nil {
				t.Fatalf("%s: unload again: %v, waiting for %+v", failed, err, waiting)
			}
		}
		n.wantPinned(t)
		if got := n.Left(); got != 1 && failed != "delete a pin" && failed != "delete the directory" {
			t.Errorf("%s: got %d sockets left, want the one that is closed and has bytes unread", failed, got)
		}
		w.mustEnd(t)
		if at > 100 {
			t.Fatal("no unload came to its end")
		}
	}
	n.MustOpen(t)
}

// TestOpenedAtOnce: who comes while another one makes the pins, or takes them
// down, is told so, and touches nothing.
func TestOpenedAtOnce(t *testing.T) {
	n := mustNode(t, nil)
	n.mustClose(t)
	n.mustUnloadPins(t)
	steps := map[string]int{}
	intrude := func(step string) error {
		steps[step]++
		if d, err := datapath.Open(n.Config, n.Log); !errors.Is(err, datapath.ErrInUse) {
			return fmt.Errorf("%s: a second Open: got %v %v, want %w", step, d, err, datapath.ErrInUse)
		}
		if d, err := datapath.OpenPins(n.Config.PinDir, n.Log); !errors.Is(err, datapath.ErrInUse) {
			return fmt.Errorf("%s: OpenPins: got %v %v, want %w", step, d, err, datapath.ErrInUse)
		}
		return nil
	}
	d, err := datapath.OpenInSteps(n.Config, n.Log, intrude)
	if err != nil {
		t.Fatal(err)
	}
	n.Datapath = d
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustListenOn(t, pods[1])
	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 10, 100)
	n.mustCount(t, nil, paired())
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if _, err := n.Unload(ctx); err != nil {
		t.Fatal(err)
	}
	n.wantPinned(t)
	sandboxtest.MustPing(t, c, s, 10, 100)
	for _, step := range []string{"directory made", "map pinned", "all attached", "renamed", "take out a socket", "delete a pin"} {
		if steps[step] == 0 {
			t.Errorf("got steps %v, want %s among them", steps, step)
		}
	}

	// Of many at once one gets the pins, and the others leave them whole.
	type opened struct {
		*datapath.Datapath
		err error
	}
	for range 3 {
		const agents = 4
		results := make(chan opened, agents)
		for range agents {
			go func() {
				d, err := datapath.Open(n.Config, n.Log)
				results <- opened{d, err}
			}()
		}
		var winners []*datapath.Datapath
		for range agents {
			r := <-results
			if r.err == nil {
				winners = append(winners, r.Datapath)
			} else if !errors.Is(r.err, datapath.ErrInUse) {
				t.Errorf("got %v, want %v", r.err, datapath.ErrInUse)
			}
		}
		if len(winners) != 1 {
			t.Fatalf("got %d agents with the pins, want 1", len(winners))
		}
		n.wantPinned(t, "podshunt", "podshunt_lock")
		if _, err := winners[0].Unload(ctx); err != nil {
			t.Fatal(err)
		}
		n.wantPinned(t)
	}
	n.MustOpen(t)
}

// TestDeletedMap: the pin of a map that somebody has deleted is made again from
// the programs that have the map, by the next start and by an unload.
func TestDeletedMap(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	w := n.mustLoad(t, pods)
	pins, err := os.ReadDir(n.Config.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		if strings.HasPrefix(pin.Name(), "link_") {
			continue
		}
		n.mustClose(t)
		if err := os.Remove(filepath.Join(n.Config.PinDir, pin.Name())); err != nil {
			t.Fatal(err)
		}
		n.MustOpen(t)
		before := n.counts(t)
		sandboxtest.MustPing(t, w.c, w.s, 10, 100)
		n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
		if got := mustObjects(t, n.Config.PinDir); len(got.maps) != len(w.old.maps) {
			t.Errorf("%s: got %d maps pinned, want %d", pin.Name(), len(got.maps), len(w.old.maps))
		}
	}
	n.mustClose(t)
	n.mustFinish(t, true)
	w.mustEnd(t)
	for _, pin := range pins {
		if strings.HasPrefix(pin.Name(), "link_") {
			continue
		}
		t.Run("unload without "+pin.Name(), func(t *testing.T) {
			w := n.mustLoad(t, pods)
			n.mustClose(t)
			if err := os.Remove(filepath.Join(n.Config.PinDir, pin.Name())); err != nil {
				t.Fatal(err)
			}
			n.mustFinish(t, true)
			w.mustEnd(t)
		})
	}
}

// TestDeletedPins: where nothing tells any more which map was pinned, the rest is
// taken down without losing a byte, by the next start and by an unload; unless
// redirecting cannot be turned off, which is an error until no socket is left.
func TestDeletedPins(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	remove := func(t *testing.T, name string) {
		t.Helper()
		links, err := filepath.Glob(filepath.Join(n.Config.PinDir, "link_*"))
		if err != nil || len(links) == 0 {
			t.Fatalf("got pins %q, %v; want some", links, err)
		}
		for _, l := range links {
			mustDetach(t, l)
		}
		if err := os.Remove(filepath.Join(n.Config.PinDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"pods", "flows", "sockets"} {
		for _, unload := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, unload %v", name, unload), func(t *testing.T) {
				w := n.mustLoad(t, pods)
				unread := traffic{seed: 3, bytes: 30_000, maxWrite: 10_000, maxRead: 10_000}
				if err := unread.write(w.c); err != nil {
					t.Fatal(err)
				}
				if unload && name == "pods" {
					// An unload that knows who has to read waits for it.
					if err := unread.read(w.s); err != nil {
						t.Fatal(err)
					}
					unread.bytes = 0
				}
				n.mustClose(t)
				remove(t, name)
				n.mustFinish(t, unload)
				// What follows by TCP is behind it.
				later := traffic{seed: 4, bytes: 5000, maxWrite: 1000, maxRead: 1000}
				if err := errors.Join(later.write(w.c), unread.read(w.s), later.read(w.s)); err != nil {
					t.Fatal(err)
				}
				sandboxtest.MustPing(t, w.c, w.s, 10, 1000)
				readClosed(t, w.unread, w.message)
				w.c.Close()
				w.s.Close()
				w.old.waitGone(t)
			})
		}
	}
	t.Run("control", func(t *testing.T) {
		w := n.mustLoad(t, pods)
		n.mustClose(t)
		remove(t, "control")
		wantAdvice := func(err error) {
			t.Helper()
			if err == nil || !strings.Contains(err.Error(), "the pin of map control is gone") || !strings.Contains(err.Error(), "then delete "+n.Config.PinDir) {
				t.Errorf("got %v, want an error that says what to do", err)
			}
		}
		_, err := datapath.Open(n.Config, n.Log)
		wantAdvice(err)
		d, err := datapath.OpenPins(n.Config.PinDir, n.Log)
		if err != nil {
			t.Fatal(err)
		}
		_, err = d.Unload(t.Context())
		wantAdvice(errors.Join(err, d.Close()))
		n.wantPinned(t, "podshunt", "podshunt_lock")
		sandboxtest.MustPing(t, w.c, w.s, 10, 1000)
		readClosed(t, w.unread, w.message)
		w.c.Close()
		w.s.Close()
		waitUntil(t, "an open after the last socket is closed", func() bool {
			d, err = datapath.Open(n.Config, n.Log)
			return err == nil
		})
		n.Datapath = d
		w.old.waitGone(t)
	})
}

// TestAllPinsDeleted: an agent whose pins somebody has deleted can still unload.
func TestAllPinsDeleted(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	w := n.mustLoad(t, pods)
	if err := os.RemoveAll(n.Config.PinDir); err != nil {
		t.Fatal(err)
	}
	before := n.counts(t)
	sandboxtest.MustPing(t, w.c, w.s, 10, 100)
	n.mustCount(t, before, map[string]uint64{"message_shortcut": 20})
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if _, err := n.Unload(ctx); err != nil {
		t.Fatal(err)
	}
	n.wantPinned(t)
	w.mustEnd(t)
	n.MustOpen(t)
}

// TestUnloadClosedUnread: what was redirected and is unread when a connection has
// ended at both ends is still its program's to read after an unload.
func TestUnloadClosedUnread(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, _ := mustListenOn(t, pods[1])
	s, message := closedUnread(t, n, pods[0].Netns, l)
	old := mustObjects(t, n.Config.PinDir)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if _, err := n.Unload(ctx); err != nil {
		t.Fatal(err)
	}
	if got := n.Left(); got != 1 {
		t.Errorf("got %d sockets left, want 1", got)
	}
	n.wantPinned(t)
	readClosed(t, s, message)
	old.waitGone(t)
	n.MustOpen(t)
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m.Run)) }

// agent is the agent of a sandbox; it runs between mustStart and stop.
type agent struct {
	*sandbox.Sandbox
	podsFile string
	plugin   string   // the file to install as the plugin; empty: that beside this program
	source   []string // flags that say where the agent learns of pods
	stop     func()
}

func mustAgent(t testing.TB) *agent {
	t.Helper()
	s := sandbox.MustNew(t, sandbox.Config{Podshunt: true})
	podsFile := filepath.Join(s.Base, "pods.yaml")
	return &agent{Sandbox: s, podsFile: podsFile, source: []string{"--pods-file=" + podsFile}}
}

// places returns the flags that a command needs to find this agent.
func (a *agent) places() []string {
	return []string{
		a.runDir(), "--pin-dir=" + filepath.Join(a.BPF, "podshunt"), "--cgroup=" + a.Cgroup,
	}
}

func (a *agent) runDir() string { return "--run-dir=" + filepath.Dir(a.AgentSocket) }

// mustStart runs the agent until stop is called or the test ends.
func (a *agent) mustStart(t testing.TB, flags ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	// The shortcut from the second message on, however long a test takes.
	soon := []string{"--trial-reads=1", "--trial-bytes=0", "--trial-drains=0", "--refresh-interval=0"}
	cfg := mustConfig(t, slices.Concat(a.source, a.places(), soon, flags)...)
	cfg.cni.Plugin = cmp.Or(a.plugin, cfg.cni.Plugin)
	go func() { done <- runAgent(ctx, cfg, newLogger(t.Output(), cfg)) }()
	stopped := false
	a.stop = func() {
		t.Helper()
		cancel()
		if stopped {
			return
		}
		stopped = true
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("agent: %v", err)
			}
		case <-time.After(2 * time.Minute):
			t.Error("the agent does not stop")
		}
	}
	t.Cleanup(a.stop)
	// It measures the kernel first, which takes long where QEMU emulates the CPU.
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialTimeout("unix", a.AgentSocket, time.Second)
		if err == nil {
			conn.Close()
			return
		}
		select {
		case err := <-done:
			stopped = true
			t.Fatalf("agent: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the agent does not listen")
		}
	}
}

func (a *agent) mustWritePods(t testing.TB, entries ...string) {
	t.Helper()
	text := "pods:\n"
	for _, e := range entries {
		name, annotations, _ := strings.Cut(e, " ")
		text += fmt.Sprintf("- {namespace: default, name: %s, annotations: {%s}}\n", name, annotations)
	}
	if err := os.WriteFile(a.podsFile+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(a.podsFile+".new", a.podsFile); err != nil {
		t.Fatal(err)
	}
}

// mustShow runs a command with -o json.
func mustShow[T any](t testing.TB, a *agent, command string) T {
	t.Helper()
	var out bytes.Buffer
	if err := run(t.Context(), []string{command, "-o", "json", a.runDir()}, &out, t.Output()); err != nil {
		t.Fatal(err)
	}
	var answer T
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// waitFor waits until the agent shows what is wanted.
func waitFor[T any](t testing.TB, what string, get func() T, ok func(T) bool) T {
	t.Helper()
	const limit = 20 * time.Second
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		got := get()
		if ok(got) {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v: %+v", what, limit, got)
		}
	}
}

// states returns "pod: takes part" or "pod: reason".
func (a *agent) states(t testing.TB) []string {
	t.Helper()
	var states []string
	for _, p := range mustShow[api.Status](t, a, "status").Pods {
		state := "takes part"
		if !p.Enrolled {
			state = p.Message
		}
		states = append(states, p.Pod.Name+": "+state)
	}
	slices.Sort(states)
	return states
}

// connection is a TCP connection with both ends.
type connection struct{ client, server net.Conn }

func mustConnect(t testing.TB, from, to *sandbox.Pod, l net.Listener) connection {
	t.Helper()
	port := l.Addr().(*net.TCPAddr).Port
	return mustConnectTo(t, from, net.JoinHostPort(to.IPv4.String(), fmt.Sprint(port)), l)
}

// mustConnectTo dials an address that leads to l.
func mustConnectTo(t testing.TB, from *sandbox.Pod, address string, l net.Listener) connection {
	t.Helper()
	accepted := make(chan net.Conn, 1)
	go func() {
		if conn, err := l.Accept(); err == nil {
			accepted <- conn
		}
	}()
	c := connection{client: from.MustDial(t, "tcp4", address)}
	select {
	case c.server = <-accepted:
	case <-time.After(10 * time.Second):
		t.Fatal("the connection is not accepted")
	}
	t.Cleanup(func() { c.server.Close() })
	if err := c.server.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c
}

// mustPing sends a message each way a few times.
func (c connection) mustPing(t testing.TB) {
	t.Helper()
	for range 5 {
		for _, way := range [][2]net.Conn{{c.client, c.server}, {c.server, c.client}} {
			got := make([]byte, 100)
			if _, err := way[0].Write(got); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(way[1], got); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// flow returns what the agent shows of a connection.
func (c connection) flow(t testing.TB, a *agent) api.Flow {
	t.Helper()
	var found []api.Flow
	for _, f := range mustShow[api.FlowList](t, a, "flows").Items {
		if f.Client.Address.String() == c.client.LocalAddr().String() && f.OrigDst.String() == c.client.RemoteAddr().String() {
			found = append(found, f)
		}
	}
	if len(found) != 1 {
		t.Fatalf("got %d flows for one connection: %+v", len(found), found)
	}
	return found[0]
}

func shortcut(f api.Flow) bool { return f.Paired && f.ToServer.Shortcut && f.ToClient.Shortcut }

// mustTakePart waits for pods: on a slow machine the plugin does not wait until
// the guards are attached.
func (a *agent) mustTakePart(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		waitFor(t, "pod", func() []string { return a.states(t) },
			func(s []string) bool { return slices.Contains(s, name+": takes part") })
	}
}

func TestAgent(t *testing.T) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.mustWritePods(t, "client "+on, "web "+on+", podshunt.io/exclude-ports: '2222'")
	// The agent is not there yet: the plugin leaves word.
	client := a.MustAddPod(t, "client", sandbox.PodOptions{})
	a.mustStart(t, "--kernel-hazards=accept")
	web := a.MustAddPod(t, "web", sandbox.PodOptions{})
	plain := a.MustAddPod(t, "plain", sandbox.PodOptions{})
	notListed := "not opted in: no entry in " + a.podsFile
	wantDiff(t, "pods", []string{"client: takes part", "plain: " + notListed, "web: takes part"}, a.states(t))

	all := web.MustListen(t, "tcp4", ":0")
	c := mustConnect(t, client, web, all)
	c.mustPing(t)
	if f := c.flow(t, a); !shortcut(f) || f.Client.Pod.Name != "client" || f.Server.Pod.Name != "web" {
		t.Errorf("got %+v, want a shortcut from client to web", f)
	}
	excluded := mustConnect(t, client, web, web.MustListen(t, "tcp4", ":2222"))
	wantDiff(t, "excluded port", "server port in podshunt.io/exclude-ports", excluded.flow(t, a).Message)
	toPlain := mustConnect(t, client, plain, plain.MustListen(t, "tcp4", ":0"))
	wantDiff(t, "plain pod", "default/plain: "+notListed, toPlain.flow(t, a).Message)

	if err := run(t.Context(), append([]string{"run", "--pods-file=x"}, a.places()...), io.Discard, io.Discard); err == nil ||
		!strings.Contains(err.Error(), fmt.Sprintf("process %d holds", os.Getpid())) {
		t.Errorf("second agent: got error %v, want one that names the process of the first", err)
	}

	// Opted in later: the open connection stays on TCP and says why.
	a.mustWritePods(t, "client "+on, "web "+on+", podshunt.io/exclude-ports: '2222'", "plain "+on)
	waitFor(t, "plain opted in", func() []string { return a.states(t) }, func(s []string) bool { return s[1] == "plain: takes part" })
	if got, want := toPlain.flow(t, a).Message, "connected before both pods took part"; !strings.HasPrefix(got, want) {
		t.Errorf("got reason %q, want %q", got, want)
	}

	// A restart is not noticed.
	a.stop()
	c.mustPing(t)
	a.mustStart(t, "--kernel-hazards=accept")
	c.mustPing(t)
	if f := c.flow(t, a); !shortcut(f) || f.ToServer.Switches != 1 || f.ToServer.TCPBytes != 100 {
		t.Errorf("got %+v %+v, want it on the shortcut all the time", f, f.ToServer)
	}

	pause := func(d time.Duration) {
		end := time.Now().Add(d).Format(time.RFC3339Nano)
		a.mustWritePods(t, "client "+on, "web "+on+", podshunt.io/paused-until: '"+end+"'")
	}
	pause(time.Hour)
	waitFor(t, "pause", func() api.Flow { c.mustPing(t); return c.flow(t, a) }, func(f api.Flow) bool {
		return !f.ToServer.Shortcut && slices.Equal(f.ToServer.Details, []string{"server_paused"})
	})
	pause(time.Second) // ends by itself
	waitFor(t, "end of the pause", func() api.Flow { c.mustPing(t); return c.flow(t, a) }, shortcut)

	// Opted out, the connection is back on TCP.
	a.mustWritePods(t, "client "+on, "web podshunt.io/shortcut: disabled")
	waitFor(t, "opted out", func() api.Flow { c.mustPing(t); return c.flow(t, a) }, func(f api.Flow) bool {
		return !f.ToServer.Shortcut && !f.ToClient.Shortcut && f.ToServer.Message == "not allowed (default/web: not opted in by podshunt.io/shortcut)"
	})

	var out bytes.Buffer
	if err := run(t.Context(), append([]string{"unload"}, a.places()[:2]...), &out, t.Output()); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "unload", "unloaded: nothing of podshunt is left in the kernel\n", out.String())
	if status := mustShow[api.Status](t, a, "status"); !status.Unloaded || status.Pods[0].Enrolled {
		t.Errorf("got %+v, want it unloaded", status)
	}
	c.mustPing(t)
	if err := a.DelPod(plain); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "pods after DEL", 2, len(a.states(t)))
}

func TestUnloadWithoutAgent(t *testing.T) {
	a := mustAgent(t)
	a.mustWritePods(t, "web podshunt.io/shortcut: enabled")
	a.mustStart(t, "--kernel-hazards=accept")
	web := a.MustAddPod(t, "web", sandbox.PodOptions{})
	a.mustTakePart(t, "web")
	l := web.MustListen(t, "tcp4", ":0")
	c := mustConnect(t, web, web, l)
	c.mustPing(t)
	if _, err := c.client.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	a.stop()

	unload := func(timeout string) (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"unload", "--timeout=" + timeout}, a.places()[:2]...), &out, t.Output())
		return out.String(), err
	}
	out, err := unload("100ms")
	if err == nil || !strings.Contains(err.Error(), "1 connections have not read") || !strings.Contains(out, c.client.LocalAddr().String()) {
		t.Errorf("got error %v and\n%s\nwant the connection that has not read", err, out)
	}
	if _, err := io.ReadFull(c.server, make([]byte, len("unread"))); err != nil {
		t.Fatal(err)
	}
	if _, err := unload("10s"); err != nil {
		t.Errorf("unload: %v", err)
	}
	if _, err := os.Stat(filepath.Join(a.BPF, "podshunt")); !os.IsNotExist(err) {
		t.Errorf("got %v for the pin directory, want it gone", err)
	}
	if _, err := unload("10s"); err != nil {
		t.Errorf("unload again: %v", err)
	}
}

// With the default settings nobody takes part on a kernel with a fatal hazard, and
// whoever wants to on one whose hazards are absent or guarded.
func TestHazardsRefused(t *testing.T) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.mustWritePods(t, "client "+on, "web "+on)
	a.mustStart(t)
	client := a.MustAddPod(t, "client", sandbox.PodOptions{})
	web := a.MustAddPod(t, "web", sandbox.PodOptions{})
	want := refuseHazards(mustShow[api.Status](t, a, "status").Hazards)
	if want == "" {
		a.mustTakePart(t, "client", "web")
	}
	status := mustShow[api.Status](t, a, "status")
	for _, got := range status.Pods {
		if got.Message != want || got.Enrolled != (want == "") {
			t.Errorf("got %+v, want the reason %q", got, want)
		}
	}
	c := mustConnect(t, client, web, web.MustListen(t, "tcp4", ":0"))
	c.mustPing(t)
	if f := c.flow(t, a); shortcut(f) != (want == "") {
		t.Errorf("got %+v, want the shortcut %v", f, want == "")
	}
	var out bytes.Buffer
	if err := run(t.Context(), append([]string{"unload"}, a.places()[:2]...), &out, t.Output()); err != nil {
		t.Error(err)
	}
}

// What a connection uses that is not served is told and remembered, until it is forgotten.
func TestForget(t *testing.T) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.mustWritePods(t, "client "+on, "web "+on)
	a.mustStart(t, "--kernel-hazards=accept")
	client := a.MustAddPod(t, "client", sandbox.PodOptions{})
	web := a.MustAddPod(t, "web", sandbox.PodOptions{})
	a.mustTakePart(t, "client", "web")
	l := web.MustListen(t, "tcp4", ":0")
	c := mustConnect(t, client, web, l)
	c.mustPing(t)
	raw, err := c.server.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1)
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.mustPing(t)
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	unsupported := mustShow[api.Status](t, a, "status").UnsupportedPorts
	if len(unsupported) != 1 || unsupported[0].Pod.Name != "web" || unsupported[0].Port != port || !slices.Equal(unsupported[0].Reasons, []string{"so_zerocopy"}) {
		t.Errorf("got %+v, want the server's port with SO_ZEROCOPY", unsupported)
	}
	again := mustConnect(t, client, web, l)
	again.mustPing(t)
	wantDiff(t, "reason", "an earlier connection to this server port used SO_ZEROCOPY, which does not work on the shortcut: "+
		"`podshunt-agent forget` lets new ones be paired again", again.flow(t, a).Message)

	forget := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"forget", a.runDir()}, args...), &out, t.Output())
		return out.String(), err
	}
	if _, err := forget("default/none"); err == nil || !strings.Contains(err.Error(), "pod default/none: not on this node") {
		t.Errorf("got error %v for a pod that is not there", err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"default/client"}, "server ports forgotten: 0\n"},
		{[]string{"default/web", "1"}, "server ports forgotten: 0\n"},
		{[]string{"default/web", fmt.Sprint(port)}, "server ports forgotten: 1\n"},
		{nil, "server ports forgotten: 0\n"},
	} {
		out, err := forget(tc.args...)
		if err != nil || out != tc.want {
			t.Errorf("forget %v: got %q (%v), want %q", tc.args, out, err, tc.want)
		}
	}
	last := mustConnect(t, client, web, l)
	last.mustPing(t)
	if f := last.flow(t, a); !shortcut(f) {
		t.Errorf("got %+v, want the shortcut again", f)
	}
}

// The doctor says what the agent does on the same kernel.
func TestDoctor(t *testing.T) {
	mustAgent(t) // for root
	for _, hazards := range []string{"refuse", "accept"} {
		var out bytes.Buffer
		err := run(t.Context(), []string{"doctor", "-o", "json", "--kernel-hazards=" + hazards}, &out, t.Output())
		var e api.KernelReport
		if err := json.Unmarshal(out.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		want := ""
		if hazards == "refuse" {
			want = refuseHazards(e.Hazards)
		}
		status := exitRefused
		if want == "" {
			status = 0
		}
		if e.Message != want || e.TakesPart != (want == "") || exitStatus(err) != status || len(e.Hazards) == 0 {
			t.Errorf("%s: got %+v and error %v, want the refusal %q and status %d", hazards, e, err, want, status)
		}
	}
	var out bytes.Buffer
	_ = run(t.Context(), []string{"doctor"}, &out, t.Output())
	for _, want := range []string{"HAZARD", "blocking-recv", "consequence", "podshunt"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got\n%s\nwant it to contain %q", out.String(), want)
		}
	}
}

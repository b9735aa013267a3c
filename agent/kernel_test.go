// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m.Run)) }

// agent is the agent of a sandbox, in this process.
type agent struct {
	sandboxtest.Agent
	plugin string // the file to install as the plugin; empty: that beside this program
}

func mustAgent(t testing.TB) *agent {
	t.Helper()
	a := &agent{Agent: sandboxtest.MustNewAgent(t, sandbox.Config{})}
	a.Exec = func(ctx context.Context, args []string, stdout, stderr io.Writer) error {
		if args[0] != "run" {
			return run(ctx, args, stdout, stderr)
		}
		cfg, err := makeConfig(args[1:]...)
		if err != nil {
			return err
		}
		cfg.cni.Plugin = cmp.Or(a.plugin, cfg.cni.Plugin)
		return runAgent(ctx, cfg, newLogger(stderr, cfg))
	}
	return a
}

// mustStart runs the agent until it is stopped or the test ends.
func (a *agent) mustStart(t testing.TB, flags ...string) {
	t.Helper()
	a.MustStart(t, append(sandboxtest.Soon(), flags...)...)
}

// connection is a TCP connection with both ends.
type connection struct{ client, server net.Conn }

func mustConnect(t testing.TB, from, to *sandbox.Pod, l net.Listener) connection {
	t.Helper()
	return mustDial(t, from, l, "tcp4", to.IPv4.String())
}

// mustDial dials the port of l on a host.
func mustDial(t testing.TB, from *sandbox.Pod, l net.Listener, network, host string) connection {
	t.Helper()
	port := fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
	client, server := sandboxtest.MustConnect(t, from, network, net.JoinHostPort(host, port), l)
	return connection{client, server}
}

// mustPing sends a message each way a few times.
func (c connection) mustPing(t testing.TB) {
	t.Helper()
	sandboxtest.MustPing(t, c.client, c.server, 5, 100)
}

// flow returns what the agent shows of a connection.
func (c connection) flow(t testing.TB, a *agent) api.Flow {
	t.Helper()
	var found []api.Flow
	for _, f := range a.MustFlows(t) {
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

func TestAgent(t *testing.T) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.MustWritePods(t, "client "+on, "web "+on+", podshunt.io/exclude-ports: '2222'")
	// The agent is not there yet: the plugin leaves word.
	client := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{})
	a.mustStart(t, sandboxtest.AcceptFatal)
	web := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	plain := sandboxtest.MustAddPod(t, a, "plain", sandbox.PodOptions{})
	notListed := "not opted in: no entry in " + a.PodsFile
	wantDiff(t, "pods", []string{"client: takes part", "plain: " + notListed, "web: takes part"}, a.MustStates(t))

	all := sandboxtest.MustListen(t, web, "tcp4", ":0")
	c := mustConnect(t, client, web, all)
	c.mustPing(t)
	if f := c.flow(t, a); !shortcut(f) || f.Client.Pod.Name != "client" || f.Server.Pod.Name != "web" {
		t.Errorf("got %+v, want a shortcut from client to web", f)
	}
	excluded := mustConnect(t, client, web, sandboxtest.MustListen(t, web, "tcp4", ":2222"))
	wantDiff(t, "excluded port", "server port in podshunt.io/exclude-ports", excluded.flow(t, a).Message)
	toPlain := mustConnect(t, client, plain, sandboxtest.MustListen(t, plain, "tcp4", ":0"))
	wantDiff(t, "plain pod", "default/plain: "+notListed, toPlain.flow(t, a).Message)

	if err := run(t.Context(), append([]string{"run", "--pods-file=x", "--cgroup=" + a.Cgroup}, a.Places()...), io.Discard, io.Discard); err == nil ||
		!strings.Contains(err.Error(), fmt.Sprintf("process %d holds", os.Getpid())) {
		t.Errorf("second agent: got error %v, want one that names the process of the first", err)
	}

	// Opted in later: the open connection joins, or stays on TCP and says why.
	a.MustWritePods(t, "client "+on, "web "+on+", podshunt.io/exclude-ports: '2222'", "plain "+on)
	sandboxtest.WaitFor(t, "plain opted in", func() []string { return a.MustStates(t) }, func(s []string) bool { return s[1] == "plain: takes part" })
	if a.MustStatus(t).OpenConnections.Join {
		sandboxtest.WaitFor(t, "open connection", func() api.Flow { toPlain.mustPing(t); return toPlain.flow(t, a) }, shortcut)
	} else if got, want := toPlain.flow(t, a).Message, "made before both pods took part"; !strings.Contains(got, want) {
		t.Errorf("got reason %q, want %q", got, want)
	}

	// A restart is not noticed.
	a.MustStop(t)
	c.mustPing(t)
	a.mustStart(t, sandboxtest.AcceptFatal)
	c.mustPing(t)
	if f := c.flow(t, a); !shortcut(f) || f.ToServer.Switches != 1 || f.ToServer.TCPBytes != 100 {
		t.Errorf("got %+v %+v, want it on the shortcut all the time", f, f.ToServer)
	}

	pause := func(d time.Duration) {
		end := time.Now().Add(d).Format(time.RFC3339Nano)
		a.MustWritePods(t, "client "+on, "web "+on+", podshunt.io/paused-until: '"+end+"'")
	}
	pause(time.Hour)
	sandboxtest.WaitFor(t, "pause", func() api.Flow { c.mustPing(t); return c.flow(t, a) }, func(f api.Flow) bool {
		return !f.ToServer.Shortcut && slices.Equal(f.ToServer.Details, []string{"server_paused"})
	})
	pause(time.Second) // ends by itself
	sandboxtest.WaitFor(t, "end of the pause", func() api.Flow { c.mustPing(t); return c.flow(t, a) }, shortcut)

	// Opted out, the connection is back on TCP.
	a.MustWritePods(t, "client "+on, "web podshunt.io/shortcut: disabled")
	sandboxtest.WaitFor(t, "opted out", func() api.Flow { c.mustPing(t); return c.flow(t, a) }, func(f api.Flow) bool {
		return !f.ToServer.Shortcut && !f.ToClient.Shortcut && f.ToServer.Message == "not allowed (default/web: not opted in by podshunt.io/shortcut)"
	})

	var out bytes.Buffer
	if err := run(t.Context(), append([]string{"unload"}, a.Places()...), &out, t.Output()); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "unload", "unloaded: nothing of podshunt is left in the kernel\n", out.String())
	if status := a.MustStatus(t); !status.Unloaded || status.Pods[0].Enrolled {
		t.Errorf("got %+v, want it unloaded", status)
	}
	c.mustPing(t)
	if err := a.DelPod(plain); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "pods after DEL", 2, len(a.MustStates(t)))
}

var optIns = flag.Int("opt-ins", 50, "times that TestOptIns opts pods in and out")

// TestOptIns opts pods in and out under load. Connections that were open before follow each
// time, and lose no byte.
func TestOptIns(t *testing.T) {
	for name, cluster := range map[string]bool{"pods file": false, "API server": true} {
		t.Run(name, func(t *testing.T) {
			a := mustAgent(t)
			pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})}
			choose := func(client, web string) {
				a.MustWritePods(t, "client podshunt.io/shortcut: "+client, "web podshunt.io/shortcut: "+web)
			}
			if cluster {
				server, verb := newAPIServer(t), "ADDED"
				a.Source = []string{"--node-name=node-1", "--kubeconfig=" + server.mustKubeconfig(t)}
				server.put(verb, "namespaces", &corev1.Namespace{
					TypeMeta: metav1.TypeMeta{Kind: "Namespace", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "default"},
				})
				choose = func(client, web string) {
					for i, value := range []string{client, web} {
						server.put(verb, "pods", clusterPod(pods[i], map[string]string{api.AnnotationShortcut: value}))
					}
					verb = "MODIFIED"
				}
			}
			testOptIns(t, a, pods, choose)
		})
	}
}

func testOptIns(t *testing.T, a *agent, pods []*sandbox.Pod, choose func(client, web string)) {
	l := sandboxtest.MustListen(t, pods[1], "tcp4", ":0")
	const connections = 8
	stop := make(chan struct{})
	errs := make(chan error, connections)
	var sent, slowest atomic.Int64
	for range connections {
		c := mustConnect(t, pods[0], pods[1], l)
		go func() { errs <- c.talk(stop, &sent, &slowest) }()
	}
	choose("disabled", "disabled")
	a.mustStart(t, sandboxtest.AcceptFatal)
	if !a.MustStatus(t).OpenConnections.Join {
		close(stop)
		return // the kernels of the virtual machines are safe for it
	}
	times := *optIns
	if testing.Short() {
		times = min(times, 5)
	}
	before := sent.Load()
	sandboxtest.WaitFor(t, "messages on TCP", sent.Load, func(n int64) bool { return n >= before+100*connections })
	onTCP := slowest.Swap(0)
	var longest time.Duration
	for range times {
		choose("enabled", "enabled")
		began := time.Now()
		sandboxtest.WaitFor(t, "all on the shortcut", func() []api.Flow { return a.MustFlows(t) }, func(all []api.Flow) bool {
			return len(all) == connections && !slices.ContainsFunc(all, func(f api.Flow) bool { return !shortcut(f) })
		})
		longest = max(longest, time.Since(began))
		choose("disabled", "enabled")
		sandboxtest.WaitFor(t, "all on TCP", func() []api.Flow { return a.MustFlows(t) }, func(all []api.Flow) bool {
			return len(all) == connections && !slices.ContainsFunc(all, func(f api.Flow) bool { return f.ToServer.Shortcut || f.ToClient.Shortcut })
		})
	}
	t.Logf("%d times, at the latest after %v; the slowest message took %v, on TCP before %v",
		times, longest, time.Duration(slowest.Load()), time.Duration(onTCP))
	close(stop)
	for range connections {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// talk sends numbered messages to and fro until stop is closed. It counts them, and notes how
// many nanoseconds the slowest took.
func (c connection) talk(stop <-chan struct{}, sent, slowest *atomic.Int64) error {
	message, got := make([]byte, 1000), make([]byte, 1000)
	for n := uint64(0); ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		for i, way := range [][2]net.Conn{{c.client, c.server}, {c.server, c.client}} {
			binary.BigEndian.PutUint64(message[len(message)-8*(i+1):], n)
			began := time.Now()
			limit := began.Add(sandboxtest.Timeout)
			if err := errors.Join(way[0].SetDeadline(limit), way[1].SetDeadline(limit)); err != nil {
				return err
			}
			if _, err := way[0].Write(message); err != nil {
				return fmt.Errorf("message %d: %w", n, err)
			}
			if _, err := io.ReadFull(way[1], got); err != nil || !bytes.Equal(got, message) {
				return fmt.Errorf("message %d: %w, or another one came", n, err)
			}
			sent.Add(1)
			for took := int64(time.Since(began)); ; {
				most := slowest.Load()
				if took <= most || slowest.CompareAndSwap(most, took) {
					break
				}
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func TestUnloadWithoutAgent(t *testing.T) {
	a := mustAgent(t)
	a.MustWritePods(t, "web podshunt.io/shortcut: enabled")
	a.mustStart(t, sandboxtest.AcceptFatal)
	web := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	a.MustTakePart(t, "web")
	l := sandboxtest.MustListen(t, web, "tcp4", ":0")
	c := mustConnect(t, web, web, l)
	c.mustPing(t)
	if _, err := c.client.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	a.MustStop(t)

	unload := func(timeout string) (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"unload", "--timeout=" + timeout}, a.Places()...), &out, t.Output())
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
	if _, err := os.Stat(a.PinDir); !os.IsNotExist(err) {
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
	a.MustWritePods(t, "client "+on, "web "+on)
	a.mustStart(t)
	client := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{})
	web := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	want := refuseHazards(a.MustStatus(t).Hazards, nil)
	if want == "" {
		a.MustTakePart(t, "client", "web")
	}
	status := a.MustStatus(t)
	for _, got := range status.Pods {
		if got.Message != want || got.Enrolled != (want == "") {
			t.Errorf("got %+v, want the reason %q", got, want)
		}
	}
	c := mustConnect(t, client, web, sandboxtest.MustListen(t, web, "tcp4", ":0"))
	c.mustPing(t)
	if f := c.flow(t, a); shortcut(f) != (want == "") {
		t.Errorf("got %+v, want the shortcut %v", f, want == "")
	}
	var out bytes.Buffer
	if err := run(t.Context(), append([]string{"unload"}, a.Places()...), &out, t.Output()); err != nil {
		t.Error(err)
	}
}

// A client in blocking mode takes part where both pods accept that, by what the pods file says.
func TestBlockingSockets(t *testing.T) {
	a := mustAgent(t)
	const on, blocking = "podshunt.io/shortcut: enabled", ", podshunt.io/blocking-sockets: "
	a.MustWritePods(t, "client "+on+blocking+"accept", "web "+on)
	a.mustStart(t, sandboxtest.AcceptFatal)
	client := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{})
	web := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	a.MustTakePart(t, "client", "web")
	l := sandboxtest.MustListen(t, web, "tcp4", ":0")
	to := &unix.SockaddrInet4{Addr: web.IPv4.As4(), Port: l.Addr().(*net.TCPAddr).Port}
	accepted := func(pods ...string) func(api.Status) bool {
		return func(s api.Status) bool {
			var accept []string
			for _, p := range s.Pods {
				if p.AcceptBlocking {
					accept = append(accept, p.Pod.Name)
				}
			}
			return slices.Equal(accept, pods)
		}
	}
	status := func() api.Status { return a.MustStatus(t) }
	connect := func() api.Flow {
		t.Helper()
		fd := -1
		if err := client.Do(func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return errors.Join(err, unix.Connect(fd, to))
		}); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		flows := a.MustFlows(t)
		if len(flows) != 1 {
			t.Fatalf("got flows %+v, want one", flows)
		}
		return flows[0]
	}

	sandboxtest.WaitFor(t, "one pod accepts", status, accepted("client"))
	if f := connect(); f.Paired || !strings.Contains(f.Message, "a socket is in blocking mode (see podshunt.io/blocking-sockets)") {
		t.Errorf("got %+v, want it not paired, and why", f)
	}
	a.MustWritePods(t, "client "+on+blocking+"accept", "web "+on+blocking+"accept")
	sandboxtest.WaitFor(t, "both pods accept", status, accepted("client", "web"))
	sandboxtest.WaitFor(t, "all connections closed", func() []api.Flow { return a.MustFlows(t) }, func(f []api.Flow) bool { return len(f) == 0 })
	if f := connect(); !f.Paired {
		t.Errorf("got %+v, want it paired", f)
	}
	a.MustWritePods(t, "client "+on+blocking+"accept", "web "+on+blocking+"maybe")
	sandboxtest.WaitFor(t, "a word that is not accepted", status, accepted("client"))
	wantDiff(t, "states", []string{"client: takes part", `web: annotation podshunt.io/blocking-sockets="maybe": accepted are "accept" and "refuse"`}, a.MustStates(t))
}

// What a connection uses that is not served is told and remembered, until it is forgotten.
func TestForget(t *testing.T) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.MustWritePods(t, "client "+on, "web "+on)
	a.mustStart(t, sandboxtest.AcceptFatal)
	client := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{})
	web := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	a.MustTakePart(t, "client", "web")
	l := sandboxtest.MustListen(t, web, "tcp4", ":0")
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
	unsupported := a.MustStatus(t).UnsupportedPorts
	if len(unsupported) != 1 || unsupported[0].Pod.Name != "web" || unsupported[0].Port != port || !slices.Equal(unsupported[0].Reasons, []string{"so_zerocopy"}) {
		t.Errorf("got %+v, want the server's port with SO_ZEROCOPY", unsupported)
	}
	again := mustConnect(t, client, web, l)
	again.mustPing(t)
	wantDiff(t, "reason", "an earlier connection to this server port used SO_ZEROCOPY, which does not work on the shortcut: "+
		"`podshunt-agent forget` lets new ones be paired again", again.flow(t, a).Message)

	forget := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"forget", a.RunDir()}, args...), &out, t.Output())
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
	for _, accepted := range []string{"", "fionread-tcp,fionread-redirected,splice", "all"} {
		var out bytes.Buffer
		err := run(t.Context(), []string{"doctor", "-o", "json", "--accept-hazards=" + accepted}, &out, t.Output())
		var e api.KernelReport
		if err := json.Unmarshal(out.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		want := ""
		if accepted == "" {
			want = refuseHazards(e.Hazards, nil)
		}
		if blocking := slices.Contains(e.AcceptedHazards, "blocking-recv"); blocking != (accepted == "all") {
			t.Errorf("%q: got accepted %v, want blocking-recv among them: %t", accepted, e.AcceptedHazards, !blocking)
		}
		status := exitRefused
		if want == "" {
			status = 0
		}
		if e.Message != want || e.TakesPart != (want == "") || exitStatus(err) != status || len(e.Hazards) == 0 {
			t.Errorf("%s: got %+v and error %v, want the refusal %q and status %d", accepted, e, err, want, status)
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

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
)

func wantDiff(t testing.TB, what string, want, got any) {
	t.Helper()
	comparers := cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })}
	if diff := cmp.Diff(want, got, comparers); diff != "" {
		t.Errorf("%s (-want +got)\n%s", what, diff)
	}
}

func TestCommandErrors(t *testing.T) {
	nowhere := t.TempDir()
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"no command", nil, "no command given: accepted are completion, doctor, flows, "},
		{"unknown command", []string{"start"}, `unknown command "start": accepted are completion, doctor, flows, `},
		{"flag of an unknown command", []string{"start", "--x"}, `unknown command "start": accepted are `},
		{"unknown flag", []string{"flows", "--socket=x"}, `unknown flag --socket of "podshunt-agent flows": accepted are -h or --help, -o or --output, --pod, --port, --run-dir`},
		{"one dash", []string{"unload", "-timeout=1s"}, `unknown flag -timeout=1s of "podshunt-agent unload": accepted are --force, `},
		{"no value", []string{"unload", "--timeout"}, "--timeout has no value: accepted are durations such as 500ms, 30s or 5m"},
		{"no word", []string{"flows", "--output"}, "--output has no value: form of what is printed: text or json"},
		{"duration", []string{"unload", "--timeout=30"}, `--timeout="30": accepted are durations such as 500ms, 30s or 5m`},
		{"yes or no", []string{"unload", "--force=maybe"}, `--force="maybe": accepted are true, false`},
		{"large size", []string{"run", "--pod-budget=x"}, `--pod-budget="x": accepted are numbers from 0 to 18446744073709551615`},
		{"argument", []string{"status", "x"}, `unexpected argument "x"`},
		{"argument of a command of cobra's", []string{"completion", "bash", "x"}, `unknown command "x"`},
		{"output", []string{"flows", "-o", "xml"}, `--output="xml": accepted are text, json`},
		{"unload timeout", []string{"unload", "--timeout=0s"}, "--timeout=0s: accepted are durations above 0"},
		{"no source", []string{"run"}, "--node-name or --pods-file is required"},
		{"two sources", []string{"run", "--node-name=n", "--pods-file=p"}, "--node-name and --pods-file exclude each other"},
		{"kubeconfig without node", []string{"run", "--pods-file=p", "--kubeconfig=k"}, "--kubeconfig is for the cluster: give --node-name"},
		{"runtime classes", []string{"run", "--sandboxed-runtime-classes=kata,[x"}, `"[x": accepted are patterns`},
		{"uninstall timeout", []string{"uninstall", "--timeout=-1s"}, "--timeout=-1s: accepted are durations above 0"},
		{"uninstall of all nodes", []string{"uninstall", "--all-nodes"}, "--namespace and --selector are required"},
		{"uninstall from half a CNI", []string{"uninstall", "--cni-conf-dir=/c"}, "--cni-conf-dir and --cni-bin-dir: accepted are both"},
		{"deletion of a binary that is nowhere", []string{"uninstall", "--delete-binary"}, "--delete-binary: accepted with --cni-conf-dir and --cni-bin-dir"},
		{"own pod without a cluster", []string{"run", "--pods-file=p", "--own-pod=a/b"}, "--own-pod is for the cluster: give --node-name"},
		{"own pod", []string{"run", "--node-name=n", "--own-pod=agent"}, `--own-pod: pod "agent": accepted is namespace/name`},
		{"uninstall timeout of run", []string{"run", "--node-name=n", "--uninstall-timeout=0s"}, "--uninstall-timeout=0s: accepted are durations above 0"},
		{"no mount namespace", []string{"mount-bpffs", "--proc=" + nowhere}, "open mount namespace"},
		{"default namespaces", []string{"run", "--default-namespaces=a in b"}, "accepted is a label selector"},
		{"hazards", []string{"run", "--accept-hazards=splice,waitall"}, `--accept-hazards="waitall": accepted are fionread-tcp, fionread-redirected, splice, blocking-recv, all`},
		{"log format", []string{"run", "--log-format=xml"}, `--log-format="xml": accepted are auto, text, json`},
		{"log level", []string{"run", "--log-level=all"}, `--log-level="all": accepted are debug, info, warn, error`},
		{"size", []string{"run", "--max-flows=5000000000"}, "accepted are numbers from 0 to 4294967295"},
		{"one directory of CNI", []string{"run", "--cni-conf-dir=/c"}, "--cni-conf-dir and --cni-bin-dir: accepted are both, or none"},
		{"auto for one directory of CNI", []string{"run", "--cni-conf-dir=auto", "--cni-bin-dir=/b"}, "--cni-conf-dir and --cni-bin-dir: accepted is auto for both, or for none"},
		{"relative directory of configurations", []string{"run", "--cni-conf-dir=c", "--cni-bin-dir=/b"}, `--cni-conf-dir="c": accepted is an absolute path, or auto`},
		{"relative directory of plugins", []string{"run", "--cni-conf-dir=/c", "--cni-bin-dir=b"}, `--cni-bin-dir="b": accepted is an absolute path, or auto`},
		{"uninstall without an agent from auto", []string{"uninstall", "--cni-conf-dir=auto", "--cni-bin-dir=auto"}, "--cni-conf-dir and --cni-bin-dir: accepted are directories"},
		{"relative run directory", []string{"run", "--cni-conf-dir=/c", "--cni-bin-dir=/b", "--run-dir=r"}, `"agentSocket": "r/agent.sock": accepted is an absolute path`},
		{"one address for two", []string{"run", "--pods-file=p", "--health-address=:1", "--metrics-address=:1"}, `are both ":1": accepted are two different ones`},
		{"guard", []string{"run", "--disable-guards=ulp,oob"}, `--disable-guards="oob": accepted are fionread, flags, splice, ulp`},
		{"doctor guard", []string{"doctor", "--disable-guards=oob"}, `--disable-guards="oob": accepted are fionread, flags, splice, ulp`},
		{"doctor hazards", []string{"doctor", "--accept-hazards=accept"}, `--accept-hazards="accept": accepted are fionread-tcp, fionread-redirected, splice, blocking-recv, all`},
		{"doctor output", []string{"doctor", "-o", "xml"}, `--output="xml": accepted are text, json`},
		{"forget pod", []string{"forget", "web"}, `pod "web": accepted is namespace/name`},
		{"flows of no pod", []string{"flows", "--pod", "web"}, `--pod: pod "web": accepted is namespace/name`},
		{"flows of no port", []string{"flows", "--port", "70000"}, `70000`},
		{"forget port", []string{"forget", "default/web", "0"}, `port "0": accepted are 1 to 65535`},
		{"forget too much", []string{"forget", "default/web", "80", "x"}, `unexpected argument "x"`},
		{"long socket", []string{"run", "--run-dir=/" + strings.Repeat("x", 92)}, "accepted are at most 103 bytes"},
		{"long socket to ask", []string{"status", "--run-dir=/" + strings.Repeat("x", 92)}, "accepted are at most 103 bytes"},
		// Taken for an agent that does not run, its pins would be taken out below it.
		{"long socket to unload by", []string{"unload", "--pin-dir=/none/such", "--run-dir=/" + strings.Repeat("x", 92)}, "accepted are at most 103 bytes"},
		{"long run directory to uninstall by", []string{"uninstall", "--pin-dir=/none/such", "--run-dir=/" + strings.Repeat("x", 92)}, "accepted are at most 103 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			err := run(t.Context(), tc.args, &out, &out)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want it to contain %q", err, tc.want)
			}
			if out.Len() > 0 { // main prints the error
				t.Errorf("got output %q, want none", &out)
			}
			want := exitUsage
			if tc.name == "no mount namespace" {
				want = exitError
			}
			wantDiff(t, "exit status", want, exitStatus(err))
		})
	}
}

// fakeAgent answers one request after the other, in a run directory that it
// returns the flag of. With an empty answer it keeps quiet until the test ends.
func fakeAgent(t *testing.T, answer string) (runDirFlag string) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", socketIn(dir))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-served
	})
	go func() {
		defer close(served)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			_, _ = conn.Read(make([]byte, 1024))
			if answer == "" {
				_, _ = conn.Read(make([]byte, 1024)) // until the other end gives up
			} else {
				_, _ = fmt.Fprintf(conn, "HTTP/1.1 %s", answer)
			}
			conn.Close()
		}
	}()
	return "--run-dir=" + dir
}

func jsonAnswer(t *testing.T, v any) string {
	t.Helper()
	body, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// TestExitStatus has those that TestCommandErrors and TestUninstallAll have not.
func TestExitStatus(t *testing.T) {
	nobody := "--run-dir=" + t.TempDir()
	crashed := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketIn(crashed)})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	waiting := fakeAgent(t, jsonAnswer(t, api.UnloadResult{Waiting: []api.Flow{{}}}))
	noReset := fakeAgent(t, jsonAnswer(t, api.UnloadResult{Waiting: []api.Flow{{}}, ResetError: "boom"}))
	done := fakeAgent(t, jsonAnswer(t, api.UnloadResult{Done: true}))
	failing := fakeAgent(t, "500 x\r\nContent-Length: 16\r\n\r\n{\"error\":\"boom\"}")
	for _, tc := range []struct {
		args []string
		want int
		text string
	}{
		{[]string{"version"}, 0, ""},
		{[]string{"help", "status"}, 0, ""},
		{[]string{"status", nobody}, exitNoAgent, "no agent at "},
		{[]string{"flows", "--run-dir=" + crashed}, exitNoAgent, "no agent at "},
		{[]string{"forget", nobody}, exitNoAgent, "no agent at "},
		// There is nothing that an agent is needed for.
		{[]string{"unload", nobody, "--pin-dir=/none/such"}, 0, ""},
		{[]string{"status", failing}, exitError, "boom"},
		{[]string{"unload", failing, "--pin-dir=/none/such"}, exitError, "boom"},
		{[]string{"unload", done}, 0, ""},
		{[]string{"unload", waiting}, exitTimedOut, "1 connections have not read"},
		{[]string{"uninstall", noReset, "--force"}, exitTimedOut, "they were not reset: boom"},
	} {
		err := run(t.Context(), tc.args, io.Discard, io.Discard)
		if got := exitStatus(err); got != tc.want || err != nil && !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%v: got status %d and error %v, want %d and %q", tc.args, got, err, tc.want, tc.text)
		}
	}
	for _, e := range []api.KernelReport{{Reason: api.KernelLacksFeatures}, {Reason: api.KernelFatalHazards}} {
		wantDiff(t, "doctor on a kernel that keeps pods out", exitRefused, exitStatus(refusal(e)))
	}
	_, silent, _ := strings.Cut(fakeAgent(t, ""), "=")
	err = ask(t.Context(), silent, "GET", "/", 50*time.Millisecond, new(api.Status))
	if exitStatus(err) != exitTimedOut || !strings.Contains(err.Error(), "has not answered after 50ms") {
		t.Errorf("got error %v of an agent that keeps quiet, want that it has not answered", err)
	}
}

// TestUnloadWaitsForStart: an agent that has begun to start, and does not listen yet, is asked when it does.
func TestUnloadWaitsForStart(t *testing.T) {
	dir := t.TempDir()
	lock, err := lockRunDir(dir, "/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ended := make(chan error, 1)
	var out bytes.Buffer
	go func() {
		ended <- run(t.Context(), []string{"unload", "--run-dir=" + dir, "--pin-dir=/none/such"}, &out, io.Discard)
	}()
	select {
	case err := <-ended:
		t.Fatalf("got %v and %q while an agent starts, want it to wait", err, &out)
	case <-time.After(10 * startRetry):
	}
	_, started, _ := strings.Cut(fakeAgent(t, jsonAnswer(t, api.UnloadResult{Done: true})), "=")
	if err := os.Rename(socketIn(started), socketIn(dir)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	wantDiff(t, "unload", "unloaded: nothing of podshunt is left in the kernel\n", out.String())
}

// The help of the root command is where people look exit statuses up.
func TestHelpHasExitStatuses(t *testing.T) {
	for _, status := range []int{0, exitError, exitUsage, exitNoAgent, exitRefused, exitTimedOut} {
		if want := fmt.Sprintf("\n  %d  ", status); !strings.Contains(newRootCommand().Long, want) {
			t.Errorf("got help %q, want it to have %q", newRootCommand().Long, want)
		}
	}
}

func TestCompletion(t *testing.T) {
	complete := func(args ...string) string {
		t.Helper()
		var out bytes.Buffer
		if err := run(t.Context(), append([]string{"__complete"}, args...), &out, io.Discard); err != nil {
			t.Error(err)
		}
		return out.String()
	}
	const noFiles, dirs = ":4\n", ":16\n"
	wantDiff(t, "words", "auto\ntext\njson\n"+noFiles, complete("run", "--log-format", ""))
	wantDiff(t, "hazards", "fionread-tcp\nfionread-redirected\nsplice\nblocking-recv\nall\n"+noFiles, complete("doctor", "--accept-hazards", ""))
	wantDiff(t, "guards", "fionread\nflags\nsplice\nulp\n"+noFiles, complete("run", "--disable-guards", ""))
	wantDiff(t, "directory", dirs, complete("status", "--run-dir", ""))
	wantDiff(t, "argument", noFiles, complete("status", ""))
	for _, shell := range []string{"bash", "fish", "powershell", "zsh"} {
		var out bytes.Buffer
		if err := run(t.Context(), []string{"completion", shell}, &out, io.Discard); err != nil || out.Len() == 0 {
			t.Errorf("%s: got %d bytes and error %v, want a script", shell, out.Len(), err)
		}
	}
}

// Every command says what it does, at length, and by examples that it would take.
func TestCommandsAreDescribed(t *testing.T) {
	root := newRootCommand()
	for _, cmd := range append(root.Commands(), root) {
		if cmd.Short == "" || cmd.Long == "" || cmd.Example == "" {
			t.Errorf("%s: got %q, %q, %q, want all three", cmd.Name(), cmd.Short, cmd.Long, cmd.Example)
		}
		for line := range strings.Lines(cmd.Example) {
			args := strings.Fields(line)
			found, rest, err := newRootCommand().Find(args[1:])
			if args[0] != "podshunt-agent" || err != nil || found.ParseFlags(rest) != nil || found.ValidateArgs(found.Flags().Args()) != nil {
				t.Errorf("%s: example %q would not work: %v", cmd.Name(), line, err)
			}
		}
	}
}

// TestChartValues: a value of the chart below "agent" is a flag of run.
func TestChartValues(t *testing.T) {
	type property struct {
		Properties map[string]*property
		Items      *property
		Enum       []string
	}
	var schema property
	data, err := os.ReadFile("../charts/podshunt/values.schema.json")
	if err == nil {
		err = json.Unmarshal(data, &schema)
	}
	if err != nil {
		t.Fatal(err)
	}
	values := schema.Properties["agent"].Properties
	wantDiff(t, "guards", datapath.GuardNames(), slices.Sorted(slices.Values(values["disableGuards"].Items.Enum)))
	wantDiff(t, "hazards", acceptableHazards(), values["acceptHazards"].Items.Enum)
	run := newRunCommand()
	for value := range values {
		name := regexp.MustCompile("[A-Z]").ReplaceAllStringFunc(value, func(s string) string { return "-" + strings.ToLower(s) })
		if value != "extraArgs" && run.Flags().Lookup(name) == nil {
			t.Errorf("agent.%s: got no flag --%s of run", value, name)
		}
	}
}

// makeConfig returns what flags of run make.
func makeConfig(flags ...string) (config, error) {
	cfg, cmd := defaults(), &cobra.Command{}
	cfg.register(cmd)
	if err := cmd.ParseFlags(flags); err != nil {
		return cfg, err
	}
	return cfg, cfg.complete()
}

func mustConfig(t testing.TB, flags ...string) config {
	t.Helper()
	cfg, err := makeConfig(flags...)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{
		{"help"},
		{"run", "-h"},
		{"status", "-h"},
		{"doctor", "-h"},
		{"forget", "-h"},
		{"unload", "-h"},
		{"uninstall", "-h"},
		{"mount-bpffs", "-h"},
		{"version"},
	} {
		var out bytes.Buffer
		if err := run(t.Context(), args, &out, &out); err != nil {
			t.Errorf("%v: %v", args, err)
		}
		if out.Len() == 0 {
			t.Errorf("%v prints nothing", args)
		}
	}
}

func TestConfig(t *testing.T) {
	got := mustConfig(t, "--pods-file=p", "--run-dir=/r", "--budget=8192", "--log-level=debug", "--cni-conf-dir=/c", "--cni-bin-dir=/b",
		"--disable-guards=splice,ulp", "--disable-guards=", "--disable-guards=flags", "--sandboxed-runtime-classes=kata-*, x")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.podsFile, want.runDir, want.datapath.Budget, want.logLevel = "p", "/r", 8192, "debug"
	want.cni = cniconf.Config{
		ConfDir: "/c", BinDir: "/b", NodeRoot: "/proc/1/root", Plugin: filepath.Join(filepath.Dir(self), "podshunt"),
		Section: api.PluginConf{AgentSocket: "/r/agent.sock", AgentTimeout: api.PluginTimeout, AttachmentsDir: "/r/attachments"},
	}
	want.disabledGuards = []string{"splice", "ulp", "flags"}
	wantDiff(t, "sandboxed", patterns{"kata-*", "x"}, got.sandboxed)
	got.sandboxed, want.sandboxed = nil, nil
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	auto := mustConfig(t, "--pods-file=p", "--cni-conf-dir=auto", "--cni-bin-dir=auto")
	if !auto.installs() || !auto.cni.Auto || auto.cni.ConfDir != "" || auto.cni.BinDir != "" {
		t.Errorf("got %+v, want the directories to be found", auto.cni)
	}
	if mustConfig(t, "--pods-file=p").installs() {
		t.Error("installs the plugin without directories")
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	lock, err := lockRunDir(dir, "/proc")
	if err != nil {
		t.Fatal(err)
	}
	_, err = lockRunDir(dir, "/proc")
	want := fmt.Sprintf("another podshunt-agent is running: process %d holds %s/lock", os.Getpid(), dir)
	if !errors.Is(err, errLocked) || err.Error() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if lock, err = lockRunDir(dir, "/proc"); err != nil {
		t.Fatalf("lock again: %v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestRefuseHazards(t *testing.T) {
	hazards := []api.Hazard{
		{Name: "absent", Fatal: true, Detail: "fine"},
		{Name: "harmless", Present: true, Detail: "seen"},
	}
	wantDiff(t, "nothing fatal", "", refuseHazards(hazards, nil))
	hazards = append(hazards,
		api.Hazard{Name: "bad", Present: true, Fatal: true, Detail: "seen", Consequence: "some programs stall"},
		api.Hazard{Name: "guarded", Present: true, Guard: "g", Consequence: "nothing"},
		api.Hazard{Name: "worse", Present: true, Fatal: true, Consequence: "others crash"},
		api.Hazard{Name: "as bad", Present: true, Fatal: true, Consequence: "some programs stall"})
	wantDiff(t, "fatal", "kernel hazards bad, worse, as bad: some programs stall; others crash. "+
		"Pods take part on a kernel without them (`podshunt-agent doctor` has the details); "+
		"with --accept-hazards=bad,worse,as bad they take part on this one, and those programs break", refuseHazards(hazards, []string{"harmless"}))
	wantDiff(t, "one of them is left", "kernel hazards worse: others crash. "+
		"Pods take part on a kernel without them (`podshunt-agent doctor` has the details); "+
		"with --accept-hazards=worse they take part on this one, and those programs break", refuseHazards(hazards, []string{"bad", "as bad"}))
	accepted := []string{"absent", "harmless", "bad", "guarded", "worse", "as bad"}
	wantDiff(t, "all are accepted", "", refuseHazards(hazards, accepted))
	var names []string
	for _, h := range acceptedHazards(hazards, accepted) {
		names = append(names, h.Name)
	}
	wantDiff(t, "accepted ones that break something", []string{"harmless", "bad", "worse", "as bad"}, names)
}

func TestWriteFlows(t *testing.T) {
	at := netip.MustParseAddrPort
	pod := func(name, address string) api.FlowEnd {
		end := api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: name}}
		if address != "" {
			end.Address = at(address)
		}
		return end
	}
	client, web := pod("client", "10.0.0.1:5000"), pod("web", "10.0.0.2:80")
	flows := []api.Flow{
		{
			Client: client, Server: pod("web", "10.0.0.2:8080"), OrigDst: at("10.96.0.1:80"), Paired: true,
			ToServer: &api.Direction{Shortcut: true, ShortcutBytes: 1 << 30, TCPBytes: 12, Reason: "budget", Message: "the limit"},
			ToClient: &api.Direction{Reason: "not_allowed", Message: "not allowed (paused)", TCPBytes: 1536},
		},
		{
			Client: pod("client", "10.0.0.1:5001"), Server: pod("web", ""), OrigDst: at("10.0.0.2:8080"), Paired: true,
			ToServer: &api.Direction{}, ToClient: &api.Direction{},
		},
		{Client: api.FlowEnd{Address: at("192.0.2.1:6000")}, OrigDst: at("10.0.0.2:80"), Server: web, Message: "other end"},
		{Client: client, OrigDst: at("10.96.0.1:22"), Server: web, Message: "port"},
	}
	var out bytes.Buffer
	if err := writeFlows(&out, flows); err != nil {
		t.Fatal(err)
	}
	wantText(t, `
CLIENT                        SERVER                     DIRECTION  PATH      SHORTCUT  TCP      LAST REASON FOR TCP
default/client 10.0.0.1:5000  default/web 10.0.0.2:8080  to server  shortcut  1.0 GiB   12 B     the limit
                                via 10.96.0.1:80         to client  tcp       0 B       1.5 KiB  not allowed (paused)
default/client 10.0.0.1:5001  default/web                to server  tcp       0 B       0 B
                                via 10.0.0.2:8080        to client  tcp       0 B       0 B
- 192.0.2.1:6000              default/web 10.0.0.2:80    both       tcp                          other end
default/client 10.0.0.1:5000  default/web 10.0.0.2:80    both       tcp                          port
                                via 10.96.0.1:22
`, out.String())

	out.Reset()
	if err := writeFlows(&out, nil); err != nil {
		t.Fatal(err)
	}
	wantText(t, "\nno connections\n", out.String())
}

// TestWriteManyFlows has more than are aligned at once, the widest first.
func TestWriteManyFlows(t *testing.T) {
	flows := make([]api.Flow, 2*pageFlows+1)
	for i := range flows {
		flows[i] = api.Flow{Client: api.FlowEnd{Pod: api.PodRef{Namespace: "n", Name: "c"}}, Message: "why"}
	}
	flows[0].Client.Pod.Name = "a-client-of-a-long-name"
	var out lines
	if err := writeFlows(&out, flows); err != nil {
		t.Fatal(err)
	}
	if len(out.text) != 1+len(flows) {
		t.Fatalf("got %d lines, want %d", len(out.text), 1+len(flows))
	}
	// A write for each cell takes longer than all the rest.
	if out.writes > 10 {
		t.Errorf("got %d writes of %d lines, want some for each page", out.writes, len(out.text))
	}
	at := strings.Index(out.text[0], "LAST REASON")
	for _, line := range out.text[1:] {
		if strings.Index(line, "why") != at {
			t.Fatalf("got\n%s\n%s\nwant both aligned", out.text[0], line)
		}
	}

	// Had the first page waited for the last, it would be as wide.
	flows[0], flows[len(flows)-1] = flows[len(flows)-1], flows[0]
	out = lines{}
	if err := writeFlows(&out, flows); err != nil {
		t.Fatal(err)
	}
	if first, last := out.text[1], out.text[len(out.text)-1]; strings.Index(first, "why") >= strings.Index(last, "why") {
		t.Errorf("got\n%s\n%s\nwant the first written before the last is aligned", first, last)
	}

	full := errors.New("disk full")
	if err := writeFlows(&lines{err: full}, flows); !errors.Is(err, full) {
		t.Errorf("got error %v, want %v", err, full)
	}
}

// lines are what is written to them, or refuse it with an error.
type lines struct {
	text   []string
	part   string
	err    error
	writes int
}

func (l *lines) Write(p []byte) (int, error) {
	l.writes++
	whole := strings.Split(l.part+string(p), "\n")
	l.text, l.part = append(l.text, whole[:len(whole)-1]...), whole[len(whole)-1]
	return len(p), l.err
}

// TestTableRow has a cell of what a user may have written into an annotation.
func TestTableRow(t *testing.T) {
	var out strings.Builder
	table := newTable(&out)
	table.row("first\nsecond", "b")
	table.row("a\tb\v\x1b[2J\xff", "c")
	if err := table.flush(); err != nil {
		t.Fatal(err)
	}
	wantText(t, "first; second  b\na b  [2J\ufffd      c\n", out.String())
}

func TestWriteReplacing(t *testing.T) {
	var out bytes.Buffer
	if err := writeStatus(&out, api.Status{Version: "v1", Replacing: "2 connections have to read"}); err != nil {
		t.Fatal(err)
	}
	if line, _, _ := strings.Cut(out.String(), "\n"); !strings.HasSuffix(line, "v1, replacing: 2 connections have to read") {
		t.Errorf("got %q, want what is waited for", line)
	}
	if strings.Contains(out.String(), "open connections") {
		t.Errorf("got %q, want nothing of connections that may join: none does", &out)
	}
}

func TestWriteUntraced(t *testing.T) {
	var out bytes.Buffer
	if err := writeStatus(&out, api.Status{Guards: []string{"flags", "splice"}, Untraced: "it is off"}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "flags splice; all messages go by TCP, as it is off\n") {
		t.Errorf("got %q, want why all messages go by TCP", &out)
	}
}

func TestWriteStatus(t *testing.T) {
	status := api.Status{
		Version: "v1", Kernel: "6.18", Observer: "tracepoint", Cgroup: "/cg", PinDir: "/pins", AcceptedHazards: []string{"two", "four", "five"},
		Hazards: []api.Hazard{
			{Name: "one", Present: true, Fatal: true, Detail: "stalls"},
			{Name: "two", Detail: "fine"},
			{Name: "three", Present: true, Detail: "short"},
			{Name: "four", Present: true, Guard: "splice", Detail: "none"},
			{Name: "five", Present: true, Detail: "EAGAIN"},
		},
		Pods: []api.PodStatus{
			{Pod: api.PodRef{Namespace: "a", Name: "b"}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, Enrolled: true},
			{Pod: api.PodRef{Namespace: "a", Name: "c"}, Message: "first\nsecond"},
			{Pod: api.PodRef{Namespace: "a", Name: "d"}, Enrolled: true, AcceptBlocking: true},
			{Pod: api.PodRef{Namespace: "a", Name: "e"}, AcceptBlocking: true, Message: "waiting"},
		},
		CNI:             &api.CNIStatus{Conflist: "/c/10-x.conflist", Installed: true, Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local), Error: "another is not valid"},
		Guards:          []string{"flags", "splice"},
		NewConnections:  api.NewConnections{Message: "refused"},
		OpenConnections: api.OpenConnections{Message: "too old"},
		JoinPorts: []api.JoinPort{
			{Pod: api.PodRef{Namespace: "a", Name: "b"}, Port: 443},
			{Pod: api.PodRef{Namespace: "a", Name: "b"}, Port: 444, JoinAfter: 128},
		},
		UnsupportedPorts: []api.UnsupportedPort{
			{Pod: api.PodRef{Namespace: "a", Name: "b"}, Port: 80, Reasons: []string{"splice", "msg_oob"}, Since: time.Unix(0, 0).UTC()},
			{Pod: api.PodRef{Namespace: "a", Name: "c"}, Port: 81, Reasons: []string{"blocking"}, Since: time.Unix(0, 0).UTC()},
		},
		SourceError: "no file", PolicyError: "map full",
		Maps: []api.MapUsage{{Name: "pods", Entries: 1, Max: 1024}},
		Outcomes: []api.Outcome{
			{Kind: "message", Code: "shortcut", Count: 2, Bytes: 2048}, {Kind: "connection", Code: "paired", Count: 1}, {Kind: "message", Code: "ulp"},
		},
	}
	var out bytes.Buffer
	if err := writeStatus(&out, status); err != nil {
		t.Fatal(err)
	}
	wantText(t, `
agent             v1, running
kernel            6.18
observer          tracepoint
new connections   join at their handshake: refused
open connections  stay on TCP until they are made anew: too old
cgroup            /cg
pins              /pins
guards            flags splice
cni plugin        installed in /c/10-x.conflist since 2026-01-02 03:04:05: another is not valid
source            no file
policy            map full

HAZARD  PRESENT        DETAIL
one     yes, refused   stalls
two     no             fine
three   yes            short
four    yes, guarded   none
five    yes, accepted  EAGAIN

POD  ADDRESSES         STATE                             REASON
a/b  10.0.0.1 fd00::1  takes part
a/c  -                 tcp                               first; second
a/d  -                 takes part, blocking sockets too
a/e  -                 tcp                               waiting

NOT PAIRED  SERVER PORT  FROM                                              USED                       SINCE
a/b         80           everywhere                                        splice, MSG_OOB            1970-01-01 00:00:00
a/c         81           pods without podshunt.io/blocking-sockets=accept  a socket in blocking mode  1970-01-01 00:00:00

POD  SERVER PORT  NEW CONNECTIONS JOIN
a/b  443          at their handshake
a/b  444          after 128 segments of data

MAP   ENTRIES  MAX
pods  1        1024

OUTCOME            COUNT  BYTES
message_shortcut   2      2.0 KiB
connection_paired  1
`, out.String())

	out.Reset()
	if err := writeStatus(&out, api.Status{Version: "v1", Unloaded: true, AcceptedHazards: []string{"one"}, Hazards: status.Hazards[:1]}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"v1, unloaded: nothing is shortcut", "yes, accepted", "none\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got\n%s\nwant it to contain %q", out.String(), want)
		}
	}
}

// wantText compares tables; blanks at line ends do not count.
func wantText(t testing.TB, want, got string) {
	t.Helper()
	lines := strings.Split(got, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), strings.Join(lines, "\n")); diff != "" {
		t.Errorf("text (-want +got)\n%s", diff)
	}
}

func TestByteText(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 5 << 20: "5.0 MiB", 1<<64 - 1: "16.0 EiB",
	} {
		if got := byteText(n); got != want {
			t.Errorf("byteText(%d): got %q, want %q", n, got, want)
		}
	}
}

// An agent that answers with an error or with nonsense is told apart from none.
func TestAskFailures(t *testing.T) {
	for _, tc := range []struct{ name, answer, want string }{
		{"error", "HTTP/1.1 500 x\r\nContent-Length: 16\r\n\r\n{\"error\":\"boom\"}", "boom"},
		{"no error body", "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "502 Bad Gateway"},
		{"nonsense", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "read the answer"},
		{"silence", "", "ask the agent"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			runDir := t.TempDir()
			l, err := net.Listen("unix", socketIn(runDir))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				_, _ = conn.Read(make([]byte, 1024))
				_, _ = io.WriteString(conn, tc.answer)
			}()
			err = ask(context.Background(), runDir, "GET", "/", 5*time.Second, new(api.Status))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want it to contain %q", err, tc.want)
			}
		})
	}
}

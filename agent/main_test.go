// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
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
	socket := filepath.Join(t.TempDir(), "none.sock")
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"no command", nil, "no command given"},
		{"unknown command", []string{"start"}, `unknown command "start"`},
		{"argument", []string{"status", "x"}, `unexpected argument "x"`},
		{"output", []string{"flows", "-o", "xml"}, `-o "xml": accepted are text, json`},
		{"no agent", []string{"status", "--socket", socket}, "no agent at " + socket},
		{"unload timeout", []string{"unload", "--timeout=0s"}, "--timeout=0s: accepted are durations above 0"},
		{"no source", []string{"run"}, "--node-name or --pods-file is required"},
		{"two sources", []string{"run", "--node-name=n", "--pods-file=p"}, "--node-name and --pods-file exclude each other"},
		{"kubeconfig without node", []string{"run", "--pods-file=p", "--kubeconfig=k"}, "--kubeconfig is for the cluster: give --node-name"},
		{"runtime classes", []string{"run", "--sandboxed-runtime-classes=kata,[x"}, `"[x": accepted are patterns`},
		{"uninstall timeout", []string{"uninstall", "--timeout=-1s"}, "--timeout=-1s: accepted are durations above 0"},
		{"uninstall of all nodes", []string{"uninstall", "--all-nodes"}, "--namespace and --selector are required"},
		{"uninstall from half a CNI", []string{"uninstall", "--cni-conf-dir=/c"}, "--cni-conf-dir and --cni-bin-dir: accepted are both"},
		{"no mount namespace", []string{"mount-bpffs", "--mount-namespace=" + socket}, "open mount namespace"},
		{"default namespaces", []string{"run", "--default-namespaces=a in b"}, "accepted is a label selector"},
		{"hazards", []string{"run", "--kernel-hazards=maybe"}, `--kernel-hazards="maybe": accepted are refuse, accept`},
		{"log format", []string{"run", "--log-format=xml"}, `--log-format="xml": accepted are auto, text, json`},
		{"observer", []string{"run", "--observer=x"}, `observer "x"`},
		{"size", []string{"run", "--max-pods=5000000000"}, "accepted are numbers from 0 to 4294967295"},
		{"one directory of CNI", []string{"run", "--cni-conf-dir=/c"}, "--cni-conf-dir and --cni-bin-dir: accepted are both, or none"},
		{"relative socket", []string{"run", "--cni-conf-dir=/c", "--cni-bin-dir=/b", "--socket=s"}, `"agentSocket": "s": accepted is an absolute path`},
		{"one address for two", []string{"run", "--pods-file=p", "--health-address=:1", "--metrics-address=:1"}, `are both ":1": accepted are two different ones`},
		{"guard", []string{"run", "--ulp-guard=maybe"}, `invalid value "maybe" for flag -ulp-guard: accepted are on, off`},
		{"doctor hazards", []string{"doctor", "--kernel-hazards=maybe"}, `--kernel-hazards="maybe": accepted are refuse, accept`},
		{"doctor output", []string{"doctor", "-o", "xml"}, `-o "xml": accepted are text, json`},
		{"forget pod", []string{"forget", "web"}, `pod "web": accepted is namespace/name`},
		{"forget port", []string{"forget", "default/web", "0"}, `port "0": accepted are 1 to 65535`},
		{"forget too much", []string{"forget", "default/web", "80", "x"}, `unexpected argument "x"`},
		{"long socket", []string{"run", "--run-dir=/" + strings.Repeat("x", 92)}, "accepted are at most 103 bytes"},
		{"long socket to ask", []string{"status", "--socket=/" + strings.Repeat("x", 103)}, "accepted are at most 103 bytes"},
		// Taken for an agent that does not run, its pins would be taken out below it.
		{"long socket to unload by", []string{"unload", "--pin-dir=/none/such", "--socket=/" + strings.Repeat("x", 103)}, "accepted are at most 103 bytes"},
		{"long run directory to uninstall by", []string{"uninstall", "--pin-dir=/none/such", "--run-dir=/" + strings.Repeat("x", 92)}, "accepted are at most 103 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := run(t.Context(), tc.args, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want it to contain %q", err, tc.want)
			}
		})
	}
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

func TestParseConfig(t *testing.T) {
	got, err := parseConfig([]string{
		"--pods-file=p", "--run-dir=/r", "--budget=8192", "--log-level=debug", "--cni-conf-dir=/c", "--cni-bin-dir=/b", "--plugin=/p",
		"--splice-guard=off", "--sandboxed-runtime-classes=kata-*, x",
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.podsFile, want.runDir, want.socket, want.datapath.Budget, want.logLevel = "p", "/r", "/r/agent.sock", 8192, -4
	want.cni = cniconf.Config{
		ConfDir: "/c", BinDir: "/b", NodeRoot: "/proc/1/root", Plugin: "/p",
		Section: api.PluginConf{AgentSocket: "/r/agent.sock", AgentTimeout: api.PluginTimeout, AttachmentsDir: "/r/attachments"},
	}
	want.guards["splice"] = "off"
	wantDiff(t, "sandboxed", patterns{"kata-*", "x"}, got.sandboxed)
	got.sandboxed, want.sandboxed = nil, nil
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	lock, err := lockRunDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = lockRunDir(dir)
	want := fmt.Sprintf("another podshunt-agent is running: process %d holds %s/lock", os.Getpid(), dir)
	if !errors.Is(err, errLocked) || err.Error() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if lock, err = lockRunDir(dir); err != nil {
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
	wantDiff(t, "nothing fatal", "", refuseHazards(hazards))
	hazards = append(hazards,
		api.Hazard{Name: "bad", Present: true, Fatal: true, Detail: "seen", Consequence: "some programs stall"},
		api.Hazard{Name: "guarded", Present: true, Guard: "g", Consequence: "nothing"},
		api.Hazard{Name: "worse", Present: true, Fatal: true, Consequence: "others crash"},
		api.Hazard{Name: "as bad", Present: true, Fatal: true, Consequence: "some programs stall"})
	wantDiff(t, "fatal", "kernel hazards bad, worse, as bad: some programs stall; others crash. "+
		"Pods take part on a kernel without them (`podshunt-agent doctor` has the details); "+
		"with --kernel-hazards=accept they take part on this one, and those programs break", refuseHazards(hazards))
}

func TestVerdict(t *testing.T) {
	for from, want := range map[policy.Verdict]datapath.Verdict{
		policy.Refuse: datapath.Refuse, policy.Allow: datapath.Allow, policy.Hold: datapath.Hold,
	} {
		if got := verdict(from); got != want {
			t.Errorf("verdict %d: got %d, want %d", from, got, want)
		}
	}
}

func at(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// The pods of the tests: client 1 (10.0.0.1), web 2 (10.0.0.2, port 22 excluded),
// out 3 (10.0.0.3, not opted in), held 4 (10.0.0.4, paused).
func testView() *view {
	now := time.Unix(1_000_000, 0)
	pod := func(name string, cookie uint64, s api.Settings, reason string) pods.Pod {
		return pods.Pod{PodStatus: api.PodStatus{
			Pod: api.PodRef{Namespace: "default", Name: name}, NetnsCookie: cookie,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(cookie)})},
			Enrolled:  s.Enabled, Reason: reason,
		}, Policy: policy.Pod{ID: cookie, Settings: s}}
	}
	web := pod("web", 2, api.Settings{Enabled: true, ExcludePorts: []api.PortRange{{First: 22, Last: 22}}}, "")
	return newView([]pods.Pod{
		pod("client", 1, api.Settings{Enabled: true}, ""),
		web, web, // two interfaces
		pod("out", 3, api.Settings{}, "not opted in"),
		pod("held", 4, api.Settings{Enabled: true, PausedUntil: now.Add(time.Hour)}, "paused"),
		pod("unknown", 0, api.Settings{Enabled: true}, "its netns cannot be read"),
	}, policy.Cluster{}, now)
}

func TestUnpaired(t *testing.T) {
	const (
		reconnect = "connected before both pods took part, or by a handshake that cannot be matched (SNAT, TCP Fast Open): reconnect to try again"
		stranger  = "the other end is not a pod of this node that takes part"
	)
	listen := func(netns uint64, local string) socket {
		return socket{netns: netns, local: at(local), listening: true}
	}
	open := func(netns, cookie uint64, local, remote string) socket {
		return socket{netns: netns, cookie: cookie, local: at(local), remote: at(remote)}
	}
	for _, tc := range []struct {
		name    string
		sockets []socket
		known   []datapath.Flow
		// want has "client > dialled > server: reason".
		want []string
	}{
		{
			name: "one line for both ends",
			sockets: []socket{
				listen(2, "[::]:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: " + reconnect},
		},
		{
			name: "a paired connection is not listed",
			sockets: []socket{
				listen(2, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
			},
			known: []datapath.Flow{{ID: 11, ServerNetns: 2, Client: at("10.0.0.1:5000"), Server: at("10.0.0.2:80"), Joined: true}},
		},
		{
			name: "one client port, one of two connections paired",
			sockets: []socket{
				listen(2, "0.0.0.0:80"), listen(2, "0.0.0.0:22"),
				open(1, 11, "10.0.0.1:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
				open(1, 13, "10.0.0.1:5000", "10.0.0.2:22"), open(2, 14, "10.0.0.2:22", "10.0.0.1:5000"),
			},
			known: []datapath.Flow{{ID: 11, ServerNetns: 2, Client: at("10.0.0.1:5000"), Server: at("10.0.0.2:80"), Joined: true}},
			want: []string{
				"default/client 10.0.0.1:5000 > 10.0.0.2:22 > default/web 10.0.0.2:22: server port in podshunt.io/exclude-ports",
			},
		},
		{
			name: "through a translated address",
			sockets: []socket{
				listen(2, "0.0.0.0:22"), open(1, 11, "10.0.0.1:5000", "10.96.0.1:2222"), open(2, 12, "10.0.0.2:22", "10.0.0.1:5000"),
			},
			want: []string{
				"default/client 10.0.0.1:5000 > 10.96.0.1:2222 > default/web 10.0.0.2:22: server port in podshunt.io/exclude-ports",
			},
		},
		{
			name: "a pod that is not opted in",
			sockets: []socket{
				listen(3, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.3:80"), open(3, 12, "10.0.0.3:80", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.3:80 > default/out 10.0.0.3:80: default/out: not opted in"},
		},
		{
			name: "paused",
			sockets: []socket{
				listen(2, "0.0.0.0:80"), open(4, 11, "10.0.0.4:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.4:5000"),
			},
			want: []string{"default/held 10.0.0.4:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: client paused by podshunt.io/paused-until"},
		},
		{
			name:    "to and from elsewhere",
			sockets: []socket{listen(2, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "192.0.2.1:443"), open(2, 12, "10.0.0.2:80", "192.0.2.2:6000")},
			want: []string{
				"default/client 10.0.0.1:5000 > 192.0.2.1:443 > / 192.0.2.1:443: " + stranger,
				"/ 192.0.2.2:6000 > 10.0.0.2:80 > default/web 10.0.0.2:80: " + stranger,
			},
		},
		{
			name: "of no pod that wants to take part",
			sockets: []socket{
				listen(3, "0.0.0.0:80"), open(3, 12, "10.0.0.3:80", "192.0.2.2:6000"), open(3, 13, "10.0.0.3:5000", "192.0.2.2:443"),
			},
		},
		{
			name: "loopback of two pods with the same ports",
			sockets: []socket{
				listen(1, "127.0.0.1:80"), open(1, 11, "127.0.0.1:5000", "127.0.0.1:80"), open(1, 12, "127.0.0.1:80", "127.0.0.1:5000"),
				listen(2, "127.0.0.1:80"), open(2, 13, "127.0.0.1:5000", "127.0.0.1:80"), open(2, 14, "127.0.0.1:80", "127.0.0.1:5000"),
			},
			want: []string{
				"default/client 127.0.0.1:5000 > 127.0.0.1:80 > default/client 127.0.0.1:80: " + reconnect,
				"default/web 127.0.0.1:5000 > 127.0.0.1:80 > default/web 127.0.0.1:80: " + reconnect,
			},
		},
		{
			name:    "the listener is closed",
			sockets: []socket{open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:80")},
			want:    []string{"default/client 10.0.0.1:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: " + reconnect},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, f := range testView().unpaired(tc.sockets, tc.known) {
				got = append(got, fmt.Sprintf("%s %s > %s > %s %s: %s", f.Client.Pod, f.Client.Address, f.OrigDst, f.Server.Pod, f.Server.Address, f.Reason))
			}
			wantDiff(t, "flows", tc.want, got)
		})
	}
}

func TestPaired(t *testing.T) {
	since := time.Unix(1000, 0)
	flow := datapath.Flow{
		ID: 1, ClientNetns: 1, ServerNetns: 2, Joined: true, Since: since,
		Client: at("10.0.0.1:5000"), OrigDst: at("10.96.0.1:80"), Server: at("10.0.0.2:8080"),
		ToServer: datapath.Direction{
			Shortcut: true, Verdict: datapath.Allow, Reason: "unsupported", ReadFlags: 0x100 | 0x10,
			ShortcutBytes: 1, TCPBytes: 2, Unread: 3, Switches: 4,
		},
		ToClient: datapath.Direction{Verdict: datapath.Hold, PolicyReason: uint32(policy.ServerPaused), Reason: "not allowed"},
	}
	released := flow
	released.Joined, released.ServerNetns = false, 3
	released.ToClient = datapath.Direction{Verdict: datapath.Refuse, Reason: "not allowed"}
	strange := released
	strange.ClientNetns, strange.ServerNetns = 99, 98
	strange.ToServer = datapath.Direction{Verdict: datapath.Allow}

	client := api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "client"}, Address: flow.Client}
	toServer := &api.Direction{
		Shortcut: true, Reason: "unsupported", Detail: "MSG_WAITALL 0x10", ShortcutBytes: 1, TCPBytes: 2, UnreadBytes: 3, Switches: 4,
	}
	wantDiff(t, "flows", []api.Flow{
		{
			Client: client, OrigDst: flow.OrigDst, Paired: true, Since: since,
			Server:   api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "web"}, Address: flow.Server},
			ToServer: toServer, ToClient: &api.Direction{Reason: "not allowed", Detail: "server paused by podshunt.io/paused-until"},
		},
		{
			Client: client, OrigDst: flow.OrigDst, Paired: true, Since: since,
			Server:   api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "out"}},
			ToServer: toServer, ToClient: &api.Direction{Reason: "not allowed", Detail: "default/out: not opted in"},
		},
		{
			Client: api.FlowEnd{Address: flow.Client}, OrigDst: flow.OrigDst, Paired: true, Since: since,
			ToServer: &api.Direction{},
			ToClient: &api.Direction{Reason: "not allowed", Detail: "the other end is not a pod of this node that takes part"},
		},
	}, testView().paired([]datapath.Flow{flow, released, strange}))
}

func TestWriteFlows(t *testing.T) {
	flows := testView().paired([]datapath.Flow{
		{
			ClientNetns: 1, ServerNetns: 2, Joined: true, Client: at("10.0.0.1:5000"), OrigDst: at("10.96.0.1:80"), Server: at("10.0.0.2:8080"),
			ToServer: datapath.Direction{Shortcut: true, Verdict: datapath.Allow, ShortcutBytes: 1 << 30, TCPBytes: 12, Reason: "budget"},
			ToClient: datapath.Direction{Verdict: datapath.Hold, PolicyReason: uint32(policy.ServerPaused), Reason: "not allowed", TCPBytes: 1536},
		},
		{ClientNetns: 1, ServerNetns: 2, Client: at("10.0.0.1:5001"), OrigDst: at("10.0.0.2:8080")},
	})
	flows = append(flows, api.Flow{
		Client: api.FlowEnd{Address: at("192.0.2.1:6000")}, OrigDst: at("10.0.0.2:80"),
		Server: api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "web"}, Address: at("10.0.0.2:80")}, Reason: "other end",
	})
	flows = append(flows, api.Flow{
		Client: flows[0].Client, OrigDst: at("10.96.0.1:22"), Server: flows[2].Server, Reason: "port",
	})
	var out bytes.Buffer
	if err := writeFlows(&out, flows); err != nil {
		t.Fatal(err)
	}
	wantText(t, `
CLIENT                        SERVER                     DIRECTION  PATH      SHORTCUT  TCP      LAST REASON FOR TCP
default/client 10.0.0.1:5000  default/web 10.0.0.2:8080  to server  shortcut  1.0 GiB   12 B     budget
                                dialled 10.96.0.1:80     to client  tcp       0 B       1.5 KiB  not allowed (server paused by podshunt.io/paused-until)
default/client 10.0.0.1:5001  default/web                to server  tcp       0 B       0 B
                                dialled 10.0.0.2:8080    to client  tcp       0 B       0 B
- 192.0.2.1:6000              default/web 10.0.0.2:80    both       tcp                          other end
default/client 10.0.0.1:5000  default/web 10.0.0.2:80    both       tcp                          port
                                dialled 10.96.0.1:22
`, out.String())

	out.Reset()
	if err := writeFlows(&out, nil); err != nil {
		t.Fatal(err)
	}
	wantText(t, "\nno connections\n", out.String())
}

func TestWriteStatus(t *testing.T) {
	status := api.Status{
		Version: "v1", Kernel: "6.18", Observer: "tracepoint", Cgroup: "/cg", PinDir: "/pins",
		Hazards: []api.Hazard{
			{Name: "one", Present: true, Fatal: true, Detail: "stalls"},
			{Name: "two", Detail: "fine"},
			{Name: "three", Present: true, Detail: "short"},
			{Name: "four", Present: true, Guard: "splice", Detail: "none"},
		},
		Pods: []api.PodStatus{
			{Pod: api.PodRef{Namespace: "a", Name: "b"}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, Enrolled: true},
			{Pod: api.PodRef{Namespace: "a", Name: "c"}, Reason: "first\nsecond"},
		},
		CNI:              &api.CNIStatus{Conflist: "/c/10-x.conflist", Installed: true, Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local), Error: "another is not valid"},
		Guards:           []string{"flags", "splice"},
		UnsupportedPorts: []api.UnsupportedPort{{Pod: api.PodRef{Namespace: "a", Name: "b"}, Port: 80, Reasons: []string{"splice", "MSG_OOB"}, Since: time.Unix(0, 0).UTC()}},
		SourceError:      "no file", PolicyError: "map full",
		Maps:     []api.MapUsage{{Name: "pods", Entries: 1, Max: 1024}},
		Outcomes: []api.Outcome{{Name: "message_shortcut", Count: 2, Bytes: 2048}, {Name: "connection_paired", Count: 1}, {Name: "message_ulp"}},
	}
	var out bytes.Buffer
	if err := writeStatus(&out, status); err != nil {
		t.Fatal(err)
	}
	wantText(t, `
agent       v1, running
kernel      6.18
observer    tracepoint
cgroup      /cg
pins        /pins
guards      flags splice
cni plugin  installed in /c/10-x.conflist since 2026-01-02 03:04:05: another is not valid
source      no file
policy      map full

HAZARD  PRESENT       DETAIL
one     yes, refused  stalls
two     no            fine
three   yes           short
four    yes, guarded  none

POD  ADDRESSES         STATE       REASON
a/b  10.0.0.1 fd00::1  takes part
a/c  -                 tcp         first; second

NOT PAIRED  SERVER PORT  FROM        USED             SINCE
a/b         80           everywhere  splice, MSG_OOB  1970-01-01 00:00:00

MAP   ENTRIES  MAX
pods  1        1024

OUTCOME            COUNT  BYTES
message_shortcut   2      2.0 KiB
connection_paired  1
`, out.String())

	out.Reset()
	if err := writeStatus(&out, api.Status{Version: "v1", Unloaded: true, HazardsAccepted: true, Hazards: status.Hazards[:1]}); err != nil {
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
		{"nonsense", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "decode the answer"},
		{"silence", "", "ask the agent"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", path)
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
			err = ask(context.Background(), path, "GET", "/", 5*time.Second, new(api.Status))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want it to contain %q", err, tc.want)
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

func wantDiff(t *testing.T, what string, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("%s (-want +got)\n%s", what, diff)
	}
}

func at(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// The pods of the tests: client 1 (10.0.0.1), web 2 (10.0.0.2, port 22 excluded),
// out 3 (10.0.0.3, not opted in), held 4 (10.0.0.4, paused), java 5 (10.0.0.5) and its
// client jdbc 6 (10.0.0.6), which accept blocking sockets.
func testView() *View {
	now := time.Unix(1_000_000, 0)
	pod := func(name string, cookie uint64, s api.Settings, state api.PodState, reason api.PodReason, message string) pods.Pod {
		return pods.Pod{PodStatus: api.PodStatus{
			Pod: api.PodRef{Namespace: "default", Name: name}, NetnsCookie: cookie,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(cookie)})},
			State:     state, Enrolled: s.Enabled, Reason: reason, Message: message,
		}, Policy: policy.Pod{ID: cookie, Settings: s}}
	}
	web := pod("web", 2, api.Settings{Enabled: true, ExcludePorts: []api.PortRange{{First: 22, Last: 22}}}, api.PodEnrolled, "", "")
	return NewView([]pods.Pod{
		pod("client", 1, api.Settings{Enabled: true}, api.PodEnrolled, "", ""),
		web, web, // two interfaces
		pod("out", 3, api.Settings{}, api.PodOut, api.PodNotOptedIn, "not opted in"),
		pod("held", 4, api.Settings{Enabled: true, PausedUntil: now.Add(time.Hour)}, api.PodHeld, api.PodPaused, "paused"),
		pod("java", 5, api.Settings{Enabled: true, AcceptBlocking: true}, api.PodEnrolled, "", ""),
		pod("jdbc", 6, api.Settings{Enabled: true, AcceptBlocking: true}, api.PodEnrolled, "", ""),
		pod("unknown", 0, api.Settings{Enabled: true}, api.PodWaiting, api.PodNetnsUnknown, "its netns cannot be read"),
	}, policy.Cluster{}, Ports{
		Unsupported: []datapath.UnsupportedPort{
			{Netns: 2, Client: 1, Port: 8888, Reasons: []string{"splice", "msg_oob"}},
			{Netns: 5, Port: 80, Reasons: []string{"blocking"}},
			{Netns: 5, Port: 81, Reasons: []string{"blocking"}},
			{Netns: 5, Client: 6, Port: 81, Reasons: []string{"splice", "blocking"}},
		},
		Join:      []datapath.JoinPort{{Netns: 2, Port: 81, JoinAfter: 2 * joinAfter}, {Netns: 2, Port: 82}},
		JoinAfter: joinAfter,
	}, now)
}

const joinAfter = 32

func TestUnpaired(t *testing.T) {
	const (
		reconnect = "unmatched []: a socket is in blocking mode (see podshunt.io/blocking-sockets), or the connection was made before both pods took part and could not join, or its two sockets cannot be matched (TCP Fast Open): reconnect to try again"
		stranger  = "peer_not_here []: the other end is not a pod of this node that takes part"
	)
	listen := func(netns uint64, local string) Socket {
		return Socket{netns: netns, local: at(local), listening: true}
	}
	open := func(netns, cookie uint64, local, remote string) Socket {
		return Socket{netns: netns, cookie: cookie, local: at(local), remote: at(remote), segments: joinAfter}
	}
	for _, tc := range []struct {
		name    string
		sockets []Socket
		known   []datapath.Flow
		// want has "client > where it connected to > server: reason".
		want []string
	}{
		{
			name: "one line for both ends",
			sockets: []Socket{
				listen(2, "[::]:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: " + reconnect},
		},
		{
			name: "a paired connection is not listed",
			sockets: []Socket{
				listen(2, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
			},
			known: []datapath.Flow{{ID: 11, ServerNetns: 2, Client: at("10.0.0.1:5000"), Server: at("10.0.0.2:80"), Joined: true}},
		},
		{
			name: "one client port, one of two connections paired",
			sockets: []Socket{
				listen(2, "0.0.0.0:80"), listen(2, "0.0.0.0:22"),
				open(1, 11, "10.0.0.1:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
				open(1, 13, "10.0.0.1:5000", "10.0.0.2:22"), open(2, 14, "10.0.0.2:22", "10.0.0.1:5000"),
			},
			known: []datapath.Flow{{ID: 11, ServerNetns: 2, Client: at("10.0.0.1:5000"), Server: at("10.0.0.2:80"), Joined: true}},
			want: []string{
				"default/client 10.0.0.1:5000 > 10.0.0.2:22 > default/web 10.0.0.2:22: port_excluded []: server port in podshunt.io/exclude-ports",
			},
		},
		{
			name: "through a translated address",
			sockets: []Socket{
				listen(2, "0.0.0.0:22"), open(1, 11, "10.0.0.1:5000", "10.96.0.1:2222"), open(2, 12, "10.0.0.2:22", "10.0.0.1:5000"),
			},
			want: []string{
				"default/client 10.0.0.1:5000 > 10.96.0.1:2222 > default/web 10.0.0.2:22: port_excluded []: server port in podshunt.io/exclude-ports",
			},
		},
		{
			name: "a pod that is not opted in",
			sockets: []Socket{
				listen(3, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.3:80"), open(3, 12, "10.0.0.3:80", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.3:80 > default/out 10.0.0.3:80: pod_out [not_opted_in]: default/out: not opted in"},
		},
		{
			name: "paused",
			sockets: []Socket{
				listen(2, "0.0.0.0:80"), open(4, 11, "10.0.0.4:5000", "10.0.0.2:80"), open(2, 12, "10.0.0.2:80", "10.0.0.4:5000"),
			},
			want: []string{"default/held 10.0.0.4:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: client_paused []: client paused by podshunt.io/paused-until"},
		},
		{
			name:    "to and from elsewhere",
			sockets: []Socket{listen(2, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "192.0.2.1:443"), open(2, 12, "10.0.0.2:80", "192.0.2.2:6000")},
			want: []string{
				"default/client 10.0.0.1:5000 > 192.0.2.1:443 > / 192.0.2.1:443: " + stranger,
				"/ 192.0.2.2:6000 > 10.0.0.2:80 > default/web 10.0.0.2:80: " + stranger,
			},
		},
		{
			name: "of no pod that wants to take part",
			sockets: []Socket{
				listen(3, "0.0.0.0:80"), open(3, 12, "10.0.0.3:80", "192.0.2.2:6000"), open(3, 13, "10.0.0.3:5000", "192.0.2.2:443"),
			},
		},
		{
			name: "loopback of two pods with the same ports",
			sockets: []Socket{
				listen(1, "127.0.0.1:80"), open(1, 11, "127.0.0.1:5000", "127.0.0.1:80"), open(1, 12, "127.0.0.1:80", "127.0.0.1:5000"),
				listen(2, "127.0.0.1:80"), open(2, 13, "127.0.0.1:5000", "127.0.0.1:80"), open(2, 14, "127.0.0.1:80", "127.0.0.1:5000"),
			},
			want: []string{
				"default/client 127.0.0.1:5000 > 127.0.0.1:80 > default/client 127.0.0.1:80: " + reconnect,
				"default/web 127.0.0.1:5000 > 127.0.0.1:80 > default/web 127.0.0.1:80: " + reconnect,
			},
		},
		{
			name: "a port that is known for what is not served",
			sockets: []Socket{
				listen(2, "0.0.0.0:8888"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:8888"), open(2, 12, "10.0.0.2:8888", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.2:8888 > default/web 10.0.0.2:8888: unsupported [splice msg_oob]: " +
				"an earlier connection to this server port used splice, MSG_OOB, which does not work on the shortcut: `podshunt-agent forget` lets new ones be paired again"},
		},
		{
			name: "a port that is known for blocking sockets, with consent of one pod",
			sockets: []Socket{
				listen(5, "0.0.0.0:80"), open(1, 11, "10.0.0.1:5000", "10.0.0.5:80"), open(5, 12, "10.0.0.5:80", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.5:80 > default/java 10.0.0.5:80: unsupported [blocking]: " +
				"an earlier connection to this server port used a socket in blocking mode, which does not work on the shortcut: `podshunt-agent forget` lets new ones be paired again"},
		},
		{
			name: "a port that is known for blocking sockets, with consent of both pods",
			sockets: []Socket{
				listen(5, "0.0.0.0:80"), open(6, 11, "10.0.0.6:5000", "10.0.0.5:80"), open(5, 12, "10.0.0.5:80", "10.0.0.6:5000"),
			},
			want: []string{"default/jdbc 10.0.0.6:5000 > 10.0.0.5:80 > default/java 10.0.0.5:80: unmatched []: " +
				"the connection was made before both pods took part and could not join, " +
				"or its two sockets cannot be matched (TCP Fast Open): reconnect to try again"},
		},
		{
			name: "too few segments so far",
			sockets: []Socket{
				listen(2, "0.0.0.0:80"),
				{netns: 1, cookie: 11, local: at("10.0.0.1:5000"), remote: at("10.0.0.2:80"), segments: joinAfter - 1},
				open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"),
			},
			want: []string{"default/client 10.0.0.1:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: watched []: " +
				"it joins once it has sent and received 32 segments of data (--join-after), so far 31"},
		},
		{
			name: "a port to which connections join later, and one where they join at the handshake",
			sockets: []Socket{
				listen(2, "0.0.0.0:81"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:81"), open(2, 12, "10.0.0.2:81", "10.0.0.1:5000"),
				listen(2, "0.0.0.0:82"), open(1, 13, "10.0.0.1:5001", "10.0.0.2:82"), open(2, 14, "10.0.0.2:82", "10.0.0.1:5001"),
			},
			want: []string{
				"default/client 10.0.0.1:5000 > 10.0.0.2:81 > default/web 10.0.0.2:81: watched []: it joins once it has sent and received 64 " +
					"segments of data (--join-after is less; earlier connections to this server port have ended soon after that), so far 32",
				"default/client 10.0.0.1:5001 > 10.0.0.2:82 > default/web 10.0.0.2:82: " + reconnect,
			},
		},
		{
			name: "a port that is known for more than blocking sockets",
			sockets: []Socket{
				listen(5, "0.0.0.0:81"), open(6, 11, "10.0.0.6:5000", "10.0.0.5:81"), open(5, 12, "10.0.0.5:81", "10.0.0.6:5000"),
			},
			want: []string{"default/jdbc 10.0.0.6:5000 > 10.0.0.5:81 > default/java 10.0.0.5:81: unsupported [splice]: " +
				"an earlier connection to this server port used splice, which does not work on the shortcut: `podshunt-agent forget` lets new ones be paired again"},
		},
		{
			name:    "the listener is closed",
			sockets: []Socket{open(2, 12, "10.0.0.2:80", "10.0.0.1:5000"), open(1, 11, "10.0.0.1:5000", "10.0.0.2:80")},
			want:    []string{"default/client 10.0.0.1:5000 > 10.0.0.2:80 > default/web 10.0.0.2:80: " + reconnect},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, f := range testView().Unpaired(tc.sockets, tc.known) {
				got = append(got, fmt.Sprintf("%s %s > %s > %s %s: %s %v: %s", f.Client.Pod, f.Client.Address, f.OrigDst, f.Server.Pod, f.Server.Address, f.Reason, f.Details, f.Message))
			}
			wantDiff(t, "flows", tc.want, got)
		})
	}
}

// TestUnsupportedPorts: a port is listed unless nothing of it counts between its two pods.
func TestUnsupportedPorts(t *testing.T) {
	pod := func(name string) api.PodRef { return api.PodRef{Namespace: "default", Name: name} }
	java, client, jdbc := pod("java"), pod("client"), pod("jdbc")
	wantDiff(t, "ports", []api.UnsupportedPort{
		{Pod: java, Port: 80, Reasons: []string{"blocking"}}, // for other clients
		{Pod: java, Client: &client, Port: 80, Reasons: []string{"blocking"}},
		{Pod: java, Client: &jdbc, Port: 81, Reasons: []string{"splice"}},
		{Port: 82, Reasons: []string{"splice"}},
	}, testView().UnsupportedPorts([]datapath.UnsupportedPort{
		{Netns: 5, Port: 80, Reasons: []string{"blocking"}},
		{Netns: 5, Client: 1, Port: 80, Reasons: []string{"blocking"}},
		{Netns: 5, Client: 6, Port: 80, Reasons: []string{"blocking"}},
		{Netns: 5, Client: 6, Port: 81, Reasons: []string{"splice", "blocking"}},
		{Netns: 99, Port: 82, Reasons: []string{"splice"}},
	}))
}

func TestPaired(t *testing.T) {
	since := time.Unix(1000, 0)
	flow := datapath.Flow{
		ID: 1, Unsupported: []string{"msg_waitall", "recv_flags"}, ClientNetns: 1, ServerNetns: 2, Joined: true, Since: since,
		Client: at("10.0.0.1:5000"), OrigDst: at("10.96.0.1:80"), Server: at("10.0.0.2:8080"),
		ToServer: datapath.Direction{
			Shortcut: true, Verdict: rule.Allow, Reason: "unsupported", ReadFlags: 0x100 | 0x10, // MSG_WAITALL, and one without a name
			ShortcutBytes: 1, TCPBytes: 2, Unread: 3, Switches: 4,
		},
		ToClient: datapath.Direction{Verdict: rule.Hold, PolicyReason: uint32(policy.ServerPaused), Reason: "not_allowed"},
	}
	released := flow
	released.Joined, released.ServerNetns = false, 3
	released.ToClient = datapath.Direction{Verdict: rule.Refuse, Reason: "not_allowed"}
	strange := released
	strange.ClientNetns, strange.ServerNetns = 99, 98
	strange.ToServer = datapath.Direction{Verdict: rule.Allow}

	client := api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "client"}, Address: flow.Client}
	toServer := &api.Direction{
		Shortcut: true, Reason: "unsupported", Details: []string{"msg_waitall", "recv_flags"},
		Message:       "one end used a call that does not work on the shortcut (MSG_WAITALL 0x10)",
		ShortcutBytes: 1, TCPBytes: 2, UnreadBytes: 3, Switches: 4,
	}
	wantDiff(t, "flows", []api.Flow{
		{
			Client: client, OrigDst: flow.OrigDst, Paired: true, Since: since,
			Server:   api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "web"}, Address: flow.Server},
			ToServer: toServer, ToClient: &api.Direction{
				Reason: "not_allowed", Details: []string{"server_paused"}, Message: "not allowed (server paused by podshunt.io/paused-until)",
			},
		},
		{
			Client: client, OrigDst: flow.OrigDst, Paired: true, Since: since,
			Server:   api.FlowEnd{Pod: api.PodRef{Namespace: "default", Name: "out"}},
			ToServer: toServer, ToClient: &api.Direction{
				Reason: "not_allowed", Details: []string{"pod_out", "not_opted_in"}, Message: "not allowed (default/out: not opted in)",
			},
		},
		{
			Client: api.FlowEnd{Address: flow.Client}, OrigDst: flow.OrigDst, Paired: true, Since: since,
			ToServer: &api.Direction{},
			ToClient: &api.Direction{
				Reason: "not_allowed", Details: []string{"peer_not_here"},
				Message: "not allowed (the other end is not a pod of this node that takes part)",
			},
		},
	}, testView().Paired([]datapath.Flow{flow, released, strange}))
}

// TestCodes: each code that scripts may see has a text for people, and is in operations.md.
func TestCodes(t *testing.T) {
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	codes := []string{reasonPod + string(api.PodOut), reasonPeer, reasonUnsupported, reasonUnmatched, reasonWatched}
	for _, code := range datapath.MessageReasons() {
		if messageTexts[code] == "" {
			t.Errorf("reason %s of a message has no text", code)
		}
		codes = append(codes, code)
	}
	for _, code := range datapath.UnsupportedReasons() {
		if callNames[code] == "" {
			t.Errorf("call %s has no name", code)
		}
		codes = append(codes, code)
	}
	for _, r := range policy.Reasons() {
		if r.String() == "" || r.Code() == "" {
			t.Errorf("policy reason %d: got text %q and code %q", r, r, r.Code())
		}
		if r != policy.Allowed {
			codes = append(codes, r.Code())
		}
	}
	for _, state := range api.PodStates() {
		codes = append(codes, string(state))
	}
	for _, r := range api.PodReasons() {
		codes = append(codes, string(r))
	}
	for _, r := range api.KernelReasons() {
		codes = append(codes, string(r))
	}
	for _, code := range codes {
		if !bytes.Contains(doc, []byte("`"+code+"`")) {
			t.Errorf("operations.md does not explain %s", code)
		}
	}
	if len(messageTexts) != len(datapath.MessageReasons()) || len(callNames) != len(datapath.UnsupportedReasons()) {
		t.Error("there are texts of codes that do not exist")
	}
}

// BenchmarkFlows explains the connections of a busy node: as many as the map of flows
// may have by default, and as many that are not paired.
func BenchmarkFlows(b *testing.B) {
	const pairs = 25_000
	var sockets []Socket
	var known []datapath.Flow
	for i := range pairs {
		client := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(1024+i))
		server := at("10.0.0.2:80")
		known = append(known, datapath.Flow{ID: uint64(i), ClientNetns: 1, ServerNetns: 2, Client: client, Server: server, OrigDst: server, Joined: true})
		server = at("10.0.0.2:22")
		sockets = append(sockets, Socket{netns: 1, cookie: uint64(pairs + i), local: client, remote: server},
			Socket{netns: 2, cookie: uint64(2*pairs + i), local: server, remote: client})
	}
	sockets = append(sockets, Socket{netns: 2, local: at("0.0.0.0:22"), listening: true})
	for b.Loop() {
		v := testView()
		flows := append(v.Paired(known), v.Unpaired(sockets, known)...)
		Sort(flows)
		if len(flows) != 2*pairs {
			b.Fatalf("got %d flows, want %d", len(flows), 2*pairs)
		}
	}
}

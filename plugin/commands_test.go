// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

const (
	result031 = `{"cniVersion":"0.3.1","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/run/netns/a"}],
		"ips":[{"version":"4","address":"10.1.0.2/24","gateway":"10.1.0.1","interface":1},
		{"version":"6","address":"fd00::2/64","interface":1}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}`
	result040 = `{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/a"}],
		"ips":[{"version":"4","address":"10.1.0.2/24"},{"version":"6","address":"fd00::2/64"}],
		"dns":{"nameservers":["10.1.0.1"]}}`
	result100 = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","mac":"0a:00:00:00:00:01","sandbox":"/run/netns/a"}],
		"ips":[{"address":"10.1.0.2/24","gateway":"10.1.0.1","interface":0},{"address":"fd00::2/64"}],
		"routes":[{"dst":"0.0.0.0/0","gw":"10.1.0.1"}]}`
	// result110 holds what the library does not know, and a number that no float64 holds.
	result110 = `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mtu":1500,"sandbox":"/run/netns/a"}],
		"ips":[{"address":"10.1.0.2/24"},{"address":"fd00::2/64"}],
		"routes":[{"dst":"0.0.0.0/0","mtu":1400,"priority":10,"table":254}],
		"example.com/extra":{"id":9007199254740993,"text":"<&>"}}`
)

// node is one node's agent socket and attachments directory.
type node struct {
	socket, attachments string
	// timeout is the agentTimeout that is configured.
	timeout time.Duration
}

func newNode(t testing.TB) node {
	dir := t.TempDir()
	return node{socket: filepath.Join(dir, "agent.sock"), attachments: filepath.Join(dir, "run", "attachments"), timeout: 10 * time.Second}
}

// stdin returns our section as a runtime passes it; keys are added to it.
func (n node) stdin(t testing.TB, version, prevResult string, keys map[string]any) []byte {
	t.Helper()
	section := map[string]any{
		"cniVersion": version, "name": "pods", "type": "podshunt",
		"agentSocket": n.socket, "agentTimeout": n.timeout.String(), "attachmentsDir": n.attachments,
	}
	if prevResult != "" {
		section["prevResult"] = json.RawMessage(prevResult)
	}
	maps.Copy(section, keys)
	return mustMarshal(t, section)
}

func (n node) args(t testing.TB, version, prevResult string) *skel.CmdArgs {
	t.Helper()
	return &skel.CmdArgs{
		ContainerID: "c1", Netns: "/run/netns/a", IfName: "eth0",
		Args:      "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1;X=a=b;odd",
		StdinData: n.stdin(t, version, prevResult, nil),
	}
}

// waiting returns the content of the attachments directory by file name.
func (n node) waiting(t testing.TB) map[string]string {
	t.Helper()
	files, err := os.ReadDir(n.attachments)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, file := range files {
		content, err := os.ReadFile(filepath.Join(n.attachments, file.Name()))
		if err != nil {
			t.Fatal(err)
		}
		found[file.Name()] = string(content)
	}
	return found
}

// cart is the attachment of node.args.
func cart() api.Attachment {
	return api.Attachment{
		AttachmentID: api.AttachmentID{Network: "pods", ContainerID: "c1", IfName: "eth0"},
		Netns:        "/run/netns/a",
		Pod:          api.PodRef{Namespace: "shop", Name: "cart-0", UID: "u-1"},
		Addresses:    []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2")},
	}
}

// agent is a fake that answers every request alike and keeps what it was told.
type agent struct {
	mu   sync.Mutex
	told []string
}

// startAgent serves on the node's socket until the test ends.
func startAgent(t testing.TB, n node, code int, answer string) *agent {
	t.Helper()
	a := &agent{}
	server := &http.Server{
		ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			a.mu.Lock()
			a.told = append(a.told, r.Method+" "+r.URL.Path+" "+string(body))
			a.mu.Unlock()
			w.WriteHeader(code)
			_, _ = io.WriteString(w, answer)
		}),
	}
	listener := mustListen(t, n)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return a
}

func (a *agent) requests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.told
}

func mustListen(t testing.TB, n node) net.Listener {
	t.Helper()
	listener, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener
}

func mustMarshal(t testing.TB, value any) []byte {
	t.Helper()
	data, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// decodeExact keeps numbers as text, so that a rounded one shows.
func decodeExact(t testing.TB, data []byte) any {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		t.Fatalf("decode %q: %v", data, err)
	}
	if _, err := decoder.Token(); err != io.EOF {
		t.Fatalf("got more than one JSON value in %q", data)
	}
	return value
}

// checkCode wants a CNI error with the code and the parts in its text.
func checkCode(t testing.TB, err error, code uint, parts ...string) {
	t.Helper()
	var cniErr *types.Error
	if !errors.As(err, &cniErr) || cniErr.Code != code {
		t.Fatalf("got error %v, want a CNI error with code %d", err, code)
	}
	for _, part := range parts {
		if !strings.Contains(cniErr.Error(), part) {
			t.Errorf("got error %q, want %q in it", cniErr, part)
		}
	}
}

func TestAddPrintsPrevResult(t *testing.T) {
	const converted = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/a"}],
		"ips":[{"address":"10.1.0.2/24"},{"address":"fd00::2/64"}],"dns":{"nameservers":["10.1.0.1"]}}`
	for _, tc := range []struct {
		name, version, prevResult, want string
	}{
		{"0.3.1", "0.3.1", result031, result031},
		{"0.4.0", "0.4.0", result040, result040},
		{"1.0.0", "1.0.0", result100, result100},
		{"1.1.0", "1.1.0", result110, result110},
		{"no version in result", "0.4.0", strings.Replace(result040, `"cniVersion":"0.4.0",`, "", 1), result040},
		{"result of another version", "1.0.0", result040, converted},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := startAgent(t, n, http.StatusOK, `{"enrolled":true}`)
			var stdout bytes.Buffer
			if err := add(n.args(t, tc.version, tc.prevResult), &stdout); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(decodeExact(t, []byte(tc.want)), decodeExact(t, stdout.Bytes())); diff != "" {
				t.Errorf("printed result (-want +got):\n%s", diff)
			}
			want := []string{"PUT /v1/attachments " + string(mustMarshal(t, cart()))}
			if diff := cmp.Diff(want, a.requests()); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(map[string]string{}, n.waiting(t)); diff != "" {
				t.Errorf("waiting attachments (-want +got):\n%s", diff)
			}
		})
	}
}

// TestAgentState runs the verbs in each state that an agent can be in.
func TestAgentState(t *testing.T) {
	for _, tc := range []struct {
		name  string
		start func(testing.TB, *node)
		// answers reports whether the agent takes an attachment.
		answers bool
		// atLeast is how long a verb has to wait.
		atLeast time.Duration
	}{
		{"up", func(t testing.TB, n *node) {
			startAgent(t, *n, http.StatusOK, `{"enrolled":false,"reason":"not opted in"}`)
		}, true, 0},
		{"down", func(testing.TB, *node) {}, false, 0},
		{"crashed", func(t testing.TB, n *node) {
			listener := mustListen(t, *n)
			listener.(*net.UnixListener).SetUnlinkOnClose(false)
			_ = listener.Close()
		}, false, 0},
		{"hanging", func(t testing.TB, n *node) {
			n.timeout = 100 * time.Millisecond
			mustListen(t, *n)
		}, false, 100 * time.Millisecond},
		{"stuck in its answer", func(t testing.TB, n *node) {
			n.timeout = 100 * time.Millisecond
			listener := mustListen(t, *n)
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
					t.Cleanup(func() { _ = conn.Close() })
				}
			}()
		}, false, 0},
		{"failing", func(t testing.TB, n *node) {
			startAgent(t, *n, http.StatusInternalServerError, `{"error":"no space"}`)
		}, false, 0},
		{"garbage", func(t testing.TB, n *node) { startAgent(t, *n, http.StatusOK, "\x00<html>") }, false, 0},
		{"no HTTP", func(t testing.TB, n *node) {
			listener := mustListen(t, *n)
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					_, _ = io.WriteString(conn, "SSH-2.0\r\n\r\n")
					_ = conn.Close()
				}
			}()
		}, false, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			tc.start(t, &n)
			left := map[string]string{}
			if !tc.answers {
				left[cart().FileName()] = string(mustMarshal(t, cart()))
			}
			args := n.args(t, "1.1.0", result110)
			var stdout bytes.Buffer
			none := map[string]string{}
			for _, step := range []struct {
				name string
				run  func() error
				want map[string]string
				// local steps do not talk to the agent.
				local bool
			}{
				{name: "STATUS", run: func() error { return status(&skel.CmdArgs{StdinData: n.stdin(t, "1.1.0", "", nil)}) }, want: none, local: true},
				{name: "ADD", run: func() error { return add(args, &stdout) }, want: left},
				{name: "CHECK", run: func() error { return check(args) }, want: left},
				{name: "DEL", run: func() error { return del(args) }, want: none},
				{name: "second DEL", run: func() error { return del(args) }, want: none},
				{name: "CHECK without a file", run: func() error { return check(args) }, want: left},
				{name: "GC", run: func() error { return gc(&skel.CmdArgs{StdinData: n.stdin(t, "1.1.0", "", nil)}) }, want: none},
			} {
				start := time.Now()
				if err := step.run(); err != nil {
					t.Errorf("%s: %v", step.name, err)
				}
				took := time.Since(start)
				if !step.local && took < tc.atLeast {
					t.Errorf("%s took %v, want at least %v", step.name, took, tc.atLeast)
				}
				// Far above the timeout of 100 ms for a busy machine, and below that of 10 s.
				if took > 9*time.Second {
					t.Errorf("%s took %v", step.name, took)
				}
				if diff := cmp.Diff(step.want, n.waiting(t)); diff != "" {
					t.Errorf("waiting attachments after %s (-want +got):\n%s", step.name, diff)
				}
			}
			if diff := cmp.Diff(decodeExact(t, []byte(result110)), decodeExact(t, stdout.Bytes())); diff != "" {
				t.Errorf("printed result (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAddWithoutPlaceForFile(t *testing.T) {
	n := newNode(t)
	n.attachments = "/proc/podshunt/attachments"
	var stdout bytes.Buffer
	if err := add(n.args(t, "1.0.0", result100), &stdout); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(decodeExact(t, []byte(result100)), decodeExact(t, stdout.Bytes())); diff != "" {
		t.Errorf("printed result (-want +got):\n%s", diff)
	}
}

func TestAddWithoutKubernetes(t *testing.T) {
	n := newNode(t)
	args := n.args(t, "1.0.0", result100)
	args.Args = ""
	if err := add(args, io.Discard); err != nil {
		t.Fatal(err)
	}
	want := cart()
	want.Pod = api.PodRef{Name: "c1"}
	if diff := cmp.Diff(map[string]string{want.FileName(): string(mustMarshal(t, want))}, n.waiting(t)); diff != "" {
		t.Errorf("waiting attachments (-want +got):\n%s", diff)
	}
}

func TestDelTellsAgent(t *testing.T) {
	n := newNode(t)
	a := startAgent(t, n, http.StatusNoContent, "")
	args := n.args(t, "0.3.1", "")
	args.Netns, args.Args = "", ""
	for range 2 {
		if err := del(args); err != nil {
			t.Fatal(err)
		}
	}
	told := `DELETE /v1/attachments {"network":"pods","containerID":"c1","ifName":"eth0"}`
	if diff := cmp.Diff([]string{told, told}, a.requests()); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestGC(t *testing.T) {
	n := newNode(t)
	all := map[string]string{}
	put := func(network, container, ifName string) string {
		attachment := cart()
		attachment.AttachmentID = api.AttachmentID{Network: network, ContainerID: container, IfName: ifName}
		if err := leave(n.attachments, attachment); err != nil {
			t.Fatal(err)
		}
		all[attachment.FileName()] = string(mustMarshal(t, attachment))
		return attachment.FileName()
	}
	put("pods", "c1", "eth0")
	stale := []string{put("pods", "c1", "net1"), put("pods", "c2", "eth0")}
	put("other", "c2", "eth0")

	a := startAgent(t, n, http.StatusNoContent, "")
	args := &skel.CmdArgs{StdinData: n.stdin(t, "1.1.0", "", map[string]any{
		"cni.dev/valid-attachments": []types.GCAttachment{{ContainerID: "c1", IfName: "eth0"}},
		"cni.dev/attachments":       []types.GCAttachment{{ContainerID: "c1", IfName: "eth0"}},
	})}
	for _, name := range stale {
		delete(all, name)
	}
	for range 2 {
		if err := gc(args); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(all, n.waiting(t)); diff != "" {
			t.Errorf("waiting attachments (-want +got):\n%s", diff)
		}
	}
	told := `POST /v1/gc {"network":"pods","valid":[{"network":"pods","containerID":"c1","ifName":"eth0"}]}`
	if diff := cmp.Diff([]string{told, told}, a.requests()); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestGCLeavesOtherFiles(t *testing.T) {
	n := newNode(t)
	if err := os.MkdirAll(n.attachments, 0o755); err != nil {
		t.Fatal(err)
	}
	others := map[string]string{"empty.json": "", "text": "pods", "other.json": `{"network":"x"}`, "list.json": `["pods"]`}
	for name, content := range others {
		if err := os.WriteFile(filepath.Join(n.attachments, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := gc(&skel.CmdArgs{StdinData: n.stdin(t, "1.1.0", "", nil)}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(others, n.waiting(t)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

func TestMalformedConfiguration(t *testing.T) {
	n := newNode(t)
	a := startAgent(t, n, http.StatusOK, `{}`)
	verbs := map[string]func(*skel.CmdArgs) error{
		"ADD": func(args *skel.CmdArgs) error {
			var stdout bytes.Buffer
			err := add(args, &stdout)
			if stdout.Len() > 0 {
				t.Errorf("got output %q with error %v", &stdout, err)
			}
			return err
		},
		"CHECK": check, "GC": gc, "STATUS": status,
	}
	for _, tc := range []struct {
		name  string
		stdin []byte
		code  uint
		parts []string
	}{
		{"no JSON", []byte("{"), types.ErrDecodingFailure, []string{"decode network configuration"}},
		{"name is a number", []byte(`{"cniVersion":"1.1.0","name":1}`), types.ErrDecodingFailure, []string{"name"}},
		{
			"unknown key",
			n.stdin(t, "1.1.0", result110, map[string]any{"socket": "/x"}),
			types.ErrInvalidNetworkConfig,
			[]string{`"socket": unknown key`, "agentSocket, agentTimeout and attachmentsDir"},
		},
		{
			"bad timeout",
			n.stdin(t, "1.1.0", result110, map[string]any{"agentTimeout": "1m"}),
			types.ErrInvalidNetworkConfig,
			[]string{`"agentTimeout": "1m"`, `"1ms" to "10s"`},
		},
	} {
		for verb, run := range verbs {
			t.Run(tc.name+"/"+verb, func(t *testing.T) {
				checkCode(t, run(&skel.CmdArgs{ContainerID: "c1", IfName: "eth0", StdinData: tc.stdin}), tc.code, tc.parts...)
			})
		}
		t.Run(tc.name+"/DEL", func(t *testing.T) {
			if err := del(&skel.CmdArgs{ContainerID: "c1", IfName: "eth0", StdinData: tc.stdin}); err != nil {
				t.Errorf("got %v, want none: the runtime would not go on to the other plugins", err)
			}
		})
	}
	for _, verb := range []string{"ADD", "CHECK"} {
		t.Run("no prevResult/"+verb, func(t *testing.T) {
			checkCode(t, verbs[verb](n.args(t, "1.0.0", "")), types.ErrInvalidNetworkConfig, "only runs chained", `{"type": "podshunt"}`, ".conflist")
		})
		t.Run("bad prevResult/"+verb, func(t *testing.T) {
			checkCode(t, verbs[verb](n.args(t, "1.0.0", `{"cniVersion":"1.0.0","ips":[{"address":"x"}]}`)), types.ErrDecodingFailure, "prevResult")
			checkCode(t, verbs[verb](n.args(t, "1.0.0", `{"cniVersion":"9.0.0"}`)), types.ErrDecodingFailure, "prevResult")
		})
	}
	if got := a.requests(); got != nil {
		t.Errorf("got requests %q, want none before the configuration is valid", got)
	}
}

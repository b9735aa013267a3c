// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/podshunt/podshunt/api"
)

// fake answers for the reconciler and the node, and notes what it was asked.
type fake struct {
	calls []string
	flows []api.Flow
	err   error
}

func (f *fake) Put(a api.Attachment) (api.Admission, error) {
	f.calls = append(f.calls, fmt.Sprint("put ", a.ContainerID, " ", a.Pod, " ", a.Addresses))
	return api.Admission{Enrolled: true}, f.err
}

func (f *fake) Remove(id api.AttachmentID) error {
	f.calls = append(f.calls, fmt.Sprint("remove ", id))
	return f.err
}

func (f *fake) Collect(req api.GCRequest) error {
	f.calls = append(f.calls, fmt.Sprint("collect ", req))
	return f.err
}

func (f *fake) Status() (api.Status, error) { return api.Status{Version: "v1"}, f.err }

func (f *fake) Flows(_ context.Context, chosen api.Selector) ([]api.Flow, error) {
	f.calls = append(f.calls, fmt.Sprint("flows ", chosen))
	return f.flows, f.err
}

func (f *fake) Forget(req api.Selector) (api.ForgetResult, error) {
	f.calls = append(f.calls, fmt.Sprint("forget ", req))
	return api.ForgetResult{Forgotten: 2}, f.err
}

func (f *fake) Unload(ctx context.Context, force bool) (api.UnloadResult, error) {
	deadline, _ := ctx.Deadline()
	f.calls = append(f.calls, fmt.Sprint("unload ", time.Until(deadline).Round(time.Minute), " ", force))
	return api.UnloadResult{Done: true}, f.err
}

func (f *fake) Uninstall(_ context.Context, force bool) (api.UnloadResult, error) {
	f.calls = append(f.calls, fmt.Sprint("uninstall ", force))
	return api.UnloadResult{Done: true}, f.err
}

// mustServe runs a server in a directory of its own and returns its socket.
func mustServe(t testing.TB, f *fake) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "run", "agent.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, f, f, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Serve did not return")
		}
	})
	return socket
}

func request(t testing.TB, socket, method, path, body string) (int, string) {
	t.Helper()
	client := http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
		},
	}
	req, err := http.NewRequest(method, "http://agent"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(answer))
}

func TestRoutes(t *testing.T) {
	const id = `"network":"n","containerID":"c","ifName":"eth0"`
	for _, tc := range []struct {
		name, method, path, body string
		err                      error
		code                     int
		answer                   string
		calls                    []string
	}{
		{
			name: "add", method: "PUT", path: "/v1/attachments",
			body: `{` + id + `,"netns":"/n","pod":{"namespace":"a","name":"b"},"addresses":["10.0.0.1","fd00::1"]}`,
			code: 200, answer: `{"enrolled":true}`, calls: []string{"put c a/b [10.0.0.1 fd00::1]"},
		},
		{
			name: "add fails", method: "PUT", path: "/v1/attachments", body: `{` + id + `,"netns":"/n","pod":{}}`,
			err: errors.New("disk full"), code: 500, answer: `{"error":"disk full"}`, calls: []string{"put c / []"},
		},
		{
			name: "add without what is required", method: "PUT", path: "/v1/attachments", body: `{"netns":"n"}`,
			code: 400, answer: `{"error":"request body: network: required\ncontainerID: required\nifName: required\n` +
				`netns \"n\": accepted is an absolute path"}`,
		},
		{
			name: "forget", method: "POST", path: "/v1/forget?pod=a%2Fb&port=80",
			code: 200, answer: `{"forgotten":2}`, calls: []string{"forget {a/b 80}"},
		},
		{name: "forget all", method: "POST", path: "/v1/forget", code: 200, answer: `{"forgotten":2}`, calls: []string{"forget { 0}"}},
		{
			name: "forget no port", method: "POST", path: "/v1/forget?port=x",
			code: 400, answer: `{"error":"query parameter port: accepted are 0 (all) to 65535"}`,
		},
		{
			name: "add of a newer plugin", method: "PUT", path: "/v1/attachments",
			body: `{` + id + `,"netns":"/n","pod":{"namespace":"a","name":"b","class":"x"},"routes":[{"dst":"::/0"}]}`,
			code: 200, answer: `{"enrolled":true}`, calls: []string{"put c a/b []"},
		},
		{
			name: "del of a newer plugin", method: "DELETE", path: "/v1/attachments", body: `{` + id + `,"cause":"x"}`,
			code: 200, answer: `{}`, calls: []string{"remove {n c eth0}"},
		},
		{
			name: "gc of a newer plugin", method: "POST", path: "/v1/gc", body: `{"network":"n","valid":[{` + id + `,"age":1}],"all":true}`,
			code: 200, answer: `{}`, calls: []string{"collect {n [{n c eth0}]}"},
		},
		{
			name: "not JSON", method: "PUT", path: "/v1/attachments", body: `{`,
			code: 400, answer: `{"error":"request body: unexpected EOF"}`,
		},
		{
			name: "two values", method: "DELETE", path: "/v1/attachments", body: `{` + id + `}{}`,
			code: 400, answer: `{"error":"request body: more than one JSON value"}`,
		},
		{
			name: "too large", method: "DELETE", path: "/v1/attachments", body: strings.Repeat(" ", maxBody) + "{}",
			code: 400, answer: `{"error":"request body: http: request body too large"}`,
		},
		{
			name: "del", method: "DELETE", path: "/v1/attachments", body: `{` + id + `}`,
			code: 200, answer: `{}`, calls: []string{"remove {n c eth0}"},
		},
		{
			name: "gc", method: "POST", path: "/v1/gc", body: `{"network":"n","valid":[{` + id + `}]}`,
			code: 200, answer: `{}`, calls: []string{"collect {n [{n c eth0}]}"},
		},
		{
			name: "gc of no network", method: "POST", path: "/v1/gc", body: `{"valid":[]}`,
			code: 400, answer: `{"error":"request body: network: required"}`,
		},
		{
			name: "flows", method: "GET", path: "/v1/flows",
			code: 200, answer: `{"apiVersion":"podshunt.io/v1","kind":"FlowList","items":[]}`, calls: []string{"flows { 0}"},
		},
		{
			name: "flows of a port of a pod", method: "GET", path: "/v1/flows?pod=a%2Fb&port=80",
			code: 200, answer: `{"apiVersion":"podshunt.io/v1","kind":"FlowList","items":[]}`, calls: []string{"flows {a/b 80}"},
		},
		{
			name: "flows of no port", method: "GET", path: "/v1/flows?port=65536",
			code: 400, answer: `{"error":"query parameter port: accepted are 0 (all) to 65535"}`,
		},
		{
			name: "flows, failed", method: "GET", path: "/v1/flows", err: errors.New("no map"),
			code: 500, answer: `{"error":"no map"}`, calls: []string{"flows { 0}"},
		},
		{
			name: "unload", method: "POST", path: "/v1/unload?timeout=20m",
			code: 200, answer: `{"done":true}`, calls: []string{"unload 20m0s false"},
		},
		{
			name: "uninstall", method: "POST", path: "/v1/uninstall?timeout=20s",
			code: 200, answer: `{"done":true}`, calls: []string{"uninstall false"},
		},
		{
			name: "forced unload", method: "POST", path: "/v1/unload?timeout=20m&force=true",
			code: 200, answer: `{"done":true}`, calls: []string{"unload 20m0s true"},
		},
		{
			name: "forced uninstall", method: "POST", path: "/v1/uninstall?timeout=20s&force=true",
			code: 200, answer: `{"done":true}`, calls: []string{"uninstall true"},
		},
		{
			name: "unload with bad force", method: "POST", path: "/v1/unload?timeout=20s&force=yes",
			code: 400, answer: `{"error":"query parameter force: accepted are \"true\" and \"false\""}`,
		},
		{
			name: "unload without timeout", method: "POST", path: "/v1/unload",
			code: 400, answer: `{"error":"query parameter timeout: accepted is a positive duration such as \"30s\""}`,
		},
		{
			name: "no such path", method: "GET", path: "/v2",
			code: 404, answer: `{"error":"no such request: GET /v2"}`,
		},
		{
			name: "no such method", method: "POST", path: "/v1/status",
			code: 404, answer: `{"error":"no such request: POST /v1/status"}`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &fake{err: tc.err}
			code, answer := request(t, mustServe(t, f), tc.method, tc.path, tc.body)
			if code != tc.code || answer != tc.answer {
				t.Errorf("got %d %s, want %d %s", code, answer, tc.code, tc.answer)
			}
			if diff := cmp.Diff(tc.calls, f.calls); diff != "" {
				t.Errorf("calls (-want +got)\n%s", diff)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	code, answer := request(t, mustServe(t, &fake{}), "GET", "/v1/status", "")
	if code != 200 || !strings.Contains(answer, `"version":"v1"`) {
		t.Errorf("got %d %s, want the status", code, answer)
	}
}

func TestSocketFile(t *testing.T) {
	socket := mustServe(t, &fake{})
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := info.Mode(), os.ModeSocket|0o600; got != want {
		t.Errorf("got mode %v, want %v", got, want)
	}
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "served by another process") {
		t.Errorf("got error %v for a socket in use, want one that says so", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	for range 2 {
		l, err := Listen(socket)
		if err != nil {
			t.Fatal(err)
		}
		// As after a kill: the file stays.
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(socket); err != nil {
			t.Fatal(err)
		}
	}
}

// The longest path that api.CheckSocket accepts can be listened on, and connected to.
func TestLongestSocket(t *testing.T) {
	dir := t.TempDir()
	for length := len(dir) + 2; length < 120; length++ {
		path := dir + "/" + strings.Repeat("s", length-len(dir)-1)
		l, err := Listen(path)
		if accepted := api.CheckSocket(path) == nil; accepted != (err == nil) {
			t.Errorf("%d bytes: accepted %t, and listening gives error %v", length, accepted, err)
		}
		if err != nil {
			if want := "accepted are at most 103 bytes"; !strings.Contains(err.Error(), want) {
				t.Errorf("%d bytes: got error %v, want one with %q", length, err, want)
			}
			continue
		}
		conn, err := net.DialTimeout("unix", path, 2*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(conn.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFlowList: what is written flow by flow is one document.
func TestFlowList(t *testing.T) {
	for _, n := range []int{0, 1, 3} {
		f := &fake{}
		for i := range n {
			f.flows = append(f.flows, api.Flow{Reason: "unmatched", Message: fmt.Sprint("line\n", i), Details: []string{"a", "b"}})
		}
		_, text := request(t, mustServe(t, f), http.MethodGet, api.PathFlows, "")
		var got api.FlowList
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		want := api.FlowList{TypeMeta: api.TypeMeta{APIVersion: "podshunt.io/v1", Kind: "FlowList"}, Items: f.flows}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("%d flows (-want +got):\n%s", n, diff)
		}
	}
}

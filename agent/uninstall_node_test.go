// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestUninstall is the node's side, with a live connection and the plugin installed.
func TestUninstall(t *testing.T) {
	a := mustAgent(t)
	a.MustWritePods(t, "client podshunt.io/shortcut: enabled", "web podshunt.io/shortcut: enabled")
	confDir, binDir := t.TempDir(), t.TempDir()
	conflist := filepath.Join(confDir, "10-net.conflist")
	original := `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}` + "\n"
	if err := os.WriteFile(conflist, []byte(original), 0o600); err != nil {
		t.Fatal(err)
	}
	// The agent looks for the plugin that makes the interface before it puts its own beside it.
	if err := os.WriteFile(filepath.Join(binDir, "bridge"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	a.plugin = filepath.Join(a.BinDir, api.PluginType)
	// A copy of the list with our entry, as multus makes one.
	multus := filepath.Join(confDir, "99-multus.conf")
	if err := os.WriteFile(multus, []byte(`{"type": "multus", "name": "m", "delegates": [{"plugins": [{"type": "podshunt"}]}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	note := fmt.Sprintf("note: %s still names podshunt: if it means the plugin, no pod starts with this file once %s is deleted; "+
		"let the program that wrote it write it again, or take podshunt out of it, before you delete that binary\n", multus, filepath.Join(binDir, "podshunt"))
	address, health := mustFreeAddress(t), mustFreeAddress(t)
	a.mustStart(t, sandboxtest.AcceptFatal, "--metrics-address="+address, "--health-address="+health,
		"--cni-conf-dir="+confDir, "--cni-bin-dir="+binDir)
	client, web := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	read := func() string {
		t.Helper()
		content, err := os.ReadFile(conflist)
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
	sandboxtest.WaitFor(t, "entry", read, func(s string) bool { return strings.Contains(s, api.PluginType) })
	c := mustConnect(t, client, web, sandboxtest.MustListen(t, web, "tcp4", ":0"))
	c.mustPing(t)

	wantDiff(t, "ready", 200, mustGet(t, health, "/readyz").code)
	metrics := mustGet(t, address, "/metrics").body
	for _, want := range []string{
		`podshunt_connections_total{outcome="paired"} 1`, `podshunt_messages_total{outcome="shortcut"} 8`,
		`podshunt_message_bytes_total{outcome="shortcut"} 800`, `podshunt_pods{state="enrolled"} 2`, `podshunt_map_entries{map="flows"} 1`,
		`podshunt_plugin_request_duration_seconds_count{request="add",result="ok"} 2`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("got no metric %s in\n%s", want, metrics)
		}
	}

	var out bytes.Buffer
	if err := run(t.Context(), append([]string{"uninstall"}, a.Places()...), &out, t.Output()); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "uninstall", note+"unloaded: nothing of podshunt is left in the kernel\n", out.String())
	wantDiff(t, "conflist", original, read())
	if _, err := os.Stat(a.PinDir); !os.IsNotExist(err) {
		t.Errorf("got %v for the pin directory, want it gone", err)
	}
	c.mustPing(t)
	// The agent stays, and leaves the node alone.
	wantDiff(t, "alive", 200, mustGet(t, health, "/healthz").code)
	if got, want := mustGet(t, health, "/readyz"), (response{503, "unloaded: nothing is shortcut until the agent is started again\n"}); got != want {
		t.Errorf("ready after uninstall: got %v, want %v", got, want)
	}
	if metrics := mustGet(t, address, "/metrics").body; !strings.Contains(metrics, "podshunt_unloaded 1\n") || strings.Contains(metrics, "podshunt_map_entries") {
		t.Errorf("got metrics of kernel objects that are gone:\n%s", metrics)
	}

	// Without an agent it does the same.
	a.MustStop(t)
	if err := os.WriteFile(conflist, []byte(strings.Replace(original, `}]`, `}, {"type": "podshunt"}]`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	args := append([]string{"uninstall", "--cni-conf-dir=" + confDir, "--cni-bin-dir=" + binDir}, a.Places()...)
	if err := run(t.Context(), args, &out, t.Output()); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), note+"nothing to unload") || strings.Contains(read(), api.PluginType) {
		t.Errorf("got %q and conflist %s, want the entry gone", out.String(), read())
	}
}

func mustFreeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

type response struct {
	code int
	body string
}

func mustGet(t testing.TB, address, path string) response {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get(fmt.Sprintf("http://%s%s", address, path))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{resp.StatusCode, string(body)}
}

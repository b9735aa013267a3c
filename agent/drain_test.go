// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustRestart restarts the agent with maps of another size, while a connection has not read
// what was sent by the shortcut: the agent waits for it.
func (a *agent) mustRestart(t *testing.T, c connection, maxFlows int, sent string) {
	t.Helper()
	c.mustPing(t)
	if f := c.flow(t, a); !shortcut(f) {
		t.Fatalf("got %+v, want it on the shortcut", f)
	}
	a.MustStop(t)
	if _, err := fmt.Fprint(c.client, sent); err != nil {
		t.Fatal(err)
	}
	a.mustStart(t, sandboxtest.AcceptFatal, fmt.Sprintf("--max-flows=%d", maxFlows), "--health-address=127.0.0.1:29470")
	for _, got := range []string{a.MustStatus(t).Replacing, mustReady(t)} {
		if want := "1 connections, such as " + c.client.LocalAddr().String() + " to " + c.server.LocalAddr().String(); !strings.HasPrefix(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	f := c.flow(t, a)
	if f.ToServer.Shortcut || f.ToClient.Shortcut {
		t.Errorf("got %+v, want it on TCP", f)
	}
}

// mustReady returns what the agent says of its readiness.
func mustReady(t *testing.T) string {
	t.Helper()
	answer, err := http.Get("http://127.0.0.1:29470/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// mustRead reads what was sent before, and nothing else.
func (c connection) mustRead(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c.server, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

// TestReplace: an agent whose maps are to have another size replaces them once all is read that
// was redirected. Until then it answers, and is not ready; pods start, and an unload can be had.
func TestReplace(t *testing.T) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.MustWritePods(t, "client "+on, "web "+on, "late "+on)
	a.mustStart(t, sandboxtest.AcceptFatal)
	client, web := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	a.MustTakePart(t, "client", "web")
	l := sandboxtest.MustListen(t, web, "tcp4", ":0")
	c := mustConnect(t, client, web, l)
	a.mustRestart(t, c, 4321, "by the shortcut ")
	sandboxtest.MustAddPod(t, a, "late", sandbox.PodOptions{})
	wantDiff(t, "pods", []string{"client: " + replacingMessage, "late: " + replacingMessage, "web: " + replacingMessage}, a.MustStates(t))
	if _, err := fmt.Fprint(c.client, "by TCP"); err != nil {
		t.Fatal(err)
	}
	c.mustRead(t, "by the shortcut by TCP")
	mustAwait(t, a, "maps of another size", func(s api.Status) bool { return s.Replacing == "" && len(s.Maps) > 0 })
	a.MustTakePart(t, "client", "late", "web")
	for _, m := range a.MustStatus(t).Maps {
		if m.Name == "flows" && m.Max != 4321 {
			t.Errorf("got %+v, want 4321 entries", m)
		}
	}
	if got := mustReady(t); got != "ok\n" {
		t.Errorf("got %q, want it ready", got)
	}
	c.mustPing(t)

	// An unload while it waits ends with nothing loaded, and that stays so.
	c = mustConnect(t, client, web, l)
	a.mustRestart(t, c, 5432, "by the shortcut ")
	var out bytes.Buffer
	err := run(t.Context(), append([]string{"unload", "--timeout=300ms"}, a.Places()...), &out, t.Output())
	if err == nil || !strings.HasPrefix(err.Error(), "1 connections have not read") || !strings.Contains(out.String(), c.client.LocalAddr().String()) {
		t.Fatalf("got error %v and\n%s\nwant the connection that has not read", err, &out)
	}
	c.mustRead(t, "by the shortcut ")
	if out, err := a.Command("unload", a.Places()...); err != nil || !strings.HasPrefix(out, "unloaded: ") {
		t.Fatalf("got %q, %v; want it unloaded", out, err)
	}
	mustAwait(t, a, "the end of the pins", func(s api.Status) bool {
		_, err := os.Stat(a.PinDir)
		return s.Unloaded && os.IsNotExist(err)
	})
	c.mustPing(t)
	a.MustStop(t)

	// An error is what is wanted instead for another layout, and for a size the sizes stay.
	a.mustStart(t, sandboxtest.AcceptFatal)
	a.MustTakePart(t, "client", "late", "web")
	a.MustStop(t)
	a.mustStart(t, sandboxtest.AcceptFatal, "--max-flows=6543", "--on-incompatible="+datapath.OnIncompatibleFail)
	for _, m := range a.MustStatus(t).Maps {
		if m.Name == "flows" && m.Max == 6543 {
			t.Errorf("got %+v, want the size of before", m)
		}
	}
}

func mustAwait(t *testing.T, a *agent, what string, is func(api.Status) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := a.Await(ctx, what, is); err != nil {
		t.Fatal(err)
	}
}

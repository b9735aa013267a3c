// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustRedirect sends connections to a port of the pod to another one, as a service mesh does.
func mustRedirect(t testing.TB, pod *sandbox.Pod, from, to int) {
	t.Helper()
	err := pod.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "mesh"})
		chain := conn.AddChain(&nftables.Chain{
			Name: "inbound", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(uint16(from))},
			&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(uint16(to))},
			&expr.Redir{RegisterProtoMin: 1},
		}})
		return conn.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRedirectedPort: the server's pod redirects port 80 to the one that its process
// listens on. A rule that names ports keeps all of its connections on TCP, whichever
// port it names; without such a rule they are shortcut.
func TestRedirectedPort(t *testing.T) {
	const redirected = 80
	a := mustAgent(t)
	a.MustWritePods(t, "client podshunt.io/shortcut: enabled", "web podshunt.io/shortcut: enabled",
		`mesh podshunt.io/shortcut: enabled, podshunt.io/exclude-ports: "80"`)
	a.mustStart(t, sandboxtest.AcceptFatal)
	client := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{})
	web, mesh := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, a, "mesh", sandbox.PodOptions{})
	a.MustTakePart(t, "client", "web", "mesh")
	listen := func(pod *sandbox.Pod) (l net.Listener, port int) {
		t.Helper()
		l = sandboxtest.MustListen(t, pod, "tcp4", ":0")
		return l, l.Addr().(*net.TCPAddr).Port
	}
	// connect dials a port of the pod whose listener is l.
	connect := func(pod *sandbox.Pod, l net.Listener, port int) api.Flow {
		t.Helper()
		var c connection
		c.client, c.server = sandboxtest.MustConnect(t, client, "tcp4", net.JoinHostPort(pod.IPv4.String(), fmt.Sprint(port)), l)
		c.mustPing(t)
		return c.flow(t, a)
	}
	meshListener, meshPort := listen(mesh)
	if f := connect(mesh, meshListener, meshPort); !shortcut(f) {
		t.Fatalf("before the redirect: got %+v, want a shortcut", f)
	}

	webListener, webPort := listen(web)
	mustRedirect(t, web, redirected, webPort)
	mustRedirect(t, mesh, redirected, meshPort)
	reason := policy.PortRedirected.String() + ": podshunt.io/exclude-ports of pod default/mesh"
	for _, port := range []int{redirected, meshPort} {
		f := sandboxtest.WaitFor(t, "a connection that is kept on TCP", func() api.Flow { return connect(mesh, meshListener, port) },
			func(f api.Flow) bool { return !f.Paired })
		if !strings.Contains(fmt.Sprintf("%+v", f), reason) {
			t.Errorf("port %d: got %+v, want the reason %q", port, f, reason)
		}
	}
	if f := connect(web, webListener, redirected); !shortcut(f) {
		t.Errorf("without a rule for ports: got %+v, want a shortcut", f)
	}
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/diag"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// canDestroy asks the kernel whether it resets sockets on demand, by one that is closed.
func canDestroy(t testing.TB) bool {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := diag.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	found, err := listAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(found, func(s diag.Socket) bool { return s.Local.String() == l.Addr().String() })
	if i < 0 {
		t.Fatalf("got %d sockets without the one at %s", len(found), l.Addr())
	}
	l.Close()
	err = conn.Reset(found[i])
	switch {
	case errors.Is(err, unix.ENOENT):
		return true
	case errors.Is(err, unix.EOPNOTSUPP):
		return false
	}
	t.Fatalf("SOCK_DESTROY of no socket: got %v, want ENOENT or EOPNOTSUPP", err)
	return false
}

// TestForce: unload --force resets just the connections that do not read, with
// or without an agent, whatever the addresses. Their programs still read all that
// was sent, in order, then the error. Others lose no byte.
func TestForce(t *testing.T) {
	t.Logf("the kernel resets sockets when it is asked to: %v", canDestroy(t))
	for i, family := range []string{"IPv4 by an IPv6 socket", "IPv6", "loopback", "IPv4"} {
		running := i%2 == 0
		t.Run(fmt.Sprintf("%s, agent %v", family, running), func(t *testing.T) { testForce(t, family, running) })
	}
}

// mustFindByProcess takes the attachments away. Nothing tells then where the pods
// are, unless a process runs in them.
func mustFindByProcess(t *testing.T, a *agent, unload func(...string) (string, error), pods ...*sandbox.Pod) {
	t.Helper()
	if err := os.RemoveAll(a.AttachmentsDir); err != nil {
		t.Fatal(err)
	}
	out, err := unload("--force")
	if err == nil || !strings.Contains(err.Error(), "they were not reset: the network namespace with cookie ") || strings.Contains(out, "reset, as") {
		t.Errorf("got error %v and\n%s\nwant one that says that the pods are not found", err, out)
	}
	for _, pod := range pods {
		process := exec.Command("sleep", "600")
		if err := pod.Do(process.Start); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = process.Process.Kill() // its end is all that is wanted
			_ = process.Wait()
		})
	}
}

// mustSeparate keeps what the pods send from each other until the returned
// function is called.
func mustSeparate(t *testing.T, a, b *sandbox.Pod) (arrive func()) {
	t.Helper()
	var undo []func()
	for _, pair := range [][2]*sandbox.Pod{{a, b}, {b, a}} {
		route := &netlink.Route{Dst: &net.IPNet{IP: pair[1].IPv4.AsSlice(), Mask: net.CIDRMask(32, 32)}, Type: unix.RTN_BLACKHOLE}
		if err := pair[0].Do(func() error { return netlink.RouteAdd(route) }); err != nil {
			t.Fatal(err)
		}
		undo = append(undo, func() {
			if err := pair[0].Do(func() error { return netlink.RouteDel(route) }); err != nil {
				t.Error(err)
			}
		})
	}
	return func() {
		for _, f := range undo {
			f()
		}
	}
}

func testForce(t *testing.T, family string, running bool) {
	a := mustAgent(t)
	const on = "podshunt.io/shortcut: enabled"
	a.MustWritePods(t, "client "+on, "web "+on)
	a.mustStart(t, sandboxtest.AcceptFatal)
	client, web := sandboxtest.MustAddPod(t, a, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{})
	a.MustTakePart(t, "client", "web")
	network, listen, host := "tcp4", ":0", web.IPv4.String()
	switch family {
	case "IPv6":
		network, listen, host = "tcp6", ":0", web.IPv6.String()
	case "IPv4 by an IPv6 socket":
		network = "tcp"
	case "loopback":
		client, host = web, "127.0.0.1"
	}
	l := sandboxtest.MustListen(t, web, network, listen)
	good, bad := mustDial(t, client, l, network, host), mustDial(t, client, l, network, host)
	for _, c := range []connection{good, bad} {
		for _, end := range []net.Conn{c.client, c.server} { // what follows takes its time in QEMU
			if err := end.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
		c.mustPing(t)
	}
	before := a.MustStatus(t)
	if !running {
		a.MustStop(t)
	}
	// Unread both ways, so that both ends have something to lose; in one case one way.
	// What is sent while nothing is redirected any more has to stay behind it.
	separated := family == "IPv4" && canDestroy(t)
	senders := []net.Conn{bad.client, bad.server}
	if separated {
		senders = senders[:1]
	}
	var sent [2]bytes.Buffer
	write := func(text string) {
		t.Helper()
		for i, from := range senders {
			if _, err := fmt.Fprint(io.MultiWriter(from, &sent[i]), text); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("by the shortcut ")

	unload := func(flags ...string) (string, error) {
		t.Helper()
		var out bytes.Buffer
		err := run(t.Context(), append(append([]string{"unload", "--timeout=300ms"}, flags...), a.Places()...), &out, t.Output())
		return out.String(), err
	}
	out, err := unload()
	if err == nil || !strings.HasPrefix(err.Error(), "1 connections have not read") ||
		!strings.Contains(err.Error(), "--force resets the connections that are listed, and unloads") ||
		!strings.Contains(out, bad.client.LocalAddr().String()) || strings.Contains(out, good.client.LocalAddr().String()) {
		t.Fatalf("got error %v and\n%s\nwant the connection that has not read, and what --force does", err, out)
	}
	write("by TCP ")
	good.mustPing(t)

	if separated {
		mustFindByProcess(t, a, unload, client, web)
		// The client does not get the reset: its end stays, and so does the pair.
		arrive := mustSeparate(t, client, web)
		out, err = unload("--force")
		arrive()
		if _, err := bad.client.Write([]byte("x")); err != nil {
			t.Errorf("write to a connection whose other end is reset: %v", err)
		}
	} else {
		out, err = unload("--force")
	}
	if !canDestroy(t) {
		if err == nil || !strings.Contains(err.Error(), "CONFIG_INET_DIAG_DESTROY") || !strings.Contains(out, bad.client.LocalAddr().String()) {
			t.Errorf("got error %v and\n%s\nwant one that says that this kernel cannot reset", err, out)
		}
		if _, err := os.Stat(a.PinDir); err != nil {
			t.Errorf("pins: %v, want them there", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	want := `^reset, as they had not read what was sent by the shortcut after 300ms:\nCLIENT [^\n]*\n[^\n]*` +
		regexp.QuoteMeta(bad.client.LocalAddr().String()) + ` [^\n]*\n[^\n]*\n` +
		`unloaded: nothing of podshunt is left in the kernel except what [12] sockets of ended connections need to read their last bytes: it goes when their programs close them\n$`
	if !regexp.MustCompile(want).MatchString(out) {
		t.Errorf("got\n%s\nwant\n%s", out, want)
	}
	for _, name := range []string{"podshunt", "podshunt_old", "podshunt_lock"} {
		if _, err := os.Stat(filepath.Join(a.BPF, name)); !os.IsNotExist(err) {
			t.Errorf("%s: got %v, want it gone", name, err)
		}
	}
	good.mustPing(t)

	for i, to := range []net.Conn{bad.server, bad.client} {
		got, err := io.ReadAll(to)
		if string(got) != sent[i].String() {
			t.Errorf("end %d: got %q, want %q", i, got, sent[i].String())
		}
		if !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("end %d: got %v, want the connection reset", i, err)
		}
		to.Close()
	}
	good.mustPing(t)
	if running {
		wantDiff(t, "unloaded before and after", []bool{false, true}, []bool{before.Unloaded, a.MustStatus(t).Unloaded})
	}
	if out, err := unload("--force"); err != nil || strings.Contains(out, "reset") {
		t.Errorf("unload again: got %q, %v; want nothing to do", out, err)
	}
}

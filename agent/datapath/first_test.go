// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustPinFirst pins, as the build of commit dbe51ab did, the first object whose pins can be
// replaced, with two pods that take part. It had no layout number, and other names.
func (n *node) mustPinFirst(tb testing.TB, cookies []uint64) {
	tb.Helper()
	spec, err := ebpf.LoadCollectionSpec("testdata/first_bpfel.o")
	if err != nil {
		tb.Fatal(err)
	}
	delete(spec.Programs, "observe_fexit")
	objects, err := ebpf.NewCollection(spec)
	if err != nil {
		tb.Fatalf("%+v", err)
	}
	defer objects.Close()
	if err := os.Mkdir(n.Config.PinDir, 0o700); err != nil {
		tb.Fatal(err)
	}
	pin := func(name string, object interface{ Pin(string) error }, err error) {
		tb.Helper()
		if err == nil {
			err = object.Pin(filepath.Join(n.Config.PinDir, name))
		}
		if err != nil {
			tb.Fatalf("%s: %v", name, err)
		}
	}
	for name, m := range objects.Maps {
		if name[0] != '.' {
			pin(name, m, nil)
		}
	}
	type settings struct {
		Generation, Redirect      uint32
		Budget                    uint64
		Sleepers, NoMPTCPListener uint32
	}
	type policyKey struct {
		PrefixLen      uint32
		Client, Server [2]uint32
		Port, Reserved uint16
	}
	err = objects.Maps["control"].Put(uint32(0), settings{Generation: 1, Redirect: 1, Budget: 8 << 20})
	for i, cookie := range cookies {
		other := cookies[1-i]
		key := policyKey{PrefixLen: 128, Client: [2]uint32{uint32(cookie), uint32(cookie >> 32)}, Server: [2]uint32{uint32(other), uint32(other >> 32)}}
		err = errors.Join(err, objects.Maps["pods"].Put(cookie, uint32(1)), objects.Maps["policies"].Put(key, [2]uint32{1, 0}))
	}
	if err != nil {
		tb.Fatal(err)
	}
	l, err := link.AttachTracing(link.TracingOptions{Program: objects.Programs["observe_tracepoint"]})
	pin("link_observe_tracepoint", l, err)
	defer l.Close()
	deliver := objects.Programs["deliver"]
	sockets := objects.Maps["sockets"].FD()
	l, err = link.AttachRawLink(link.RawLinkOptions{Target: sockets, Program: deliver, Attach: ebpf.AttachSkMsgVerdict})
	if err == nil {
		pin("link_deliver", l, nil)
		defer l.Close()
	} else if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: sockets, Program: deliver, Attach: ebpf.AttachSkMsgVerdict}); err != nil {
		tb.Fatal(err)
	}
	l, err = link.AttachCgroup(link.CgroupOptions{Path: n.Config.Cgroup, Attach: ebpf.AttachCGroupSockOps, Program: objects.Programs["track"]})
	pin("link_track", l, err)
	defer l.Close()
}

// TestFirstLayout: what the first layout has redirected is waited for and read to the byte, by
// connections at work and by one that does not read for a while.
func TestFirstLayout(t *testing.T) {
	n := mustNode(t, nil)
	pods := []*sandbox.Pod{sandboxtest.MustAddPod(t, n, "client", sandbox.PodOptions{}), sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{})}
	cookies := []uint64{sandboxtest.MustCookie(t, pods[0]), sandboxtest.MustCookie(t, pods[1])}
	n.mustClose(t)
	n.mustUnloadPins(t)
	n.mustPinFirst(t, cookies)
	l, address := mustListenOn(t, pods[1])
	endTalk := mustTalk(t, pods[0], l, address, 2, 10)
	c, s := connect(t, pods[0].Netns, l, "tcp4", address)
	sandboxtest.MustPing(t, c, s, 10, 100)
	unread := traffic{seed: 1, bytes: 100_000, maxWrite: 10_000, maxRead: 10_000}
	if err := unread.write(c); err != nil {
		t.Fatal(err)
	}
	old := mustObjects(t, n.Config.PinDir)

	n.MustOpen(t)
	if !n.Replacing() {
		t.Fatal("got it not replacing, want it to wait for a program that does not read")
	}
	waitUntil(t, "the end of what the others have to read", func() bool {
		waiting, err := n.Waiting()
		return err == nil && len(waiting) == 1
	})
	waiting, err := n.Waiting()
	if err != nil || waiting[0].Client.String() != c.LocalAddr().String() || waiting[0].Server.String() != s.LocalAddr().String() ||
		waiting[0].ClientNetns != cookies[0] || waiting[0].ServerNetns != cookies[1] || !waiting[0].ToServer.Redirected || waiting[0].ToClient.Redirected {
		t.Errorf("got %+v, %v; want %v to %v with bytes to the server", waiting, err, c.LocalAddr(), s.LocalAddr())
	}
	later := traffic{seed: 2, bytes: 20_000, maxWrite: 10_000, maxRead: 10_000}
	if err := errors.Join(later.write(c), unread.read(s), later.read(s)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Unload(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustClose(t)
	n.MustOpen(t)
	old.waitGone(t)
	sandboxtest.MustPing(t, c, s, 10, 1000)
	endTalk()
}

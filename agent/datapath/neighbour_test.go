// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/bpf"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// mustReplaceCallbacks attaches a sock_ops program that asks for callbacks of its
// own when a connection is made or accepted, in place of those that others have
// asked for, and returns what detaches it.
func mustReplaceCallbacks(tb testing.TB, cgroup string) (detach func()) {
	tb.Helper()
	return mustAttachSockOps(tb, cgroup, asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, offsetOp, asm.Word),
		asm.JEq.Imm(asm.R2, opActiveEstablished, "replace"),
		asm.JNE.Imm(asm.R2, opPassiveEstablished, "done"),
		asm.Mov.Imm(asm.R2, flagRetransmissions).WithSymbol("replace"),
		asm.FnSockOpsCbFlagsSet.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("done"),
		asm.Return(),
	})
}

// TestOtherProgram: another sock_ops program on the cgroup takes our callbacks
// away, so that we are not told of the ends of connections. They leave nothing for
// good: flows, and what pods have of the maps, are swept. Flows that are open are not.
func TestOtherProgram(t *testing.T) {
	const share = 20
	n := mustNode(t, func(c *datapath.Config) { c.MaxFlows = 2 * share })
	detach := mustReplaceCallbacks(t, n.Config.Cgroup)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	open, accepted := rawPair(t, pods[0], l, address)
	for range share - 1 {
		c, s := rawPair(t, pods[0], l, address)
		sandboxtest.MustPing(t, c, s, 10, 100)
		// Unread when it is closed: charged to the pod.
		mustWrite(t, c, "unread")
		c.mustClose(t)
		s.mustClose(t)
	}
	before := n.counts(t)
	if before["connection_paired"] != share {
		t.Fatalf("got %v, want %d connections paired", before, share)
	}
	// One that closes is told of only by the SOCKHASH, sooner or later.
	waitUntil(t, "only the sockets of the open connection are left", func() bool { return n.usage(t)["sockets"] == 2 })
	version, err := datapath.RunningVersion()
	if err != nil {
		t.Fatal(err)
	}
	if n.NoJoin() == nil && !version.LateCallbacks() {
		// end_late sees the ends where open connections join without callbacks.
		waitUntil(t, "only the open connection is left", func() bool { return n.usage(t)["flows"] == 1 })
		for _, cookie := range cookies {
			if flows, charge := n.mustShare(t, cookie).Flows, n.mustCharge(t, cookie); flows != 1 || charge != 0 {
				t.Errorf("pod %d has %d flows and a charge of %d bytes, want 1 and none", cookie, flows, charge)
			}
		}
		sandboxtest.MustPing(t, open, accepted, 10, 100)
		return
	}
	if got := n.usage(t)["flows"]; got != share {
		t.Fatalf("got %d flows, want the %d that nobody has ended: the test shows nothing", got, share)
	}
	if got := n.mustCharge(t, cookies[1]); got < (share-1)*int64(len("unread")) {
		t.Fatalf("the server's pod is charged with %d bytes, want what was unread in each connection: the test shows nothing", got)
	}
	rawPair(t, pods[0], l, address)
	n.mustCount(t, before, map[string]uint64{"connection_share": 1})

	if err := n.Sweep(time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := n.usage(t)["flows"]; got != share {
		t.Errorf("got %d flows after a sweep of old ones, want %d", got, share)
	}
	if err := n.Sweep(0); err != nil {
		t.Fatal(err)
	}
	if got := n.usage(t)["flows"]; got != 1 {
		t.Errorf("got %d flows after a sweep, want the open one", got)
	}
	detach()
	before = n.counts(t)
	c, s := rawPair(t, pods[0], l, address)
	sandboxtest.MustPing(t, c, s, 10, 100)
	sandboxtest.MustPing(t, open, accepted, 10, 100)
	n.mustCount(t, before, map[string]uint64{"connection_paired": 1, "message_not_seen": 4, "message_shortcut": 36})
	for _, cookie := range cookies {
		if got := n.mustShare(t, cookie).Flows; got != 2 {
			t.Errorf("pod %d has %d flows, want 2", cookie, got)
		}
		if got := n.mustCharge(t, cookie); got != 0 {
			t.Errorf("pod %d is charged with %d bytes, want 0", cookie, got)
		}
	}
	for _, r := range []*rawSocket{c, s, open, accepted} {
		r.mustClose(t)
	}
	waitUntil(t, "all sockets are gone", func() bool { return n.usage(t)["sockets"] == 0 })
	if err := n.Sweep(0); err != nil {
		t.Fatal(err)
	}
	n.waitUsage(t, map[string]int{"pods": 2, "policies": 4})
	for _, cookie := range cookies {
		if got := n.mustShare(t, cookie).Flows; got != 0 {
			t.Errorf("pod %d has %d flows when all are gone, want 0", cookie, got)
		}
	}
}

// mustPinned opens a map that is pinned.
func (n *node) mustPinned(tb testing.TB, name string) *ebpf.Map {
	tb.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.Config.PinDir, name), nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.Close() })
	return m
}

// mustShare returns what a pod is said to have of the maps.
func (n *node) mustShare(tb testing.TB, netns uint64) (share bpf.ShortcutShare) {
	tb.Helper()
	if err := n.mustPinned(tb, bpf.ShortcutMapShares).Lookup(netns, &share); err != nil {
		tb.Fatal(err)
	}
	return share
}

// mustCharge returns the bytes that a pod's receivers are said to have left unread.
func (n *node) mustCharge(tb testing.TB, netns uint64) (bytes int64) {
	tb.Helper()
	if err := n.mustPinned(tb, bpf.ShortcutMapCharges).Lookup(netns, &bytes); err != nil {
		tb.Fatal(err)
	}
	return bytes
}

// TestSharesAreSettled: what pods are said to have of the maps becomes what they
// have, when two sweeps have found the same difference.
func TestSharesAreSettled(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "server")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	rawPair(t, pods[0], l, address)
	shares := n.mustPinned(t, bpf.ShortcutMapShares)
	put := func(share bpf.ShortcutShare) {
		t.Helper()
		if err := shares.Put(cookies[0], share); err != nil {
			t.Fatal(err)
		}
	}
	sweep := func(want bpf.ShortcutShare) {
		t.Helper()
		if err := n.Sweep(time.Hour); err != nil {
			t.Fatal(err)
		}
		if got := n.mustShare(t, cookies[0]); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	right := bpf.ShortcutShare{Flows: 1}
	sweep(right)
	for _, wrong := range []bpf.ShortcutShare{{Flows: 7}, {Flows: 1, Learned: 3}, {}, {Flows: ^uint32(0)}} {
		put(wrong)
		sweep(wrong) // it may be about to change
		sweep(right)
	}
	// Something that goes on changing is left alone.
	put(bpf.ShortcutShare{Flows: 7})
	sweep(bpf.ShortcutShare{Flows: 7})
	put(bpf.ShortcutShare{Flows: 8})
	sweep(bpf.ShortcutShare{Flows: 8})
	sweep(right)
}

// TestLearnedShare: a pod with many ports that are marked unsupported is not remembered for
// more than its share, and what is known of others stays, also when the agent is
// started again.
func TestLearnedShare(t *testing.T) {
	n := mustNode(t, nil)
	pods, cookies := n.MustEnrol(t, "client", "hostile", "other")
	n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
	control := n.mustPinned(t, bpf.ShortcutMapControl)
	const share, ports = 4, 10
	limit := func(change bool) {
		t.Helper()
		var settings bpf.ShortcutSettings
		if err := control.Lookup(uint32(0), &settings); err != nil {
			t.Fatal(err)
		}
		if want := n.mustPinned(t, bpf.ShortcutMapLearned).MaxEntries() / 2; settings.LearnedShare != want {
			t.Errorf("got a share of %d entries, want half of the map, %d", settings.LearnedShare, want)
		}
		if !change {
			return
		}
		settings.LearnedShare = share
		if err := control.Put(uint32(0), settings); err != nil {
			t.Fatal(err)
		}
	}
	limit(true)
	// use makes a server use a call that is not served.
	use := func(server int) {
		t.Helper()
		l, address := mustRawListen(t, pods[server].Netns, pods[server].IPv4)
		c, s := rawPair(t, pods[0], l, address)
		mustWrite(t, c, "x")
		if err := s.wait(unix.POLLIN); err != nil {
			t.Fatal(err)
		}
		if got, _, err := unix.Recvfrom(s.fd, make([]byte, 1), unix.MSG_WAITALL); got != 1 {
			t.Fatalf("recv gives %d (%v), want 1", got, err)
		}
		n.mustEnd(t, c, s)
	}
	check := func(when string, want map[uint64]int) {
		t.Helper()
		got := map[uint64]int{}
		for _, m := range n.unsupported(t) {
			got[m.Netns]++
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("ports remembered %s (-want +got):\n%s", when, diff)
		}
		for _, netns := range cookies {
			if got := n.mustShare(t, netns).Learned; int(got) != want[netns] {
				t.Errorf("%s: pod %d is said to have %d entries, want %d", when, netns, got, want[netns])
			}
		}
	}
	use(2)
	for range ports {
		use(1)
	}
	use(2)
	want := map[uint64]int{cookies[1]: share, cookies[2]: 2}
	check("at the end", want)

	if err := n.Datapath.Close(); err != nil {
		t.Fatal(err)
	}
	n.MustOpen(t)
	limit(true)
	for range 3 {
		if err := n.Sweep(time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	check("after a take-over", want)
	use(1)
	check("after one more port", want)

	// What is forgotten makes room.
	if _, err := n.Forget(func(server, _ uint64, _ uint16) bool { return server == cookies[1] }); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.Sweep(time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	use(1)
	want[cookies[1]] = 1
	check("after they were forgotten", want)
}

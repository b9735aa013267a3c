// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// Of include/uapi/linux/bpf.h: offsets in struct bpf_sock_ops, values of its op (BPF_SOCK_OPS_...),
// and bits of its bpf_sock_ops_cb_flags.
const (
	offsetOp        = 0
	offsetLocalPort = 68
	offsetFlags     = 84

	opActiveEstablished  = 4
	opPassiveEstablished = 5
	opState              = 10
	opRTT                = 12
	opParseHeader        = 13
	opHeaderLength       = 14
	opWriteHeader        = 15
	opMax                = 16

	flagRetransmissions = 2
	flagState           = 4
	flagRTT             = 8
	flagParseUnknown    = 32
	flagWriteHeader     = 64
)

// mustAttachSockOps attaches a sock_ops program, and returns what detaches it.
func mustAttachSockOps(tb testing.TB, cgroup string, instructions asm.Instructions) (detach func()) {
	tb.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SockOps, License: "GPL", Instructions: instructions})
	if err != nil {
		tb.Fatal(err)
	}
	defer program.Close() // the link holds it
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupSockOps, Program: program})
	if err != nil {
		tb.Fatal(err)
	}
	detach = sync.OnceFunc(func() {
		if err := l.Close(); err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(detach)
	return detach
}

// callbacks counts those that another program of the node gets.
type callbacks struct{ ops *ebpf.Map }

// mustAsk attaches a program that asks for callbacks, beside those that others ask for, when a
// connection is made and when it is accepted.
func mustAsk(tb testing.TB, cgroup string, client, server int32) callbacks {
	tb.Helper()
	ops, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: opMax})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ops.Close() })
	mustAttachSockOps(tb, cgroup, asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, offsetOp, asm.Word),
		asm.StoreMem(asm.RFP, -4, asm.R7, asm.Word),
		asm.LoadMapPtr(asm.R1, ops.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "counted"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.LoadMem(asm.R2, asm.R6, offsetFlags, asm.Word).WithSymbol("counted"),
		asm.JEq.Imm(asm.R7, opPassiveEstablished, "server"),
		asm.JNE.Imm(asm.R7, opActiveEstablished, "done"),
		asm.Or.Imm(asm.R2, client),
		asm.Ja.Label("ask"),
		asm.Or.Imm(asm.R2, server).WithSymbol("server"),
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("ask"),
		asm.FnSockOpsCbFlagsSet.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("done"),
		asm.Return(),
	})
	return callbacks{ops}
}

func (c callbacks) count(tb testing.TB, op uint32) (number uint64) {
	tb.Helper()
	if err := c.ops.Lookup(op, &number); err != nil {
		tb.Fatal(err)
	}
	return number
}

// mustWriteOptions attaches a program that writes a TCP option into every segment of sockets that
// have the callback for it, but of those with the port.
func mustWriteOptions(tb testing.TB, cgroup string, port uint16) {
	tb.Helper()
	const option = 0xefbe_04fe // experimental, 4 bytes, and two of the experiment
	mustAttachSockOps(tb, cgroup, asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, offsetOp, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, offsetLocalPort, asm.Word),
		asm.JEq.Imm(asm.R3, int32(port), "done"),
		asm.JEq.Imm(asm.R2, opHeaderLength, "reserve"),
		asm.JNE.Imm(asm.R2, opWriteHeader, "done"),
		asm.LoadImm(asm.R2, option, asm.DWord),
		asm.StoreMem(asm.RFP, -8, asm.R2, asm.DWord),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -8),
		asm.Mov.Imm(asm.R3, 4),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnStoreHdrOpt.Call(),
		asm.Ja.Label("done"),
		asm.Mov.Imm(asm.R2, 4).WithSymbol("reserve"),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnReserveHdrOpt.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("done"),
		asm.Return(),
	})
}

// TestOtherCallbacks: another program of the node is called back for as long as a connection
// lives, and its options are in every segment, whatever podshunt does with the connection.
func TestOtherCallbacks(t *testing.T) {
	if noWatch(t) {
		return
	}
	const (
		long, rounds    = 3000, 100
		joined, waiting = "joined", "waiting"
	)
	for _, tc := range []struct {
		name           string
		client, server int32  // the callbacks that are asked for
		alone          bool   // no pod takes part
		writes         bool   // the client's end, and the server's if that asks for it
		begins         string // joined or waiting: what the connection has done, or waits for, before the first option
		wantCalls      map[uint32]uint64
		wantReasons    []string
	}{
		{
			name: "pods that take no part", client: flagRTT | flagWriteHeader, server: flagRTT | flagWriteHeader, alone: true,
			wantCalls: map[uint32]uint64{opRTT: 2 * rounds, opHeaderLength: 2 * rounds},
		},
		{
			name: "options in pods that take no part", client: flagRTT | flagWriteHeader, server: flagRTT | flagWriteHeader, alone: true, writes: true,
			wantCalls: map[uint32]uint64{opRTT: 2 * rounds, opWriteHeader: 2 * rounds},
		},
		{
			name: "options of both ends", client: flagWriteHeader, server: flagWriteHeader, writes: true,
			wantCalls: map[uint32]uint64{opWriteHeader: 2 * rounds}, wantReasons: []string{"tcp_options"},
		},
		{
			name: "options of the client, which the server reads", client: flagWriteHeader, server: flagParseUnknown, writes: true,
			wantCalls: map[uint32]uint64{opWriteHeader: rounds, opParseHeader: rounds},
		},
		{
			name: "options of a flow that has joined, and leaves", client: flagWriteHeader, server: flagWriteHeader, writes: true, begins: joined,
			wantCalls: map[uint32]uint64{opWriteHeader: 2 * rounds}, wantReasons: []string{"tcp_options", "tcp_options"},
		},
		{
			name: "options of a connection that waits for an agent", client: flagWriteHeader, server: flagWriteHeader, writes: true, begins: waiting,
			wantCalls: map[uint32]uint64{opWriteHeader: 2 * rounds}, wantReasons: []string{"tcp_options"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := mustNode(t, watched)
			pods, cookies := n.MustEnrol(t, "client", "server")
			n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			if tc.begins != waiting {
				n.joinWatched(t)
			}
			l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
			calls := mustAsk(t, n.Config.Cgroup, tc.client, tc.server)
			silent := address.Port()
			if tc.server&flagWriteHeader != 0 {
				silent = 0
			}
			if tc.writes && tc.begins == "" {
				mustWriteOptions(t, n.Config.Cgroup, silent)
			}
			if tc.alone {
				for _, cookie := range cookies {
					if err := n.Release(cookie); err != nil {
						t.Fatal(err)
					}
				}
			}
			before := n.counts(t)
			c, s := rawPair(t, pods[0], l, address)
			switch tc.begins {
			case waiting:
				sandboxtest.MustPing(t, c, s, 5*joinAfter, 100)
				if got := n.usage(t)["flows"]; got != 1 {
					t.Fatalf("got %d flows, want the one that waits", got)
				}
				mustWriteOptions(t, n.Config.Cgroup, silent)
			case joined:
				n.mustTalkUntilPaired(t, before, c, s)
				mustWriteOptions(t, n.Config.Cgroup, silent)
				// What is by shortcut has no segment, so that nothing shows until one goes by TCP.
				n.MustSetPolicy(t, sandbox.Between(rule.Refuse, cookies...))
				sandboxtest.MustPing(t, c, s, 5, 100)
				n.MustSetPolicy(t, sandbox.Between(rule.Allow, cookies...))
			}
			sandboxtest.MustPing(t, c, s, long, 100)
			got := map[uint32]uint64{}
			for op := range tc.wantCalls {
				got[op] = calls.count(t, op)
			}
			sandboxtest.MustPing(t, c, s, rounds, 100)
			for op, want := range tc.wantCalls {
				if got := calls.count(t, op) - got[op]; got < want {
					t.Errorf("got %d callbacks of op %d in the last rounds, want at least %d", got, op, want)
				}
			}
			var reasons []string
			for _, port := range n.unsupported(t) {
				reasons = append(reasons, port.Reasons...)
			}
			if diff := cmp.Diff(tc.wantReasons, reasons); diff != "" {
				t.Errorf("reasons (-want +got):\n%s", diff)
			}
			joins := tc.begins == joined
			if got := n.since(t, before)["connection_paired"]; got != 0 != joins {
				t.Errorf("got %d flows that have joined, want one: %t", got, joins)
			}
			if got := n.usage(t)["flows"]; got != 0 && !joins {
				t.Errorf("got %d flows, want none", got)
			}
			n.mustEnd(t, c, s)
		})
	}
}

// TestOtherStates: another program is told of the states of a socket that is not watched any more.
func TestOtherStates(t *testing.T) {
	if noWatch(t) {
		return
	}
	n := mustNode(t, watched)
	pods, _ := n.MustEnrol(t, "client")
	pods = append(pods, sandboxtest.MustAddPod(t, n, "server", sandbox.PodOptions{}))
	l, address := mustRawListen(t, pods[1].Netns, pods[1].IPv4)
	calls := mustAsk(t, n.Config.Cgroup, flagState, 0)
	before := n.counts(t)
	c, s := rawPair(t, pods[0], l, address)
	sandboxtest.MustPing(t, c, s, 3000, 100)
	n.mustCount(t, before, map[string]uint64{"connection_no_peer": 1})
	c.mustClose(t)
	s.mustClose(t)
	waitUntil(t, "the client's socket to be seen closing", func() bool { return calls.count(t, opState) >= 2 })
}

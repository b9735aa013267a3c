// SPDX-License-Identifier: Apache-2.0

// Package hazards measures how this kernel serves sockets of a sockmap where it is known
// to differ from plain TCP on some kernels, and whether the guards work on it.
//
// hazards.go has the table of hazards, probes.go measures each of them, guards.go
// tries the guards, and connection.go makes the connections for both.
package hazards

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
)

// Names of hazards that code elsewhere asks for.
const (
	BlockingRecv  = "blocking-recv"
	MPTCPListener = "mptcp-listener"
	noTrampolines = "no-trampolines"
)

const (
	// probeTimeout limits every socket call of a probe. What it waits for takes no time,
	// but a node that boots is busy, and a probe that times out counts as a hazard.
	probeTimeout = 5 * time.Second
	// quiet is the time in which something must happen that does not on a kernel
	// with the hazard.
	quiet = 250 * time.Millisecond
	// probeBytes are redirected to try a guard.
	probeBytes = 5
)

// hazard is a way in which the kernel may serve a socket in a sockmap differently
// from a plain one.
type hazard struct {
	name   string
	fatal  bool
	absent string // what was observed on a kernel without it
	// consequence says who notices it, action what podshunt does about it, and
	// guarded what it does if the guard works.
	consequence, action string
	guard, guarded      string
	probe               func() (found string, err error)
}

func hazards() []hazard {
	const asksFirst = "programs that ask how much there is before they read stall (nginx, Java NIO, .NET)"
	const eachMessage = "each message is checked: it goes by TCP, and later connections to the port are not paired"
	return []hazard{
		{
			name: noTrampolines, probe: probeTrampolines,
			absent:      "fentry, fexit and fmod_ret programs are allowed",
			consequence: "no guard can run",
			action:      "reads are seen by a tracepoint instead",
		},
		{
			name: "fionread-tcp", fatal: true, probe: func() (string, error) { return probeFIONREAD(false) },
			absent:      "FIONREAD counts the TCP bytes of a socket in a sockmap",
			consequence: asksFirst,
			action:      "nothing: it is there as soon as a connection is paired",
		},
		{
			name: "fionread-redirected", fatal: true, probe: func() (string, error) { return probeFIONREAD(true) },
			absent:      "FIONREAD counts redirected bytes",
			consequence: asksFirst,
			action:      "nothing",
			guard:       datapath.GuardFIONREAD,
			guarded:     "a receiver that uses it stays on TCP, and later connections to the port are not paired",
		},
		{
			name: "splice", fatal: true, probe: probeSplice,
			absent:      "splice takes redirected bytes",
			consequence: "io.Copy between two TCP connections in Go, and haproxy with splicing, stall or cut the stream short",
			action:      "a receiver that never uses recv stays on TCP",
			guard:       datapath.GuardSplice,
			guarded:     "splice fails with EINVAL, so that programs read and write; later connections to the port are not paired",
		},
		{
			name: "ktls", probe: probeTLS,
			absent:      "this kernel's version refuses kTLS on a socket of a sockmap",
			consequence: "programs that set up kTLS on a connection that has begun",
			action:      eachMessage,
			guard:       datapath.GuardULP,
			guarded:     "TCP_ULP fails with ENOENT, so that programs encrypt themselves; later connections to the port are not paired",
		},
		{
			name: "waitall", probe: probeWaitall,
			absent:      "recv with MSG_WAITALL waits for all redirected bytes",
			consequence: "programs that read records of known length by one recv",
			action:      "the first such recv may return early; then the receiver stays on TCP, and later connections to the port are not paired",
			guard:       datapath.GuardFlags,
			guarded:     "from its beginning on the receiver stays on TCP, and later connections to the port are not paired",
		},
		{
			name: BlockingRecv, probe: probeSleepingRecv,
			absent:      "a recv that sleeps reports a reset as such",
			consequence: "programs with sockets in blocking mode: a signal or a reset gives EAGAIN",
			action:      "sockets in blocking mode are kept out, unless this hazard is accepted, or both pods accept them by " + api.AnnotationBlockingSockets,
		},
		{
			name: "oob", probe: probeOOB,
			absent:      "MSG_OOB works",
			consequence: "telnet, rlogin, FTP's ABOR: the urgent byte comes in line",
			action:      "nothing before a recv with MSG_OOB is seen; then the receiver stays on TCP, and later connections to the port are not paired",
			guard:       datapath.GuardFlags,
			guarded:     "the urgent byte goes by TCP, as all that follows, and later connections to the port are not paired",
		},
		{
			name: "rcvlowat", probe: probeLowat,
			absent:      "SO_RCVLOWAT is obeyed",
			consequence: "programs that set it are woken early",
			action:      eachMessage,
		},
		{
			name: "zerocopy", probe: probeZerocopy,
			absent:      "completions of MSG_ZEROCOPY arrive",
			consequence: "programs that send with MSG_ZEROCOPY wait for ever",
			action:      eachMessage,
		},
		{
			name: "unread-close", probe: probeUnreadClose,
			absent:      "a close with redirected bytes unread resets the connection",
			consequence: "programs that tell an aborted answer by ECONNRESET alone see the end of the stream",
			action:      "nothing",
		},
		{
			name: MPTCPListener, probe: probeMPTCPListener,
			absent:      "this kernel's version handles sockets of a sockmap that an MPTCP listener accepts",
			consequence: "servers in Go 1.24 or later, and others that listen with MPTCP: the kernel crashes",
			action:      "sockets that an MPTCP listener accepts are kept out, and later connections to the port are not paired",
		},
	}
}

// Acceptable returns the names of the hazards that can be accepted, each with who notices
// it then: those that keep every pod on TCP, or sockets in blocking mode.
func Acceptable() (names, consequences []string) {
	for _, h := range hazards() {
		if h.fatal || h.name == BlockingRecv {
			names, consequences = append(names, h.name), append(consequences, h.consequence)
		}
	}
	return names, consequences
}

// Measure returns all hazards, and whether this kernel has them. It takes a few
// seconds, and uses real connections over the loopback of private network
// namespaces; it changes nothing on the node. It tries the guards with the given
// names: a guard counts only if it works here. A hazard that cannot be measured
// counts as present.
func Measure(guards []string) []api.Hazard {
	_ = rlimit.RemoveMemlock() // if this matters, the probes fail and say why
	var measured []api.Hazard
	proofs := map[string]error{}
	cache := btf.NewCache()
	for _, name := range guards {
		proofs[name] = proveGuard(name, cache)
	}
	for _, h := range hazards() {
		m := api.Hazard{Name: h.name, Detail: h.absent, Consequence: h.consequence, Action: h.action}
		found, err := h.probe()
		switch {
		case err != nil: // what cannot be tested cannot be trusted
			m.Present, m.Detail = true, fmt.Sprintf("not tested: %v", err)
		case found != "":
			m.Present, m.Detail = true, found
		}
		if err, wanted := proofs[h.guard]; m.Present && wanted {
			if err == nil {
				m.Guard, m.Action = h.guard, h.guarded
			} else {
				m.Action += fmt.Sprintf("; its guard does not work: %v", err)
			}
		}
		m.Fatal = h.fatal && m.Guard == ""
		measured = append(measured, m)
	}
	return measured
}

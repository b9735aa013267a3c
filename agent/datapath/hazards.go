// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// Names of hazards that other settings are about.
const (
	HazardBlockingRecv  = "blocking-recv"
	HazardMPTCPListener = "mptcp-listener"
	hazardNoTrampolines = "no-trampolines"
)

const (
	// probeTimeout limits every socket call of a probe. What it waits for takes no
	// time, but a node that boots is busy, and a probe that fails costs it the shortcut.
	probeTimeout = 5 * time.Second
	// quiet is how long is waited for what a kernel with a hazard does not do.
	quiet = 250 * time.Millisecond
	// probeBytes is how much the proof of a guard redirects.
	probeBytes = 5
)

// hazard is a way in which a socket of a sockmap may be served differently from
// a plain one.
type hazard struct {
	name   string
	fatal  bool
	absent string // what was observed if it is not there
	// consequence is who notices it; action what podshunt does, and guarded what
	// it does with the guard.
	consequence, action string
	guard, guarded      string
	probe               func() (found string, err error)
}

func hazards() []hazard {
	const asksFirst = "programs that ask how much there is before they read stall (nginx, Java NIO, .NET)"
	const eachMessage = "each message is checked: it goes by TCP, and later connections to the port are not paired"
	return []hazard{
		{
			name: hazardNoTrampolines, probe: probeTrampolines,
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
			guard:       GuardFIONREAD,
			guarded:     "a receiver that uses it stays on TCP, and later connections to the port are not paired",
		},
		{
			name: "splice", fatal: true, probe: probeSplice,
			absent:      "splice takes redirected bytes",
			consequence: "io.Copy between two TCP connections in Go, and haproxy with splicing, stall or cut the stream short",
			action:      "a receiver that never uses recv stays on TCP",
			guard:       GuardSplice,
			guarded:     "splice fails with EINVAL, so that programs read and write; later connections to the port are not paired",
		},
		{
			name: "ktls", probe: probeTLS,
			absent:      "this kernel's version refuses kTLS on a socket of a sockmap",
			consequence: "programs that set up kTLS on a connection that has begun",
			action:      eachMessage,
			guard:       GuardULP,
			guarded:     "TCP_ULP fails with ENOENT, so that programs encrypt themselves; later connections to the port are not paired",
		},
		{
			name: "waitall", probe: probeWaitall,
			absent:      "recv with MSG_WAITALL waits for all redirected bytes",
			consequence: "programs that read records of known length by one recv",
			action:      "the first such recv may return early; then the receiver stays on TCP, and later connections to the port are not paired",
			guard:       GuardFlags,
			guarded:     "from its beginning on the receiver stays on TCP, and later connections to the port are not paired",
		},
		{
			name: HazardBlockingRecv, probe: probeSleepingRecv,
			absent:      "a recv that sleeps reports a reset as such",
			consequence: "programs with sockets in blocking mode: a signal or a reset gives EAGAIN",
			action:      "sockets in blocking mode are kept out, unless hazards are accepted",
		},
		{
			name: "oob", probe: probeOOB,
			absent:      "MSG_OOB is served",
			consequence: "telnet, rlogin, FTP's ABOR: the urgent byte comes in line",
			action:      "nothing before a recv with MSG_OOB is seen; then the receiver stays on TCP, and later connections to the port are not paired",
			guard:       GuardFlags,
			guarded:     "the urgent byte goes by TCP, as all that follows, and later connections to the port are not paired",
		},
		{
			name: "rcvlowat", probe: probeLowat,
			absent:      "SO_RCVLOWAT is kept to",
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
			name: HazardMPTCPListener, probe: probeMPTCPListener,
			absent:      "this kernel's version knows sockets of a sockmap that an MPTCP listener accepts",
			consequence: "servers in Go 1.24 or later, and others that listen with MPTCP: the kernel crashes",
			action:      "sockets that an MPTCP listener accepts are kept out, and later connections to the port are not paired",
		},
	}
}

// Hazards measures how this kernel serves sockets of a sockmap where it is
// known to differ from plain TCP on some kernels: on real connections over the
// loopback of private network namespaces, in a few seconds. Nothing of the node
// is touched. Where a hazard is found and a guard against it is among guards, it
// is tried as well: it counts only if it works here.
func Hazards(guards []string) []api.Hazard {
	_ = rlimit.RemoveMemlock() // where it matters and fails, the probes do and say why
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

func probeTrampolines() (string, error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "probe_fexit", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFExit, AttachTo: "tcp_bpf_recvmsg", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err == nil {
		defer prog.Close()
		var l link.Link
		if l, err = link.AttachTracing(link.TracingOptions{Program: prog}); err == nil {
			return "", l.Close()
		}
	}
	return fmt.Sprintf("fentry, fexit and fmod_ret programs are refused: %v", withoutGuess(err)), nil
}

// withoutGuess drops the BPF library's guess at the cause of an error.
func withoutGuess(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

func probeFIONREAD(redirect bool) (string, error) {
	const bytes = 10
	var got int
	err := withPair(redirect, func(sender, receiver int) error {
		if _, err := unix.Write(sender, make([]byte, bytes)); err != nil {
			return err
		}
		if err := waitReadable(receiver); err != nil {
			return err
		}
		var err error
		got, err = unix.IoctlGetInt(receiver, unix.TIOCINQ) // FIONREAD by another name
		return err
	})
	if err != nil || got == bytes {
		return "", err
	}
	kind := "unread TCP"
	if redirect {
		kind = "redirected"
	}
	return fmt.Sprintf("FIONREAD says %d for %d %s bytes", got, bytes, kind), nil
}

func probeSplice() (found string, err error) {
	err = withPair(true, func(sender, receiver int) error {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			return err
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		if _, err := unix.Write(sender, make([]byte, 5)); err != nil {
			return err
		}
		if err := waitReadable(receiver); err != nil {
			return err
		}
		// The flag is about the pipe.
		if err := setTimeouts(receiver, quiet); err != nil {
			return err
		}
		n, err := unix.Splice(receiver, nil, pipe[1], nil, 5, unix.SPLICE_F_NONBLOCK)
		if n != 5 {
			found = fmt.Sprintf("splice of 5 redirected bytes gives %d (%v)", n, err)
		}
		return nil
	})
	return found, err
}

func probeWaitall() (found string, err error) {
	err = withPair(true, func(sender, receiver int) error {
		half := make([]byte, 50)
		sent, returned, tid := make(chan error, 1), make(chan struct{}), unix.Gettid()
		go func() {
			err := awaitRecv(tid)
			if err == nil {
				_, err = unix.Write(sender, half)
			}
			select {
			case <-returned:
			case <-time.After(time.Second):
			}
			if err == nil {
				_, err = unix.Write(sender, half)
			}
			sent <- err
		}()
		n, _, err := unix.Recvfrom(receiver, make([]byte, 2*len(half)), unix.MSG_WAITALL)
		close(returned)
		if err := errors.Join(err, <-sent); err != nil {
			return err
		}
		if n != 2*len(half) {
			found = fmt.Sprintf("recv with MSG_WAITALL of 100 bytes that come in two halves returns %d", n)
		}
		return nil
	})
	return found, err
}

// probeSleepingRecv resets a connection under a recv that sleeps. A signal and a
// send buffer that drains wake it in the same way, but take longer to bring about.
func probeSleepingRecv() (found string, err error) {
	err = withPair(false, func(sender, receiver int) error {
		reset, tid := make(chan error, 1), unix.Gettid()
		go func() {
			// A recv that begins after the reset would say what any kernel says.
			reset <- cmp.Or(awaitRecv(tid),
				unix.SetsockoptLinger(sender, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
				closeSocket(sender))
		}()
		_, _, err := unix.Recvfrom(receiver, make([]byte, 1), 0)
		if resetErr := <-reset; resetErr != nil {
			return resetErr
		}
		if !errors.Is(err, unix.ECONNRESET) {
			found = fmt.Sprintf("a recv that sleeps returns %v when the connection is reset", err)
		}
		return nil
	})
	return found, err
}

// awaitRecv returns when a thread of this process sleeps in recvfrom.
func awaitRecv(tid int) error {
	for end := time.Now().Add(probeTimeout); time.Now().Before(end); time.Sleep(time.Millisecond) {
		// The number of the call in which it sleeps, and the arguments; or "running".
		call, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		if err != nil || strings.HasPrefix(string(call), fmt.Sprint(unix.SYS_RECVFROM, " ")) {
			return err
		}
	}
	return errors.New("the receiver does not come to sleep in recv")
}

// closeSocket closes a socket and keeps its number, which withPair closes.
func closeSocket(fd int) error { return unix.Dup3(int(os.Stderr.Fd()), fd, unix.O_CLOEXEC) }

// probeTLS goes by the version, because kernels have crashed on it.
func probeTLS() (string, error) {
	v, err := runningVersion()
	if err != nil || v.refusesTLS() {
		return "", err
	}
	return "not measured, as kernels have crashed on it: bytes that were redirected before kTLS is set up are taken for decrypted ones", nil
}

func probeOOB() (found string, err error) {
	err = withPair(true, func(sender, receiver int) error {
		if err := errors.Join(unix.Sendto(sender, []byte("ab"), 0, nil), unix.Sendto(sender, []byte("c"), unix.MSG_OOB, nil)); err != nil {
			return err
		}
		if err := waitReadable(receiver); err != nil {
			return err
		}
		got := make([]byte, 3)
		n, _, err := unix.Recvfrom(receiver, got, unix.MSG_OOB)
		if n != 1 || got[0] != 'c' {
			found = fmt.Sprintf("recv with MSG_OOB gives %q (%v) where the urgent byte is \"c\"", got[:max(n, 0)], err)
		}
		return nil
	})
	return found, err
}

func probeLowat() (found string, err error) {
	const lowat = 10
	err = withPair(true, func(sender, receiver int) error {
		if err := unix.SetsockoptInt(receiver, unix.SOL_SOCKET, unix.SO_RCVLOWAT, lowat); err != nil {
			return err
		}
		if _, err := unix.Write(sender, make([]byte, lowat/2)); err != nil {
			return err
		}
		if readable(receiver, quiet) == nil {
			found = fmt.Sprintf("a socket with SO_RCVLOWAT of %d is readable after %d bytes", lowat, lowat/2)
		}
		return nil
	})
	return found, err
}

func probeZerocopy() (found string, err error) {
	err = withPair(true, func(sender, receiver int) error {
		if err := unix.SetsockoptInt(sender, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1); err != nil {
			return err
		}
		message := make([]byte, 4096)
		if err := unix.Sendto(sender, message, unix.MSG_ZEROCOPY, nil); err != nil {
			return err
		}
		if _, err := unix.Read(receiver, message); err != nil {
			return err
		}
		// POLLERR needs no asking for.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(sender)}}, int(quiet.Milliseconds()))
		if err == nil && n == 0 {
			found = "no completion arrives for a message with MSG_ZEROCOPY"
		}
		return err
	})
	return found, err
}

func probeUnreadClose() (found string, err error) {
	err = withPair(true, func(sender, receiver int) error {
		if _, err := unix.Write(sender, make([]byte, 5)); err != nil {
			return err
		}
		if err := waitReadable(receiver); err != nil {
			return err
		}
		if err := closeSocket(receiver); err != nil {
			return err
		}
		n, err := unix.Read(sender, make([]byte, 1))
		if !errors.Is(err, unix.ECONNRESET) {
			found = fmt.Sprintf("read gives %d (%v) after the other end was closed with redirected bytes unread", n, err)
		}
		return nil
	})
	return found, err
}

func probeMPTCPListener() (string, error) {
	v, err := runningVersion()
	if err != nil || !v.mptcpUnsafe() {
		return "", err
	}
	return fmt.Sprintf("not measured, as it would crash the kernel: %d.%d.%d is a version without the correction of CVE-2025-68227", v.major, v.minor, v.patch), nil
}

func waitReadable(fd int) error { return readable(fd, probeTimeout) }

func readable(fd int, within time.Duration) error {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(within.Milliseconds()))
	if err == nil && n == 0 {
		err = errors.New("sent bytes do not arrive")
	}
	return err
}

// withPair calls f with a TCP connection over the loopback of a network
// namespace of its own, both ends in a sockmap. With redirect, what the sender
// writes is moved to the receiver's queue.
func withPair(redirect bool, f func(sender, receiver int) error) error {
	private, err := ns.TempNetNS()
	if err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	defer private.Close()
	return private.Do(func(ns.NetNS) error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bring up lo: %w", err)
		}
		unblock, err := blockPreemption()
		if err != nil {
			return err
		}
		defer unblock()
		sender, receiver, err := tcpPair()
		if err != nil {
			return fmt.Errorf("connect over loopback: %w", err)
		}
		defer unix.Close(sender)
		defer unix.Close(receiver)
		sockets, err := probeMap(redirect, sender, receiver)
		if err != nil {
			return err
		}
		defer sockets.Close()
		return f(sender, receiver)
	})
}

// blockPreemption keeps the runtime's signal from this thread, where it would
// end calls with EINTR, until the function that it returns is called.
func blockPreemption() (unblock func(), err error) {
	var set, old unix.Sigset_t
	set.Val[0] = 1 << (unix.SIGURG - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, &old); err != nil {
		return nil, fmt.Errorf("block signals: %w", err)
	}
	return func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }, nil
}

// probeMap puts both ends into a sockmap, the receiver under key 0.
func probeMap(redirect bool, sender, receiver int) (*ebpf.Map, error) {
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 2})
	if err != nil {
		return nil, fmt.Errorf("make a sockmap: %w", err)
	}
	err = func() error {
		if redirect {
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: "probe_redirect", Type: ebpf.SkMsg, AttachType: ebpf.AttachSkMsgVerdict, License: "GPL",
				Instructions: asm.Instructions{
					asm.LoadMapPtr(asm.R2, sockets.FD()),
					asm.Mov.Imm(asm.R3, 0),
					asm.Mov.Imm(asm.R4, 1), // BPF_F_INGRESS
					asm.FnMsgRedirectMap.Call(),
					asm.Return(),
				},
			})
			if err != nil {
				return fmt.Errorf("load sk_msg: %w", err)
			}
			defer prog.Close()
			if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: sockets.FD(), Program: prog, Attach: ebpf.AttachSkMsgVerdict}); err != nil {
				return fmt.Errorf("attach sk_msg: %w", err)
			}
		}
		for key, fd := range []int{receiver, sender} {
			if err := sockets.Put(uint32(key), uint64(fd)); err != nil {
				return fmt.Errorf("put a socket into the sockmap: %w", err)
			}
		}
		return nil
	}()
	if err != nil {
		return nil, errors.Join(err, sockets.Close())
	}
	return sockets, nil
}

// tcpPair connects two blocking sockets in the thread's network namespace.
func tcpPair() (sender, receiver int, err error) {
	l, err := probeSocket()
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(l)
	if err := unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, 0, err
	}
	if err := unix.Listen(l, 1); err != nil {
		return 0, 0, err
	}
	address, err := unix.Getsockname(l)
	if err != nil {
		return 0, 0, err
	}
	if sender, err = probeSocket(); err != nil {
		return 0, 0, err
	}
	if err = unix.Connect(sender, address); err == nil {
		receiver, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC)
	}
	if err == nil {
		err = setTimeouts(receiver, probeTimeout)
	}
	if err != nil {
		unix.Close(sender)
	}
	return sender, receiver, err
}

func probeSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	return fd, setTimeouts(fd, probeTimeout)
}

func setTimeouts(fd int, limit time.Duration) error {
	timeout := unix.NsecToTimeval(limit.Nanoseconds())
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout))
}

// proveGuard attaches a guard to a connection of its own and tells why it does
// not do what it is for.
func proveGuard(name string, cache *btf.Cache) error {
	proofs := map[string]func(sender, receiver int, flow func() (bpf.ShortcutFlow, error)) error{
		GuardSplice: proveSplice, GuardULP: proveULP, GuardFIONREAD: proveFIONREAD, GuardFlags: proveFlags,
	}
	// A sender without a program on its sockmap sends as a plain socket does.
	return withPair(true, func(sender, receiver int) error {
		spec, err := bpf.LoadShortcut()
		if err != nil {
			return err
		}
		clear(spec.Programs)
		for _, m := range spec.Maps {
			m.MaxEntries = min(m.MaxEntries, 2*uint32(runtime.NumCPU()))
		}
		objects, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Cache: cache})
		if err != nil {
			return fmt.Errorf("make maps: %w", err)
		}
		defer objects.Close()
		const id = uint64(1)
		flows := objects.Maps[bpf.ShortcutMapFlows]
		flow := bpf.ShortcutFlow{State: id << bpf.ShortcutFlowStateFLOW_STATE_BITS}
		flow.Side[client].Sending.RedirectEnd = probeBytes // as if they were unread
		if err := flows.Put(id, flow); err != nil {
			return fmt.Errorf("make a flow: %w", err)
		}
		for side, fd := range []int{client: sender, server: receiver} {
			if err := objects.Maps[bpf.ShortcutMapSkFlows].Put(int32(fd), bpf.ShortcutSkFlow{Flow: id, Side: uint32(side)}); err != nil {
				return fmt.Errorf("make a socket's way to it: %w", err)
			}
		}
		g, err := attachGuard(name, objects.Maps, "", cache)
		if err != nil {
			return withoutGuess(err)
		}
		defer func() { _ = g.close() }() // it ends with the process at the latest
		return proofs[name](sender, receiver, func() (flow bpf.ShortcutFlow, err error) {
			return flow, flows.Lookup(id, &flow)
		})
	})
}

func proveSplice(sender, receiver int, _ func() (bpf.ShortcutFlow, error)) error {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	if _, err := unix.Write(sender, make([]byte, probeBytes)); err != nil {
		return err
	}
	if n, err := unix.Splice(receiver, nil, pipe[1], nil, probeBytes, unix.SPLICE_F_NONBLOCK); !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("splice gives %d (%s), want EINVAL", n, fmt.Sprint(err))
	}
	if n, err := unix.Read(receiver, make([]byte, probeBytes)); n != probeBytes {
		return fmt.Errorf("read after a splice gives %d (%s), want %d", n, fmt.Sprint(err), probeBytes)
	}
	return nil
}

func proveULP(sender, _ int, flow func() (bpf.ShortcutFlow, error)) error {
	if err := unix.SetsockoptString(sender, unix.SOL_TCP, unix.TCP_ULP, "tls"); !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("TCP_ULP gives %s, want ENOENT", fmt.Sprint(err))
	}
	// So it does without a guard where there is no kTLS.
	noted, err := flow()
	if err == nil && noted.Unsupported[server] != uint32(bpf.ShortcutUnsupportedUNSUPPORTED_ULP) {
		err = errors.New("TCP_ULP is not seen")
	}
	return err
}

func proveFIONREAD(_, receiver int, flow func() (bpf.ShortcutFlow, error)) error {
	if _, err := unix.IoctlGetInt(receiver, unix.TIOCINQ); err != nil {
		return err
	}
	return wantUnsupported(flow, bpf.ShortcutUnsupportedUNSUPPORTED_FIONREAD)
}

func proveFlags(sender, receiver int, flow func() (bpf.ShortcutFlow, error)) error {
	if _, _, err := unix.Recvfrom(receiver, make([]byte, 1), unix.MSG_WAITALL|unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("recv of nothing gives %s, want EAGAIN", fmt.Sprint(err))
	}
	if err := unix.Sendto(sender, []byte("x"), unix.MSG_OOB, nil); err != nil {
		return err
	}
	return wantUnsupported(flow, bpf.ShortcutUnsupportedUNSUPPORTED_WAITALL|bpf.ShortcutUnsupportedUNSUPPORTED_OOB)
}

// wantUnsupported tells why the direction to the receiver is not on TCP for just these reasons.
func wantUnsupported(get func() (bpf.ShortcutFlow, error), want bpf.ShortcutUnsupported) error {
	flow, err := get()
	if err != nil {
		return fmt.Errorf("read the flow: %w", err)
	}
	if noted := flow.Unsupported[client] | flow.Unsupported[server]; noted != uint32(want) || flow.Side[server].Receiving.State&bpf.ShortcutReadStateREAD_UNSUPPORTED == 0 {
		return fmt.Errorf("the call is not seen: noted are %v", reasons(noted))
	}
	return nil
}

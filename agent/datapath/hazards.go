// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
)

// HazardSleepingRecv names the hazard that Config.Sleepers is about.
const HazardSleepingRecv = "sleeping-recv"

// probeTimeout limits every socket call of a probe.
const probeTimeout = 250 * time.Millisecond

// Hazards measures how this kernel serves sockets of a sockmap where it is
// known to differ from plain TCP on some kernels: on real connections over the
// loopback of a private network namespace, in well under a second. Nothing of
// the node is touched.
func Hazards() []api.Hazard {
	_ = rlimit.RemoveMemlock() // where it matters and fails, the probes do and say why
	hazards := []api.Hazard{
		{Name: "no-trampolines", Detail: "fentry and fexit programs are allowed"},
		{Name: "fionread-tcp", Fatal: true, Detail: "FIONREAD counts the TCP bytes of a socket in a sockmap"},
		{Name: "fionread-redirected", Fatal: true, Detail: "FIONREAD counts redirected bytes"},
		{Name: "splice", Fatal: true, Detail: "splice takes redirected bytes"},
		{Name: "waitall", Detail: "recv with MSG_WAITALL waits for all redirected bytes"},
		{Name: HazardSleepingRecv, Detail: "a recv that sleeps reports a reset as such"},
	}
	probes := []func() (found string, err error){
		probeTrampolines,
		func() (string, error) { return probeFIONREAD(false) },
		func() (string, error) { return probeFIONREAD(true) },
		probeSplice,
		probeWaitall,
		probeSleepingRecv,
	}
	for i, probe := range probes {
		found, err := probe()
		switch {
		case err != nil: // what cannot be tested cannot be trusted
			hazards[i].Present, hazards[i].Detail = true, fmt.Sprintf("not tested: %v", err)
		case found != "":
			hazards[i].Present, hazards[i].Detail = true, found
		}
	}
	return hazards
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
	var errno unix.Errno // without the library's guess at the cause
	if errors.As(err, &errno) {
		err = errno
	}
	return fmt.Sprintf("fentry and fexit programs are refused, so that splice cannot be guarded: %v", err), nil
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
	return fmt.Sprintf("FIONREAD says %d for %d %s bytes: programs that ask before they read stall (nginx, Java NIO, .NET)", got, bytes, kind), nil
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
		n, err := unix.Splice(receiver, nil, pipe[1], nil, 5, unix.SPLICE_F_NONBLOCK)
		if n != 5 {
			found = fmt.Sprintf("splice of 5 redirected bytes gives %d (%v), and this build has no guard: breaks io.Copy between two TCP connections in Go, and haproxy", n, err)
		}
		return nil
	})
	return found, err
}

func probeWaitall() (found string, err error) {
	err = withPair(true, func(sender, receiver int) error {
		half := make([]byte, 50)
		sent := make(chan error, 1)
		go func() {
			for range 2 {
				if _, err := unix.Write(sender, half); err != nil {
					sent <- err
					return
				}
				time.Sleep(probeTimeout / 10)
			}
			sent <- nil
		}()
		n, _, err := unix.Recvfrom(receiver, make([]byte, 2*len(half)), unix.MSG_WAITALL)
		if err := errors.Join(err, <-sent); err != nil {
			return err
		}
		if n != 2*len(half) {
			found = fmt.Sprintf("recv with MSG_WAITALL of 100 bytes that come in two halves returns %d; a receiver that was seen to use it stays on TCP", n)
		}
		return nil
	})
	return found, err
}

// probeSleepingRecv resets a connection under a recv that sleeps. A signal and a
// send buffer that drains wake it in the same way, but take longer to bring about.
func probeSleepingRecv() (found string, err error) {
	err = withPair(false, func(sender, receiver int) error {
		reset := make(chan error, 1)
		go func() {
			time.Sleep(probeTimeout / 10)
			reset <- errors.Join(
				unix.SetsockoptLinger(sender, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
				unix.Dup3(int(os.Stderr.Fd()), sender, unix.O_CLOEXEC)) // closes the socket, keeps the number
		}()
		_, _, err := unix.Recvfrom(receiver, make([]byte, 1), 0)
		if resetErr := <-reset; resetErr != nil {
			return resetErr
		}
		if !errors.Is(err, unix.ECONNRESET) {
			found = fmt.Sprintf("a recv that sleeps returns %v when the connection is reset, and after a signal: sockets in blocking mode stay on TCP unless that is accepted", err)
		}
		return nil
	})
	return found, err
}

func waitReadable(fd int) error {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(probeTimeout.Milliseconds()))
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
		err = setTimeouts(receiver)
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
	return fd, setTimeouts(fd)
}

func setTimeouts(fd int) error {
	timeout := unix.NsecToTimeval(probeTimeout.Nanoseconds())
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout))
}

// SPDX-License-Identifier: Apache-2.0

// TCP connections on loopback for the probes, with and without the shortcut.

package hazards

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// closeSocket closes a socket, but keeps its file descriptor open, so that withPair
// closes that and nothing else.
func closeSocket(fd int) error { return unix.Dup3(int(os.Stderr.Fd()), fd, unix.O_CLOEXEC) }

func waitReadable(fd int) error { return readable(fd, probeTimeout) }

func readable(fd int, within time.Duration) error {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(within.Milliseconds()))
	if err == nil && n == 0 {
		err = errors.New("sent bytes do not arrive")
	}
	return err
}

// withPair calls f with a TCP connection over the loopback of a network namespace of
// its own, both ends in a sockmap. With redirect, what the sender writes is
// redirected into the receiver's queue.
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

// blockPreemption keeps the Go runtime's signal from this thread until unblock is
// called: it would end system calls with EINTR.
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

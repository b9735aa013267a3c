// SPDX-License-Identifier: Apache-2.0

// One probe for each hazard.

package hazards

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
)

func probeTrampolines() (string, error) {
	if err := datapath.CheckFtrace(); err != nil {
		return fmt.Sprintf("fentry, fexit and fmod_ret programs do nothing: %v", err), nil
	}
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

// withoutGuess drops the guess at a cause that the BPF library adds to an error.
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
		// SPLICE_F_NONBLOCK is about the pipe, so the socket needs a
		// timeout.
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

// probeSleepingRecv resets a connection while a recv on it sleeps. A signal, or a
// send buffer that drains, would show the same, but takes longer to bring about.
func probeSleepingRecv() (found string, err error) {
	err = withPair(false, func(sender, receiver int) error {
		reset, tid := make(chan error, 1), unix.Gettid()
		go func() {
			// On any kernel, a recv that begins after the reset reports it.
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

// awaitRecv waits until a thread of this process sleeps in recvfrom.
func awaitRecv(tid int) error {
	for end := time.Now().Add(probeTimeout); time.Now().Before(end); time.Sleep(time.Millisecond) {
		// The file has the number of the call in which the thread sleeps, and its
		// arguments, or "running".
		call, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		if err != nil || strings.HasPrefix(string(call), fmt.Sprint(unix.SYS_RECVFROM, " ")) {
			return err
		}
	}
	return errors.New("the receiver does not come to sleep in recv")
}

// probeTLS goes by the kernel's version, because kernels have crashed on kTLS in a
// sockmap.
func probeTLS() (string, error) {
	v, err := datapath.RunningVersion()
	if err != nil || v.RefusesTLS() {
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
		// poll reports POLLERR without being asked.
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
	v, err := datapath.RunningVersion()
	if err != nil || !v.MPTCPUnsafe() {
		return "", err
	}
	return fmt.Sprintf("not measured, as it would crash the kernel: %d.%d.%d is a version without the correction of CVE-2025-68227", v.Major, v.Minor, v.Patch), nil
}

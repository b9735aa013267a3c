// SPDX-License-Identifier: Apache-2.0

// The proof that a guard works on this kernel.

package hazards

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/bpf"
)

// The sides of a flow.
const (
	client = bpf.ShortcutSideIndexSIDE_CLIENT
	server = bpf.ShortcutSideIndexSIDE_SERVER
)

// proveGuard attaches a guard to a connection of its own. It returns an error if the
// guard does not work.
func proveGuard(name string, cache *btf.Cache) error {
	if err := datapath.CheckFtrace(); err != nil {
		return err
	}
	proofs := map[string]func(sender, receiver int, flow func() (bpf.ShortcutFlow, error)) error{
		datapath.GuardSplice: proveSplice, datapath.GuardULP: proveULP, datapath.GuardFIONREAD: proveFIONREAD, datapath.GuardFlags: proveFlags,
	}
	// With redirect, since a socket in a sockmap without a program sends as a
	// plain one.
	return withPair(true, func(sender, receiver int) error {
		spec, err := bpf.LoadShortcut()
		if err != nil {
			return err
		}
		clear(spec.Programs)
		delete(spec.Maps, bpf.ShortcutMapRequests) // its size is in pages, and no guard has it
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
		detach, err := datapath.AttachGuard(name, objects.Maps, cache)
		if err != nil {
			return withoutGuess(err)
		}
		defer func() { _ = detach() }() // it ends with the process at the latest
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
	// TCP_ULP also fails without a guard if the kernel has no kTLS, so ask the
	// flow.
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

// wantUnsupported returns an error unless the direction to the receiver is on TCP for just
// these reasons.
func wantUnsupported(get func() (bpf.ShortcutFlow, error), want bpf.ShortcutUnsupported) error {
	flow, err := get()
	if err != nil {
		return fmt.Errorf("read the flow: %w", err)
	}
	if noted := flow.Unsupported[client] | flow.Unsupported[server]; noted != uint32(want) || flow.Side[server].Receiving.State&bpf.ShortcutReadStateREAD_UNSUPPORTED == 0 {
		return fmt.Errorf("the call is not seen: noted are the bits %#x", noted)
	}
	return nil
}

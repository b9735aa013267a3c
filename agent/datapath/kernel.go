// SPDX-License-Identifier: Apache-2.0

// What a kernel needs to run the programs at all.

package datapath

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// ErrKernel is returned by CheckKernel if the kernel lacks something that the programs
// need.
var ErrKernel = errors.New("needed is Linux 6.1 or later with BTF")

// CheckKernel loads the programs, and attaches nothing. If this kernel cannot run
// them it returns ErrKernel, with everything that is missing.
func CheckKernel() error {
	if err := rlimit.RemoveMemlock(); err != nil { // kernels before 5.11 count maps against it
		return fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	var missing []string
	lacks := func(what string, err error) {
		if err != nil {
			missing = append(missing, what)
		}
	}
	cache := btf.NewCache()
	types, err := cache.Kernel()
	lacks("BTF (CONFIG_DEBUG_INFO_BTF)", err)
	if err == nil {
		lacks("recv's flags where the programs look for them (fourth parameter of tcp_bpf_recvmsg, Linux 5.19)", checkRecvmsg(types))
	}
	_, err = NetnsCookie("/proc/self/ns/net")
	lacks("SO_NETNS_COOKIE (Linux 5.14)", err)
	lacks("netns cookies for sock_ops programs (Linux 5.15)", loadProbe(ebpf.ProgramSpec{
		Type: ebpf.SockOps, Instructions: asm.Instructions{asm.FnGetNetnsCookie.Call()},
	}))
	lacks("sight of what applications read (fexit with bpf_get_func_ret, Linux 5.17; or the tracepoint sock_recv_length, Linux 6.3)",
		probeObservers())
	if len(missing) > 0 {
		return fmt.Errorf("kernel %s lacks %s: %w", release(), strings.Join(missing, ", "), ErrKernel)
	}
	spec, err := bpf.LoadShortcut()
	if err != nil {
		return err
	}
	var errs []error
	for observer := range observerPrograms() {
		objects, err := loadWith(observer, spec, nil, cache)
		if err == nil {
			objects.Close()
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("kernel %s refuses the programs: %w", release(), errors.Join(errs...))
}

// checkRecvmsg returns an error unless the fourth parameter of tcp_bpf_recvmsg is
// the flags of recv. Before ec095263a965 it was nonblock: an observer that took that
// for the flags would count peeked bytes as read. A kernel whose BTF lacks the
// function passes, since nothing can attach to it.
func checkRecvmsg(types *btf.Spec) error {
	const name, flags = "tcp_bpf_recvmsg", 3
	found, err := types.AnyTypesByName(name)
	if errors.Is(err, btf.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s in BTF: %w", name, err)
	}
	for _, t := range found {
		f, ok := t.(*btf.Func)
		if !ok {
			continue
		}
		proto, ok := f.Type.(*btf.FuncProto)
		if !ok || len(proto.Params) <= flags || proto.Params[flags].Name != "flags" {
			return fmt.Errorf("%s has the parameters %+v: accepted is one named flags in the fourth place", name, f.Type)
		}
		if integer, ok := btf.UnderlyingType(proto.Params[flags].Type).(*btf.Int); !ok || integer.Size != 4 {
			return fmt.Errorf("%s has flags of type %v: accepted is int", name, proto.Params[flags].Type)
		}
	}
	return nil
}

// loadProbe loads a program whose only call may be unknown to the kernel.
func loadProbe(spec ebpf.ProgramSpec) error {
	spec.License = "GPL"
	// All types may return 0; fexit may return nothing else.
	spec.Instructions = append(spec.Instructions, asm.Mov.Imm(asm.R0, 0), asm.Return())
	prog, err := ebpf.NewProgram(&spec)
	if err != nil {
		return err
	}
	return prog.Close()
}

func probeObservers() error {
	fexit := loadProbe(ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFExit, AttachTo: "tcp_bpf_recvmsg",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, 0),
			asm.StoreMem(asm.RFP, -8, asm.R2, asm.DWord),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -8),
			asm.FnGetFuncRet.Call(),
		},
	})
	if fexit == nil {
		return nil
	}
	return loadProbe(ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "sock_recv_length"})
}

func release() string {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return "of unknown release"
	}
	return unix.ByteSliceToString(uname.Release[:])
}

// KernelVersion is the upstream version that a kernel was built from.
type KernelVersion struct{ Major, Minor, Patch int }

var upstream = regexp.MustCompile(`^(\d+)\.(\d+)(?:\.(\d+))?`)

// parseKernelVersion finds the version in the texts where distributions put it:
// /proc/version_signature (Ubuntu: "Ubuntu 6.8.0-40.40-generic 6.8.12"), uname's
// version (Debian: "#1 SMP ... Debian 6.1.192-2 (date)"), and, where neither does,
// uname's release. A kernel to which a distribution has added fixes counts as the
// version it is based on.
func parseKernelVersion(signature, version, release string) (KernelVersion, error) {
	text := release
	if fields := strings.Fields(signature); len(fields) == 3 {
		text = fields[2]
	} else if _, after, ok := strings.Cut(version, " Debian "); ok {
		text = after
	}
	match := upstream.FindStringSubmatch(text)
	if match == nil {
		return KernelVersion{}, fmt.Errorf("kernel version %q: not understood", text)
	}
	var v KernelVersion
	for i, to := range []*int{&v.Major, &v.Minor, &v.Patch} {
		*to, _ = strconv.Atoi(match[i+1]) // digits, or nothing
	}
	return v, nil
}

// RunningVersion returns the version of the running kernel.
func RunningVersion() (KernelVersion, error) {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return KernelVersion{}, fmt.Errorf("read the kernel's version: %w", err)
	}
	signature, _ := os.ReadFile("/proc/version_signature") // Ubuntu has it
	return parseKernelVersion(string(signature), unix.ByteSliceToString(uname.Version[:]), unix.ByteSliceToString(uname.Release[:]))
}

// MPTCPUnsafe reports whether a kernel of this version corrupts its memory when an
// MPTCP listener accepts a plain TCP connection whose socket is in a SOCKHASH
// (CVE-2025-68227, fixed by fbade4bd08ba). It goes by the version, because a
// measurement would do the damage.
func (v KernelVersion) MPTCPUnsafe() bool {
	if v.Major < 5 || v.Major == 5 && v.Minor < 7 || v.Major > 6 || v.Major == 6 && v.Minor >= 18 {
		return false
	}
	fixed, ok := map[[2]int]int{{5, 10}: 247, {5, 15}: 197, {6, 1}: 159, {6, 6}: 118, {6, 12}: 60, {6, 17}: 10}[[2]int{v.Major, v.Minor}]
	return !ok || v.Patch < fixed
}

// mptcpUnsafe reports the same for the running kernel, and true if its version is unknown.
func mptcpUnsafe() bool {
	v, err := RunningVersion()
	return err != nil || v.MPTCPUnsafe()
}

// RefusesTLS reports whether a kernel of this version refuses kTLS on a socket in a
// SOCKHASH ("tls: reject the combination of TLS and sockmap", for CVE-2026-93824):
// TCP_ULP succeeds there, TLS_TX and TLS_RX fail, and programs encrypt themselves.
// It is false for an unknown version.
func (v KernelVersion) RefusesTLS() bool {
	if v.Major > 7 || v.Major == 7 && v.Minor >= 3 {
		return true
	}
	since, ok := map[[2]int]int{{6, 1}: 189, {6, 12}: 111}[[2]int{v.Major, v.Minor}]
	return ok && v.Patch >= since
}

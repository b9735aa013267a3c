// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"testing"

	"github.com/cilium/ebpf/btf"
)

// TestCheckRecvmsg: only kernels are taken whose tcp_bpf_recvmsg has its flags where
// the observer and the guard look for them.
func TestCheckRecvmsg(t *testing.T) {
	integer := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	size := &btf.Typedef{Name: "size_t", Type: &btf.Int{Name: "unsigned long", Size: 8}}
	pointer := func(to string) btf.Type { return &btf.Pointer{Target: &btf.Struct{Name: to, Size: 8}} }
	sock, msg := btf.FuncParam{Name: "sk", Type: pointer("sock")}, btf.FuncParam{Name: "msg", Type: pointer("msghdr")}
	length := btf.FuncParam{Name: "len", Type: size}
	nonblock := btf.FuncParam{Name: "nonblock", Type: integer}
	flags := btf.FuncParam{Name: "flags", Type: integer}
	addrLen := btf.FuncParam{Name: "addr_len", Type: &btf.Pointer{Target: integer}}
	recvmsg := func(params ...btf.FuncParam) btf.Type {
		return &btf.Func{Name: "tcp_bpf_recvmsg", Type: &btf.FuncProto{Return: integer, Params: params}, Linkage: btf.StaticFunc}
	}
	today := recvmsg(sock, msg, length, flags, addrLen)
	for _, tc := range []struct {
		name  string
		types []btf.Type
		want  bool
	}{
		{"before Linux 5.19", []btf.Type{recvmsg(sock, msg, length, nonblock, flags, addrLen)}, false},
		{"Linux 5.19", []btf.Type{today}, true},
		{"without addr_len", []btf.Type{recvmsg(sock, msg, length, flags)}, true},
		{"behind another parameter", []btf.Type{recvmsg(sock, msg, length, addrLen, flags)}, false},
		{"first", []btf.Type{recvmsg(flags, sock, msg, length)}, false},
		{"too few parameters", []btf.Type{recvmsg(sock, msg, flags)}, false},
		{"flags by another type", []btf.Type{recvmsg(sock, msg, length, btf.FuncParam{Name: "flags", Type: pointer("flags")})}, false},
		{"flags of 64 bits", []btf.Type{recvmsg(sock, msg, length, btf.FuncParam{Name: "flags", Type: size}, addrLen)}, false},
		{"flags by a typedef", []btf.Type{recvmsg(sock, msg, length, btf.FuncParam{Name: "flags", Type: &btf.Typedef{Name: "recv_flags", Type: integer}})}, true},
		{"two of the name, one of them old", []btf.Type{today, recvmsg(sock, msg, length, nonblock, flags, addrLen)}, false},
		{"a type of the name", []btf.Type{&btf.Struct{Name: "tcp_bpf_recvmsg", Size: 8}, today}, true},
		{"none", []btf.Type{integer}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			builder, err := btf.NewBuilder(tc.types, nil)
			if err != nil {
				t.Fatal(err)
			}
			types, err := builder.Spec()
			if err != nil {
				t.Fatal(err)
			}
			if err := checkRecvmsg(types); (err == nil) != tc.want {
				t.Errorf("got error %v, want accepted %v", err, tc.want)
			}
		})
	}
	running, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	if err := checkRecvmsg(running); err != nil {
		t.Errorf("this kernel: %v", err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"

	"github.com/podshunt/podshunt/bpf"
)

var update = flag.Bool("update", false, "write the layout, which has a number of its own, to "+layoutFile)

// layoutFile has the layout that LAYOUT is the number of.
const layoutFile = "testdata/layout.txt"

// TestLayout: whoever changes a map, or a type in one, raises the number of the layout.
func TestLayout(t *testing.T) {
	spec, err := bpf.LoadShortcut()
	if err != nil {
		t.Fatal(err)
	}
	text := &bytes.Buffer{}
	fmt.Fprintf(text, "layout %d\n", layout)
	shared := sharedMaps(spec)
	seen := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(shared)) {
		m := shared[name]
		fmt.Fprintf(text, "\nmap %s %v, key %d, value %d, flags %#x\n", name, m.Type, m.KeySize, m.ValueSize, m.Flags)
		writeType(text, seen, m.Key)
		writeType(text, seen, m.Value)
	}
	want, err := os.ReadFile(layoutFile)
	if err != nil {
		t.Fatal(err)
	}
	number, _, _ := strings.Cut(string(want), "\n")
	switch {
	case text.String() == string(want):
	case number == fmt.Sprintf("layout %d", layout):
		t.Fatalf("maps have changed, and LAYOUT in bpf/flow.h is that of %s: raise it, run `make generate`, then this test with -update", layoutFile)
	case !*update:
		t.Fatalf("%s is not of layout %d: run this test with -update", layoutFile, layout)
	default:
		if err := os.WriteFile(layoutFile, text.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// writeType describes a type, and once the types in it.
func writeType(text *bytes.Buffer, seen map[string]bool, t btf.Type) {
	if t == nil {
		return
	}
	t = btf.UnderlyingType(t)
	if a, ok := t.(*btf.Array); ok {
		writeType(text, seen, a.Type)
		return
	}
	name := typeName(t)
	if seen[name] {
		return
	}
	seen[name] = true
	switch of := t.(type) {
	case *btf.Struct:
		fmt.Fprintf(text, "  %s, %d bytes\n", name, of.Size)
		for _, m := range of.Members {
			fmt.Fprintf(text, "    %d %s %s\n", m.Offset.Bytes(), m.Name, typeName(m.Type))
		}
		for _, m := range of.Members {
			writeType(text, seen, m.Type)
		}
	case *btf.Enum:
		fmt.Fprintf(text, "  %s\n", name)
		for _, v := range of.Values {
			fmt.Fprintf(text, "    %d %s\n", v.Value, v.Name)
		}
	}
}

func typeName(t btf.Type) string {
	switch of := btf.UnderlyingType(t).(type) {
	case *btf.Array:
		return fmt.Sprintf("%s[%d]", typeName(of.Type), of.Nelems)
	case *btf.Struct:
		return "struct " + of.Name
	case *btf.Enum:
		return "enum " + of.Name
	default:
		return of.TypeName()
	}
}

// TestContract: the committed objects have what builds of other layouts read of their pins, by
// the names that are frozen, where this build has it.
func TestContract(t *testing.T) {
	spec, err := bpf.LoadShortcut()
	if err != nil {
		t.Fatal(err)
	}
	value := func(name, of string) *btf.Struct {
		t.Helper()
		s, ok := spec.Maps[name].Value.(*btf.Struct)
		if !ok || s.Name != of {
			t.Fatalf("map %s: got values %v, want struct %s", name, spec.Maps[name].Value, of)
		}
		return s
	}
	settings, flow := value("control", "settings"), value("flows", "flow")
	if m := spec.Maps["sockets"]; checkSockets(m.Type, m.KeySize, m.ValueSize) != nil {
		t.Errorf("got map sockets %v, want a SOCKHASH of 8 bytes by 8 bytes", m)
	}
	for _, name := range []string{"control", "flows", "sockets"} {
		if sharedMaps(spec)[name] == nil {
			t.Errorf("map %s is not pinned", name)
		}
	}
	var s bpf.ShortcutSettings
	var f bpf.ShortcutFlow
	for path, want := range map[string]uintptr{
		"layout":   unsafe.Offsetof(s.Layout),
		"redirect": unsafe.Offsetof(s.Redirect),
	} {
		if got, err := locate(settings, path); err != nil || got.offset != int(want) || got.size != 4 {
			t.Errorf("settings.%s: got %+v, %v; want 4 bytes at %d", path, got, err, want)
		}
	}
	fields, err := locateFlow(flow)
	if err != nil {
		t.Fatal(err)
	}
	if fields.missed[client].size != 4 || !fields.missed[server].signed {
		t.Errorf("got missed %+v, want signed fields of 4 bytes", fields.missed)
	}
	f.Cookie, f.Netns = [2]uint64{11, 12}, [2]uint64{13, 14}
	f.ClientAddr, f.ClientPort, f.ServerAddr, f.ServerPort = [4]uint32{1}, 15, [4]uint32{2}, 16
	for _, tc := range []struct {
		name               string
		end, read          [2]uint64
		missed             [2]int32
		toClient, toServer bool
	}{
		{"all read", [2]uint64{100, 200}, [2]uint64{200, 100}, [2]int32{}, false, false},
		{"unread by the server", [2]uint64{100, 200}, [2]uint64{200, 99}, [2]int32{}, false, true},
		{"unread by the client", [2]uint64{100, 200}, [2]uint64{199, 100}, [2]int32{}, true, false},
		{"missed by the server", [2]uint64{100, 200}, [2]uint64{200, 90}, [2]int32{10, 0}, false, false},
		{"counted twice by the client", [2]uint64{100, 200}, [2]uint64{205, 100}, [2]int32{0, -6}, true, false},
	} {
		for side := range 2 {
			f.Side[side].Sending.RedirectEnd, f.Side[side].Sending.Missed = tc.end[side], tc.missed[side]
			f.Side[side].Receiving.ReadBytes = tc.read[side]
		}
		got := fields.flow(11, unsafe.Slice((*byte)(unsafe.Pointer(&f)), unsafe.Sizeof(f)))
		want := Flow{
			ID: 11, ServerID: 12, ClientNetns: 13, ServerNetns: 14, Joined: true,
			Client: address(f.ClientAddr, 15), OrigDst: address(f.ServerAddr, 16), Server: address(f.ServerAddr, 16),
			ToClient: Direction{Redirected: tc.toClient}, ToServer: Direction{Redirected: tc.toServer},
		}
		if !equalFlows(got, want) || unread(&f, client) != tc.toClient || unread(&f, server) != tc.toServer {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, want)
		}
	}
}

// TestMovedFields: fields are read where another layout has them.
func TestMovedFields(t *testing.T) {
	spec, err := bpf.LoadShortcut()
	if err != nil {
		t.Fatal(err)
	}
	flow := move(spec.Maps["flows"].Value).(*btf.Struct)
	offsets := map[string]int{}
	listOffsets(offsets, flow, "", 0)
	value := make([]byte, flow.Size)
	for path, number := range map[string]uint64{
		"cookie.1": 12, "netns.0": 13, "netns.1": 14, "client_port": 15, "server_port": 16,
		"side.0.sending.redirect_end": 100, "side.1.receiving.read_bytes": 90, "side.0.sending.missed": 9,
		"side.1.sending.redirect_end": 200, "side.0.receiving.read_bytes": 200,
	} {
		at, ok := offsets[path]
		if !ok {
			t.Fatalf("no field %s", path)
		}
		value[at] = byte(number) // the rest stays 0
	}
	fields, err := locateFlow(flow)
	if err != nil {
		t.Fatal(err)
	}
	got := fields.flow(11, value)
	want := Flow{
		ID: 11, ServerID: 12, ClientNetns: 13, ServerNetns: 14, Joined: true,
		Client: address([4]uint32{}, 15), OrigDst: address([4]uint32{}, 16), Server: address([4]uint32{}, 16),
		ToServer: Direction{Redirected: true},
	}
	if !equalFlows(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, missing := range []string{"cookie", "side"} {
		less := *flow
		less.Members = slices.DeleteFunc(slices.Clone(flow.Members), func(m btf.Member) bool { return m.Name == missing })
		if _, err := locateFlow(&less); !errors.Is(err, errUnreadable) {
			t.Errorf("without %s: got %v, want %v", missing, err, errUnreadable)
		}
	}
}

// move turns the fields of structs round, with a gap before each.
func move(t btf.Type) btf.Type {
	switch of := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		moved := &btf.Struct{Name: of.Name}
		for _, m := range slices.Backward(of.Members) {
			m.Type = move(m.Type)
			size, _ := btf.Sizeof(m.Type)
			m.Offset = btf.Bits(8 * (moved.Size + 8))
			moved.Members = append(moved.Members, m)
			moved.Size += 8 + uint32(size+7)/8*8
		}
		return moved
	case *btf.Array:
		return &btf.Array{Index: of.Index, Type: move(of.Type), Nelems: of.Nelems}
	}
	return t
}

func listOffsets(to map[string]int, t btf.Type, path string, at int) {
	switch of := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		for _, m := range of.Members {
			listOffsets(to, m.Type, path+m.Name+".", at+int(m.Offset.Bytes()))
		}
	case *btf.Array:
		size, _ := btf.Sizeof(of.Type)
		for i := range int(of.Nelems) {
			listOffsets(to, of.Type, fmt.Sprintf("%s%d.", path, i), at+i*size)
		}
	default:
		to[strings.TrimSuffix(path, ".")] = at
	}
}

func equalFlows(a, b Flow) bool { return fmt.Sprintf("%+v", a) == fmt.Sprintf("%+v", b) }

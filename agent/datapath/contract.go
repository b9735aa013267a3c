// SPDX-License-Identifier: Apache-2.0

// What every build can do with the pins of any other, whatever their layout.

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/podshunt/podshunt/bpf"
)

// The contract between builds. A build that finds the pins of another one, older or newer,
// turns redirecting off, waits until all redirected bytes are read, takes the sockets out of
// the SOCKHASH and deletes the pins. It knows no type of the other build: it finds the few
// fields that this needs by their names, in the BTF that the kernel keeps with each map, and
// takes all sizes from there. So these names, and what they mean, are never changed:
//
//   - the directory of pins, and those with suffixNew, suffixOld and suffixLock beside it;
//   - the maps control, flows and sockets, with their kinds and keys;
//   - the structs and fields that bpf/flow.h marks FROZEN;
//   - that deleting a link's pin detaches its program.
//
// All else may change, and then the number of the layout is raised. Other pins may come and
// go: what nobody knows is deleted with the rest.

// layout is the number of this build's layout.
const layout = uint32(bpf.ShortcutLayoutLAYOUT)

// formerFlows is what builds before LAYOUT called the map of flows and its struct.
const (
	formerFlows = "pairs"
	formerFlow  = "pair"
)

// errUnreadable says that a map lacks what the contract says.
var errUnreadable = errors.New("it lacks what all versions have in common")

// field is where a value has an integer.
type field struct {
	offset, size int
	signed       bool
}

// of reads the field; a negative number is sign-extended.
func (f field) of(value []byte) uint64 {
	b := value[f.offset : f.offset+f.size]
	switch f.size {
	case 0:
		return 0 // the layout has no such field
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.NativeEndian.Uint16(b))
	case 4:
		n := binary.NativeEndian.Uint32(b)
		if f.signed {
			return uint64(int64(int32(n)))
		}
		return uint64(n)
	default:
		return binary.NativeEndian.Uint64(b)
	}
}

// valueType returns the struct that is a map's value, which has one of the names.
func valueType(m *ebpf.Map, names ...string) (*btf.Struct, error) {
	info, err := m.Info()
	if err != nil {
		return nil, err
	}
	id, ok := info.BTFID()
	if !ok {
		return nil, fmt.Errorf("no BTF: %w", errUnreadable)
	}
	handle, err := btf.NewHandleFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open the BTF: %w", err)
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return nil, fmt.Errorf("read the BTF: %w", err)
	}
	for t, err := range types.All() {
		if err != nil {
			return nil, fmt.Errorf("read the BTF: %w", err)
		}
		if s, ok := t.(*btf.Struct); ok && slices.Contains(names, s.Name) && s.Size == m.ValueSize() {
			return s, nil
		}
	}
	return nil, fmt.Errorf("no struct %s: %w", names[0], errUnreadable)
}

// locate finds a field by a path of names, and of numbers in arrays: side.1.sending.missed.
func locate(t btf.Type, path string) (field, error) {
	var f field
	for _, name := range strings.Split(path, ".") {
		switch in := btf.UnderlyingType(t).(type) {
		case *btf.Struct:
			i := slices.IndexFunc(in.Members, func(m btf.Member) bool { return m.Name == name && m.BitfieldSize == 0 })
			if i < 0 {
				return f, fmt.Errorf("no field %s: %w", path, errUnreadable)
			}
			f.offset += int(in.Members[i].Offset.Bytes())
			t = in.Members[i].Type
		case *btf.Array:
			i, err := strconv.Atoi(name)
			size, err2 := btf.Sizeof(in.Type)
			if err := errors.Join(err, err2); err != nil || i >= int(in.Nelems) {
				return f, fmt.Errorf("no field %s: %w", path, errUnreadable)
			}
			f.offset += i * size
			t = in.Type
		default:
			return f, fmt.Errorf("no field %s: %w", path, errUnreadable)
		}
	}
	number, ok := btf.UnderlyingType(t).(*btf.Int)
	if !ok || !slices.Contains([]uint32{1, 2, 4, 8}, number.Size) {
		return f, fmt.Errorf("field %s is not an integer: %w", path, errUnreadable)
	}
	f.size, f.signed = int(number.Size), number.Encoding == btf.Signed
	return f, nil
}

// layoutOf returns the number of the layout that the pins have whose controls these are: 0
// for those of builds that had none.
func layoutOf(control *ebpf.Map) (uint32, error) {
	settings, err := valueType(control, "settings")
	if err != nil {
		return 0, err
	}
	number, err := locate(settings, "layout")
	if err != nil {
		return 0, nil
	}
	value, err := control.LookupBytes(uint32(0))
	if err != nil {
		return 0, fmt.Errorf("read the controls: %w", err)
	}
	return uint32(number.of(value)), nil
}

// switchOff turns redirecting off by controls of any layout.
func switchOff(control *ebpf.Map) error {
	settings, err := valueType(control, "settings")
	if err != nil {
		return err
	}
	redirect, err := locate(settings, "redirect")
	if err != nil {
		return err
	}
	value, err := control.LookupBytes(uint32(0))
	if err != nil {
		return fmt.Errorf("read the controls: %w", err)
	}
	clear(value[redirect.offset : redirect.offset+redirect.size])
	if err := control.Put(uint32(0), value); err != nil {
		return fmt.Errorf("write the controls: %w", err)
	}
	return nil
}

// flowFields are where a value of the map of flows has what is read of it, by side.
type flowFields struct {
	cookie, redirectEnd, missed, read [2]field
	// For people, and to reset a connection. Their size is 0 if the layout lacks them.
	netns, ports [2]field
	addresses    [2]field // the first of four words
}

func locateFlow(flow *btf.Struct) (f flowFields, err error) {
	optional := func(path string) field {
		found, err := locate(flow, path)
		if err != nil {
			return field{}
		}
		return found
	}
	need := func(path string) field {
		found, missing := locate(flow, path)
		err = errors.Join(err, missing)
		return found
	}
	for side, name := range []string{"client", "server"} {
		f.cookie[side] = need(fmt.Sprintf("cookie.%d", side))
		f.redirectEnd[side] = need(fmt.Sprintf("side.%d.sending.redirect_end", side))
		f.read[side] = need(fmt.Sprintf("side.%d.receiving.read_bytes", side))
		f.missed[side] = optional(fmt.Sprintf("side.%d.sending.missed", side)) // builds before LAYOUT had none
		f.netns[side] = optional(fmt.Sprintf("netns.%d", side))
		f.ports[side] = optional(name + "_port")
		if last := optional(name + "_addr.3"); last.size == 4 {
			f.addresses[side] = optional(name + "_addr.0")
		}
	}
	return f, err
}

// flow returns what is known of a flow of any layout.
func (f *flowFields) flow(id uint64, value []byte) Flow {
	redirected := func(side int) bool {
		toward := 1 - side
		return f.redirectEnd[toward].of(value) > f.read[side].of(value)+f.missed[toward].of(value)
	}
	end := func(side int) netip.AddrPort {
		words := f.addresses[side]
		if words.size == 0 {
			return netip.AddrPort{}
		}
		b := [16]byte(value[words.offset:])
		return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), uint16(f.ports[side].of(value)))
	}
	flow := Flow{
		ID: id, ServerID: f.cookie[server].of(value), ClientNetns: f.netns[client].of(value), ServerNetns: f.netns[server].of(value),
		Client: end(int(client)), Server: end(int(server)), OrigDst: end(int(server)),
	}
	flow.Joined = flow.ServerID != 0
	flow.ToClient.Redirected, flow.ToServer.Redirected = redirected(int(client)), redirected(int(server))
	return flow
}

// flowsOf reads the map of flows of any layout.
func flowsOf(m *ebpf.Map) ([]Flow, error) {
	record, err := valueType(m, "flow", formerFlow)
	if err != nil {
		return nil, err
	}
	fields, err := locateFlow(record)
	if err != nil {
		return nil, err
	}
	var (
		flows  []Flow
		cursor ebpf.MapBatchCursor
		keys   = make([]uint64, batch)
		values = reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(m.ValueSize()), reflect.TypeFor[byte]())), batch, batch)
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values.Interface(), nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("read the flows map: %w", err)
		}
		for i := range n {
			flows = append(flows, fields.flow(keys[i], values.Index(i).Bytes()))
		}
		if err != nil {
			return flows, nil
		}
	}
}

// openAny opens the maps that every layout has, under the names that this build gives them.
// Those that are gone, or that nobody can read, are not among them.
func (d *Datapath) openAny(dir string) (map[string]*ebpf.Map, error) {
	found := map[string]*ebpf.Map{}
	for _, m := range []struct {
		name, former string
		check        func(*ebpf.Map) error
	}{
		{bpf.ShortcutMapControl, "", checkControl},
		{bpf.ShortcutMapFlows, formerFlows, checkFlows},
		{bpf.ShortcutMapSockets, "", func(m *ebpf.Map) error { return checkSockets(m.Type(), m.KeySize(), m.ValueSize()) }},
	} {
		opened, err := openPin(dir, m.name)
		if errors.Is(err, errNoMap) && m.former != "" {
			opened, err = openPin(dir, m.former)
		}
		if err == nil {
			if err = m.check(opened); err != nil {
				err = errors.Join(fmt.Errorf("map %s: %w", m.name, err), opened.Close())
			}
		}
		switch {
		case err == nil:
			found[m.name] = opened
		case errors.Is(err, errNoMap), errors.Is(err, errUnreadable):
			d.log.Warn("a map cannot be used", "err", err)
		default:
			closeMaps(found)
			return nil, err
		}
	}
	return found, nil
}

func checkControl(m *ebpf.Map) error {
	if m.Type() != ebpf.Array || m.KeySize() != 4 {
		return errUnreadable
	}
	settings, err := valueType(m, "settings")
	if err == nil {
		_, err = locate(settings, "redirect")
	}
	return err
}

func checkFlows(m *ebpf.Map) error {
	if m.Type() != ebpf.Hash || m.KeySize() != 8 {
		return errUnreadable
	}
	record, err := valueType(m, "flow", formerFlow)
	if err == nil {
		_, err = locateFlow(record)
	}
	return err
}

func checkSockets(kind ebpf.MapType, key, value uint32) error {
	if kind != ebpf.SockHash || key != 8 || value != 8 {
		return errUnreadable
	}
	return nil
}

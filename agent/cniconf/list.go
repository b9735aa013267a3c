// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/containernetworking/cni/libcni"

	"github.com/podshunt/podshunt/api"
)

// errAlone says that a list holds no plugin but ours: without it the list would
// be empty, which no runtime accepts, and with it there is nothing to chain to.
var errAlone = errors.New(`no plugin besides ` + api.PluginType + ` in "plugins"`)

// entry is an element of "plugins", at list[start:end].
type entry struct {
	// after is where the bytes between the delimiter before the entry and the entry start.
	after, start, end int
	ours              bool
}

// Insert returns the configuration list with the section as the last of its
// plugins and no other entry of ours. All other bytes stay as they are; if the
// section is there already, however it is formatted, all of them do. The error
// says why libcni does not accept the list, or errAlone.
func Insert(list, section []byte) ([]byte, error) {
	entries, err := parse(list)
	if err != nil {
		return nil, err
	}
	first := slices.IndexFunc(entries, func(e entry) bool { return e.ours })
	last := entries[len(entries)-1]
	if first == len(entries)-1 && first > 0 && equalJSON(list[last.start:last.end], section) {
		return list, nil
	}
	rest, err := Remove(list)
	if err != nil {
		return nil, err
	}
	if entries, err = parse(rest); err != nil {
		return nil, err
	}
	last = entries[len(entries)-1]
	// What separates the last entry from its delimiter separates ours: a line
	// break and an indentation, or nothing.
	inserted := slices.Concat([]byte(","), rest[last.after:last.start], section)
	return checked(list, slices.Insert(bytes.Clone(rest), last.end, inserted...))
}

// Remove returns the configuration list without the entries of ours. It undoes
// Insert to the byte. Errors are those of Insert.
func Remove(list []byte) ([]byte, error) {
	entries, err := parse(list)
	if err != nil {
		return nil, err
	}
	others := 0
	for _, e := range entries {
		if !e.ours {
			others++
		}
	}
	switch others {
	case len(entries):
		return list, nil
	case 0:
		return nil, errAlone
	}
	rest := bytes.Clone(list)
	// From the end, so that the offsets before it stay right.
	for i := len(entries) - 1; i >= 0; i-- {
		if !entries[i].ours {
			continue
		}
		if slices.ContainsFunc(entries[:i], func(e entry) bool { return !e.ours }) {
			rest = slices.Delete(rest, entries[i-1].end, entries[i].end)
		} else {
			// Everything before it goes as well, and the next entry takes its place.
			rest = slices.Delete(rest, entries[i].start, entries[i+1].start)
		}
	}
	return checked(list, rest)
}

// Wrap returns the configuration list that a lone network configuration stands
// for, with the section added. Values, their order and their notation are those
// of the configuration; its white space is not kept.
func Wrap(conf, section []byte) ([]byte, error) {
	parsed, err := libcni.NetworkPluginConfFromBytes(conf)
	if err != nil {
		return nil, err
	}
	name, err1 := json.Marshal(parsed.Network.Name)
	version, err2 := json.Marshal(parsed.Network.CNIVersion)
	var plugin bytes.Buffer
	err3 := json.Indent(&plugin, bytes.TrimSpace(conf), "    ", "  ")
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	list := fmt.Appendf(nil, "{\n  \"cniVersion\": %s,\n  \"name\": %s,\n  \"plugins\": [\n    %s\n  ]\n}\n", version, name, &plugin)
	if !wraps(list, conf) {
		return nil, errors.New("as a list it would not be the same network")
	}
	return Insert(list, section)
}

// wraps tells whether a list, apart from entries of ours, is the network that a
// runtime makes of the lone configuration.
func wraps(list, conf []byte) bool {
	parsed, err := libcni.NetworkPluginConfFromBytes(conf)
	if err != nil {
		return false
	}
	want, err1 := libcni.ConfListFromConf(parsed) //nolint:staticcheck // deprecated, but what containerd and CRI-O call
	got, err2 := libcni.ConfListFromBytes(list)
	return err1 == nil && err2 == nil && sameNetwork(want, got)
}

// holdsOurs tells whether an entry of ours is in the list.
func holdsOurs(list []byte) bool {
	entries, err := parse(list)
	return err == nil && slices.ContainsFunc(entries, func(e entry) bool { return e.ours })
}

// firstPlugin returns the type of the plugin that makes the interface in a valid
// file: the first that is not ours, "" where there is none.
func firstPlugin(f file) string {
	if !f.isList() {
		conf, err := libcni.NetworkPluginConfFromBytes(f.data)
		if err != nil {
			return ""
		}
		return conf.Network.Type
	}
	list, err := libcni.ConfListFromBytes(f.data)
	if err != nil {
		return ""
	}
	for _, p := range list.Plugins {
		if !isOurs(p.Bytes) {
			return p.Network.Type
		}
	}
	return ""
}

// parse returns where the plugins of a list are, as libcni would take them: of
// equal keys the last one counts, keys are compared decoded and with their case.
// Without error there is at least one.
func parse(list []byte) ([]entry, error) {
	if _, err := libcni.ConfListFromBytes(list); err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(list))
	if _, err := d.Token(); err != nil { // {
		return nil, err
	}
	var entries []entry
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		if key == "plugins" {
			if entries, err = elements(value, int(d.InputOffset())-len(value)); err != nil {
				return nil, err
			}
		}
	}
	if len(entries) == 0 {
		return nil, errors.New(`no "plugins"`)
	}
	return entries, nil
}

// elements returns the elements of an array that starts at list[at], and none
// of another value: then an equal key follows, or libcni refuses the list.
func elements(array []byte, at int) ([]entry, error) {
	d := json.NewDecoder(bytes.NewReader(array))
	if delim, err := d.Token(); err != nil || delim != json.Delim('[') {
		return nil, err
	}
	var entries []entry
	after := int(d.InputOffset())
	for d.More() {
		var element json.RawMessage
		if err := d.Decode(&element); err != nil {
			return nil, err
		}
		end := int(d.InputOffset())
		start := end - len(element)
		if len(entries) > 0 {
			after += bytes.IndexByte(array[after:start], ',') + 1
		}
		entries = append(entries, entry{after: at + after, start: at + start, end: at + end, ours: isOurs(element)})
		after = end
	}
	return entries, nil
}

func isOurs(plugin []byte) bool {
	var keys map[string]any
	return json.Unmarshal(plugin, &keys) == nil && keys["type"] == api.PluginType
}

// checked returns the list unless libcni takes it for another network than
// before, entries of ours apart. No such list is ever written.
func checked(before, list []byte) ([]byte, error) {
	want, err1 := libcni.ConfListFromBytes(before)
	got, err2 := libcni.ConfListFromBytes(list)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("check changed list: %w", err)
	}
	if !sameNetwork(want, got) {
		return nil, errors.New("check changed list: another network than before")
	}
	return list, nil
}

func sameNetwork(a, b *libcni.NetworkConfigList) bool {
	return a.Name == b.Name && a.CNIVersion == b.CNIVersion &&
		a.DisableCheck == b.DisableCheck && a.DisableGC == b.DisableGC && a.LoadOnlyInlinedPlugins == b.LoadOnlyInlinedPlugins &&
		slices.EqualFunc(others(a), others(b), bytes.Equal)
}

// others returns the plugins that are not ours, in the form that libcni gives
// all of them.
func others(list *libcni.NetworkConfigList) [][]byte {
	var plugins [][]byte
	for _, p := range list.Plugins {
		if !isOurs(p.Bytes) {
			plugins = append(plugins, p.Bytes)
		}
	}
	return plugins
}

func equalJSON(a, b []byte) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}

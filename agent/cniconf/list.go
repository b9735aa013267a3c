// SPDX-License-Identifier: Apache-2.0

// A conflist, into which the plugin's entry goes with all other bytes left as they are.

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

// madeOfKey marks a list by Wrap: its value is the file name of the configuration that
// the list was made of. Runtimes ignore keys that they do not know.
const madeOfKey = "podshunt.io/made-of"

// errAlone says that a list has no plugin but ours. Without ours it would be empty,
// which no runtime accepts; with it there is nothing to chain to.
var errAlone = errors.New(`no plugin besides ` + api.PluginType + ` in "plugins"`)

// entry is an element of "plugins", at list[start:end].
type entry struct {
	// after is the offset behind the delimiter before the entry, where its white space
	// starts.
	after, start, end int
	ours              bool
}

// Insert returns the configuration list with the section as one of its plugins,
// behind the one that makes the interface, and with no other entry of ours. An entry
// that is in place already keeps it, as others may want to be the last, too; a new
// one goes to the end. All other bytes stay as they are. If the section is there
// already, in whatever format, nothing changes. It returns errAlone, or an error
// that says why libcni does not accept the list.
func Insert(list, section []byte) ([]byte, error) {
	entries, err := parse(list)
	if err != nil {
		return nil, err
	}
	if at := slices.IndexFunc(entries, isOurEntry); at > 0 && !slices.ContainsFunc(entries[at+1:], isOurEntry) {
		e := entries[at]
		if equalJSON(list[e.start:e.end], section) {
			return list, nil
		}
		return checked(list, slices.Concat(list[:e.start], section, list[e.end:]))
	}
	rest, err := Remove(list)
	if err != nil {
		return nil, err
	}
	if entries, err = parse(rest); err != nil {
		return nil, err
	}
	last := entries[len(entries)-1]
	// The new entry gets the white space before the last one: a line break and
	// an indentation, or none.
	inserted := slices.Concat([]byte(","), rest[last.after:last.start], section)
	return checked(list, slices.Insert(bytes.Clone(rest), last.end, inserted...))
}

func isOurEntry(e entry) bool { return e.ours }

func isOther(e entry) bool { return !e.ours }

// Remove returns the configuration list without our entries. It undoes Insert to the
// byte, and returns the same errors.
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
	// From the end, so that earlier offsets stay right.
	for i := len(entries) - 1; i >= 0; i-- {
		if !entries[i].ours {
			continue
		}
		if slices.ContainsFunc(entries[:i], isOther) {
			rest = slices.Delete(rest, entries[i-1].end, entries[i].end)
		} else {
			// Everything before it goes as well, and the next entry takes its place.
			rest = slices.Delete(rest, entries[i].start, entries[i+1].start)
		}
	}
	return checked(list, rest)
}

// Wrap makes a configuration list of the lone network configuration in the file
// called name, and adds the section. It keeps the configuration's values, their
// order and their notation, but not its white space.
func Wrap(conf, section []byte, name string) ([]byte, error) {
	return wrap(conf, section, name, nil)
}

// Rewrap updates a list by Wrap after its configuration or the section has changed.
// It keeps plugins that others have put into the list. If nothing has changed, it
// returns the list byte for byte.
func Rewrap(list, conf, section []byte, name string) ([]byte, error) {
	if wraps(list, conf) {
		return Insert(list, section)
	}
	return wrap(conf, section, name, chained(list))
}

// wrap makes a list of a configuration and the text after it in "plugins".
func wrap(conf, section []byte, name string, after []byte) ([]byte, error) {
	parsed, err := libcni.NetworkPluginConfFromBytes(conf)
	if err != nil {
		return nil, err
	}
	network, err1 := json.Marshal(parsed.Network.Name)
	version, err2 := json.Marshal(parsed.Network.CNIVersion)
	origin, err3 := json.Marshal(name)
	var plugin bytes.Buffer
	err4 := json.Indent(&plugin, bytes.TrimSpace(conf), "    ", "  ")
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, err
	}
	list := fmt.Appendf(nil, "{\n  \"cniVersion\": %s,\n  \"name\": %s,\n  \"%s\": %s,\n  \"plugins\": [\n    %s%s\n  ]\n}\n",
		version, network, madeOfKey, origin, &plugin, after)
	if !wraps(list, conf) {
		return nil, errors.New("as a list it would not be the same network")
	}
	return Insert(list, section)
}

// chained returns the text of the plugins that others have put into a list by
// Wrap, with the comma before it.
func chained(list []byte) []byte {
	rest, err := Remove(list)
	if err != nil {
		return nil
	}
	entries, err := parse(rest)
	if err != nil {
		return nil
	}
	return rest[entries[0].end:entries[len(entries)-1].end]
}

// wraps reports whether a list is the network that a runtime makes of the lone
// configuration, apart from our entries and from plugins behind the first.
func wraps(list, conf []byte) bool {
	parsed, err := libcni.NetworkPluginConfFromBytes(conf)
	if err != nil {
		return false
	}
	want, err1 := libcni.ConfListFromConf(parsed) //nolint:staticcheck // deprecated, but what containerd and CRI-O call
	got, err2 := libcni.ConfListFromBytes(list)
	if err1 != nil || err2 != nil {
		return false
	}
	first := others(got)
	return sameNetwork(want, got) && len(first) > 0 && slices.EqualFunc(others(want), first[:1], bytes.Equal)
}

// holdsOurs reports whether an entry of ours is in the list.
func holdsOurs(list []byte) bool {
	entries, err := parse(list)
	return err == nil && slices.ContainsFunc(entries, isOurEntry)
}

// inPlace reports whether an entry of ours is behind the plugin that makes the
// interface.
func inPlace(list []byte) bool {
	entries, err := parse(list)
	return err == nil && !entries[0].ours && slices.ContainsFunc(entries, isOurEntry)
}

// firstPlugin returns the type of the plugin that makes the interface in a valid
// file: the first that is not ours, or "" if there is none.
func firstPlugin(f file) string {
	if !f.isList() {
		conf, err := libcni.NetworkPluginConfFromBytes(f.data)
		if err != nil {
			return ""
		}
		return conf.Network.Type
	}
	if plugins := pluginsOf(f); len(plugins) > 0 {
		return plugins[0]
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

// checked returns the list, or an error if libcni takes it for another network than
// before, our entries apart. Such a list must never be written.
func checked(before, list []byte) ([]byte, error) {
	want, err1 := libcni.ConfListFromBytes(before)
	got, err2 := libcni.ConfListFromBytes(list)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("check changed list: %w", err)
	}
	if !sameNetwork(want, got) || !slices.EqualFunc(others(want), others(got), bytes.Equal) {
		return nil, errors.New("check changed list: another network than before")
	}
	return list, nil
}

// sameNetwork compares everything but the plugins.
func sameNetwork(a, b *libcni.NetworkConfigList) bool {
	return a.Name == b.Name && a.CNIVersion == b.CNIVersion &&
		a.DisableCheck == b.DisableCheck && a.DisableGC == b.DisableGC && a.LoadOnlyInlinedPlugins == b.LoadOnlyInlinedPlugins
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

// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

const testSection = `{"type":"podshunt"}`

// checkInsert wants of every list that Insert accepts: libcni accepts it with
// our entry, which is there once and not first; it is where it was if that was
// behind another, and else the last; a second insert changes nothing; and what is
// left without our entry does not depend on whether it was inserted.
func checkInsert(t *testing.T, list []byte) (accepted bool) {
	t.Helper()
	inserted, err := Insert(list, []byte(testSection))
	if err != nil {
		return false
	}
	before, err1 := libcni.ConfListFromBytes(list)
	parsed, err2 := libcni.ConfListFromBytes(inserted)
	if err1 != nil || err2 != nil {
		t.Fatalf("lists %q, inserted %q: errors %v and %v", list, inserted, err1, err2)
	}
	if got, want := ourPlaces(parsed), ourPlaces(before); len(want) != 1 || want[0] == 0 {
		if want := []int{len(parsed.Plugins) - 1}; !slices.Equal(got, want) || want[0] == 0 {
			t.Errorf("got our entry at %v of %q, want it at the end", got, inserted)
		}
	} else if !slices.Equal(got, want) {
		t.Errorf("got our entry at %v of %q, want it to stay at %v", got, inserted, want)
	}
	if ours := parsed.Plugins[ourPlaces(parsed)[0]]; !equalJSON(ours.Bytes, []byte(testSection)) {
		t.Errorf("got our plugin %s, want %s", ours.Bytes, testSection)
	}
	if again, err := Insert(inserted, []byte(testSection)); err != nil || !bytes.Equal(again, inserted) {
		t.Errorf("second insert: got %q and error %v, want %q", again, err, inserted)
	}
	want := list
	if holdsOurs(list) {
		if want, err = Remove(list); err != nil {
			t.Fatalf("remove from %q: %v", list, err)
		}
	}
	if got, err := Remove(inserted); err != nil || !bytes.Equal(got, want) {
		t.Errorf("remove after insert: got %q and error %v, want %q", got, err, want)
	}
	return true
}

// ourPlaces returns where our entries are among the plugins.
func ourPlaces(list *libcni.NetworkConfigList) []int {
	var places []int
	for i, p := range list.Plugins {
		if isOurs(p.Bytes) {
			places = append(places, i)
		}
	}
	return places
}

func addShapes(f *testing.F) {
	paths, err := filepath.Glob("testdata/shapes/*/before/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
}

func FuzzRemoveInsert(f *testing.F) {
	addShapes(f)
	f.Fuzz(func(t *testing.T, list []byte) { checkInsert(t, list) })
}

// TestRandomLists has lists that are always valid, with and without entries of ours.
func TestRandomLists(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[random.IntN(len(from))] }
	space := func() string { return pick("", "", " ", "\n  ", "\r\n\t", "\t ") }
	for range 300 {
		var plugins []string
		others := 0
		for range 1 + random.IntN(5) {
			plugin := pick(
				`{"type":"podshunt"}`, "{ \"type\" :\n\"podshunt\" }", `{"type":"podshunt","agentTimeout":"1s"}`,
				`{"type":"a"}`, `{"x":[{"type":"podshunt"},"]"],"type":"b"}`, `{"type":"podshunt","type":"c","n":1e99}`,
			)
			if !isOurs([]byte(plugin)) {
				others++
			}
			plugins = append(plugins, space()+plugin+space())
		}
		list := space() + `{"name":"n"` + pick("", `,"plugins":[{"type":"z"},{"type":"podshunt"}]`, `,"x":{"plugins":[]}`) + "," + space() +
			pick(`"plugins"`, `"plu\u0067ins"`) + space() + ":" + space() + "[" + strings.Join(plugins, ",") + "]" + space() +
			pick("", `,"Plugins":[]`) + "}" + space()
		if accepted := checkInsert(t, []byte(list)); accepted != (others > 0) {
			t.Errorf("got accepted %t for %q, want %t", accepted, list, others > 0)
		}
		if t.Failed() {
			return
		}
	}
}

// withPlugin is what another program makes of a list by Wrap that chains itself into it.
func withPlugin(list []byte, plugin string) []byte {
	const end = "\n  ]\n}\n"
	return fmt.Appendf(nil, "%s,\n    %s%s", bytes.TrimSuffix(list, []byte(end)), plugin, end)
}

// FuzzWrap wants the list of a lone configuration to be the network that a
// runtime makes of it, and to become nothing else by another look, by the way
// somebody formats it, or by what others chain into it.
func FuzzWrap(f *testing.F) {
	addShapes(f)
	f.Fuzz(func(t *testing.T, conf []byte) {
		list, err := Wrap(conf, []byte(testSection), "10-a.conf")
		if err != nil {
			return
		}
		if made := (file{path: "10-a" + madeEnding, data: list}); !wraps(list, conf) || !holdsOurs(list) || !made.isMade() {
			t.Errorf("got %q of %q", list, conf)
		}
		checkInsert(t, list)
		changed := withPlugin(list, `{"type":"c"}`)
		for what, list := range map[string][]byte{"list": list, "with another plugin": changed} {
			if again, err := Rewrap(list, conf, []byte(testSection), "10-a.conf"); err != nil || !bytes.Equal(again, list) {
				t.Errorf("%s again: got %q and error %v, want %q", what, again, err, list)
			}
		}
		const other = `{"cniVersion":"1.0.0","name":"other","type":"d"}`
		moved, err := Rewrap(changed, []byte(other), []byte(testSection), "10-a.conf")
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := libcni.ConfListFromBytes(moved)
		if err != nil || !wraps(moved, []byte(other)) || !holdsOurs(moved) || len(others(parsed)) != 2 || string(others(parsed)[1]) != `{"type":"c"}` {
			t.Errorf("of another configuration: got %q and error %v", moved, err)
		}
	})
}

// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

const testSection = `{"type":"podshunt"}`

// checkInsert wants of every list that Insert accepts: libcni accepts it with
// our entry, which is the last plugin; a second insert changes nothing; and what
// is left without our entry does not depend on whether it was inserted.
func checkInsert(t *testing.T, list []byte) (accepted bool) {
	t.Helper()
	inserted, err := Insert(list, []byte(testSection))
	if err != nil {
		return false
	}
	parsed, err := libcni.ConfListFromBytes(inserted)
	if err != nil {
		t.Fatalf("inserted list %q: %v", inserted, err)
	}
	if last := parsed.Plugins[len(parsed.Plugins)-1]; len(parsed.Plugins) < 2 || !equalJSON(last.Bytes, []byte(testSection)) {
		t.Errorf("got last plugin %s, want %s after others", last.Bytes, testSection)
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

// FuzzWrap wants the list of a lone configuration to be the network that a
// runtime makes of it.
func FuzzWrap(f *testing.F) {
	addShapes(f)
	f.Fuzz(func(t *testing.T, conf []byte) {
		list, err := Wrap(conf, []byte(testSection))
		if err != nil {
			return
		}
		if !wraps(list, conf) || !holdsOurs(list) {
			t.Errorf("got %q of %q", list, conf)
		}
		checkInsert(t, list)
	})
}

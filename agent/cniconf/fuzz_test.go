// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"bytes"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

const testSection = `{"type":"podshunt"}`

// FuzzRemoveInsert wants of every list that libcni accepts: it is accepted with
// our entry, which is the last plugin; a second insert changes nothing; and what
// is left without our entry does not depend on whether it was inserted.
func FuzzRemoveInsert(f *testing.F) {
	f.Fuzz(func(t *testing.T, list []byte) {
		inserted, err := Insert(list, []byte(testSection))
		if err != nil {
			return
		}
		parsed, err := libcni.ConfListFromBytes(inserted)
		if err != nil {
			t.Fatalf("inserted list: %v", err)
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
				t.Fatalf("remove: %v", err)
			}
		}
		if got, err := Remove(inserted); err != nil || !bytes.Equal(got, want) {
			t.Errorf("remove after insert: got %q and error %v, want %q", got, err, want)
		}
	})
}

// FuzzWrap wants the list of a lone configuration to be the network that a
// runtime makes of it.
func FuzzWrap(f *testing.F) {
	f.Fuzz(func(t *testing.T, conf []byte) {
		list, err := Wrap(conf, []byte(testSection))
		if err != nil {
			return
		}
		if !wraps(list, conf) || !holdsOurs(list) {
			t.Errorf("got %q of %q", list, conf)
		}
	})
}

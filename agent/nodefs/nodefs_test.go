// SPDX-License-Identifier: Apache-2.0

package nodefs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRoot reads files of a node by links that lead elsewhere outside of the node.
func TestRoot(t *testing.T) {
	dir := t.TempDir()
	root := Root(dir)
	if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "nix/store"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "nix/store/a.conf"), []byte("a"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"absolute": "/nix/store/a.conf", "relative": "../nix/store/a.conf", "beyond": "../../../../nix/store/a.conf", "outside": filepath.Join(dir, "nix/store/a.conf"),
	} {
		if err := os.Symlink(target, filepath.Join(dir, "etc", name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct{ path, want string }{
		{"/nix/store/a.conf", "a"},
		{"/etc/absolute", "a"},
		{"/etc/relative", "a"},
		{"/etc/beyond", "a"},
		{"/etc/outside", ""},
		{"/etc/missing", ""},
	} {
		got, err := root.ReadFile(tc.path)
		if string(got) != tc.want || (err == nil) != (tc.want != "") || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("ReadFile(%s): got %q and error %v, want %q", tc.path, got, err, tc.want)
		}
		if _, err := root.Stat(tc.path); (err == nil) != (tc.want != "") {
			t.Errorf("Stat(%s): got error %v", tc.path, err)
		}
	}
	names, err := root.ReadDir("/etc")
	if diff := cmp.Diff([]string{"absolute", "beyond", "outside", "relative"}, names); err != nil || diff != "" {
		t.Errorf("got error %v, and names (-want +got):\n%s", err, diff)
	}
}

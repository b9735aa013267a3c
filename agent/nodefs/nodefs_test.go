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

// TestResolve follows links as the node does, and gives the path for whoever is not on it.
func TestResolve(t *testing.T) {
	root := Root(t.TempDir())
	at := func(path string) string { return filepath.Join(string(root), path) }
	if err := errors.Join(
		os.MkdirAll(at("var/opt/cni"), 0o755), os.Symlink("/var/opt", at("opt")), os.Symlink("8136", at("var/current")), os.Mkdir(at("var/8136"), 0o755),
		os.Symlink("../../../../etc", at("var/out")), os.Mkdir(at("etc"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/": "", "/var": "var", "/opt/cni/": "var/opt/cni", "/var/current": "var/8136", "/var/out": "etc", "/var/../opt": "var/opt",
	} {
		if got, err := root.Resolve(path); err != nil || got != filepath.Clean(at(want)) {
			t.Errorf("%s: got %s and error %v, want %s", path, got, err, at(want))
		}
	}
	if _, err := root.Resolve("/opt/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got error %v for what is not there", err)
	}
	if got, err := root.ReadOnly("/opt/cni"); got || err != nil {
		t.Errorf("got %v and error %v for a directory that can be written to", got, err)
	}
	if _, err := root.ReadOnly("/opt/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got error %v for what is not there", err)
	}
}

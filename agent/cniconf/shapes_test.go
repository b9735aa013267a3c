// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

var update = flag.Bool("update", false, "write what is installed to testdata/shapes/*/after")

// TestShapes installs into the directories of common networks: they become what
// is in "after", and after an uninstall are what is in "before".
func TestShapes(t *testing.T) {
	shapes, err := filepath.Glob("testdata/shapes/*")
	if err != nil || len(shapes) == 0 {
		t.Fatalf("got shapes %v and error %v, want some", shapes, err)
	}
	for _, shape := range shapes {
		t.Run(filepath.Base(shape), func(t *testing.T) {
			k := newTestInstaller(t)
			copyDir(t, filepath.Join(shape, "before"), k.cfg.ConfDir)
			before := snapshot(t, k.cfg.ConfDir)
			files, err := readDir(k.cfg.ConfDir)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(k.cfg.BinDir, firstPlugin(files[0])), "")
			k.Reconcile()
			if state := k.State(); !state.Installed || state.Error != "" {
				t.Fatalf("got state %+v, want installed", state)
			}
			after := filepath.Join(shape, "after")
			if *update {
				if err := os.RemoveAll(after); err != nil {
					t.Fatal(err)
				}
				if err := os.CopyFS(after, os.DirFS(k.cfg.ConfDir)); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(contents(t, after), contents(t, k.cfg.ConfDir)); diff != "" {
				t.Errorf("installed (-want +got):\n%s", diff)
			}
			if files, err = readDir(k.cfg.ConfDir); err != nil {
				t.Fatal(err)
			}
			if !files[0].isList() || files[0].err != nil || !holdsOurs(files[0].data) || files[0].path != k.State().Conflist {
				t.Errorf("got first file %s with error %v, want a list with our entry at %s", files[0].path, files[0].err, k.State().Conflist)
			}

			installed := snapshot(t, k.cfg.ConfDir)
			k.Reconcile()
			again := New(k.cfg)
			again.Reconcile()
			if diff := cmp.Diff(installed, snapshot(t, k.cfg.ConfDir)); diff != "" {
				t.Errorf("kept, and by another agent (-want +got):\n%s", diff)
			}

			if _, err := k.Uninstall(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(withoutTimes(before), withoutTimes(snapshot(t, k.cfg.ConfDir))); diff != "" {
				t.Errorf("uninstalled (-want +got):\n%s", diff)
			}
			k.Reconcile()
			if state := k.State(); state.Installed || state.Error == "" {
				t.Errorf("got state %+v, want uninstalled", state)
			}
			if diff := cmp.Diff(withoutTimes(before), withoutTimes(snapshot(t, k.cfg.ConfDir))); diff != "" {
				t.Errorf("kept after uninstall (-want +got):\n%s", diff)
			}
		})
	}
}

// stamped is a file with what else of it must not change.
type stamped struct {
	Content  string
	Mode     os.FileMode
	Uid, Gid uint32
	Modified int64 // ns since 1970
	Inode    uint64
}

func withoutTimes(files map[string]stamped) map[string]stamped {
	result := map[string]stamped{}
	for name, f := range files {
		f.Modified, f.Inode = 0, 0
		result[name] = f
	}
	return result
}

func contents(t testing.TB, dir string) map[string]string {
	t.Helper()
	result := map[string]string{}
	for name, f := range snapshot(t, dir) {
		result[name] = f.Content
	}
	return result
}

// copyDir gives the copies a mode that no umask makes, and an owner if it may.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	for name, content := range contents(t, from) {
		writeFile(t, filepath.Join(to, name), content)
		if err := os.Chmod(filepath.Join(to, name), 0o604); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			if err := os.Chown(filepath.Join(to, name), 1234, 4321); err != nil {
				t.Fatal(err)
			}
		}
	}
}

var testConf = api.PluginConf{AgentSocket: api.Socket, AgentTimeout: api.PluginTimeout, AttachmentsDir: api.AttachmentsDir}

// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const (
	bareList  = `{"cniVersion":"1.1.0","name":"net"}`
	ourDropIn = `{"type":"podshunt"}` + "\n"
)

// TestDropIn installs into lists of CNI 1.1 whose plugins are files in the directory of the
// network's name.
func TestDropIn(t *testing.T) {
	for _, tc := range []struct {
		name     string
		before   map[string]string
		after    map[string]string // what is installed beside that, or instead of it
		conflist string            // what has our entry
		err      string
		plugins  []string // of the first list, as libcni runs them
	}{
		{
			name:     "plugins as files",
			before:   map[string]string{"10-net.conflist": bareList, "net/10-a.conf": `{"type":"a"}`, "net/20-portmap.conf": `{"type":"portmap"}`, "net/notes": "x"},
			after:    map[string]string{"net/zz-podshunt.conf": ourDropIn},
			conflist: "net/zz-podshunt.conf", plugins: []string{"a", "portmap", "podshunt"},
		},
		{
			name:     "another one wants to be the last",
			before:   map[string]string{"10-net.conflist": bareList, "net/10-a.conf": `{"type":"a"}`, "net/zzz-mesh.conf": `{"type":"mesh"}`},
			after:    map[string]string{"net/zz-podshunt.conf": ourDropIn},
			conflist: "net/zz-podshunt.conf", plugins: []string{"a", "podshunt", "mesh"},
		},
		{
			name:   "the interface's plugin would come after ours",
			before: map[string]string{"10-net.conflist": bareList, "net/zzz-a.conf": `{"type":"a"}`},
			err:    "give it an earlier name", plugins: []string{"a"},
		},
		{
			name:   "a plugin that is not in the directory of plugins",
			before: map[string]string{"10-net.conflist": bareList, "net/10-other.conf": `{"type":"other"}`},
			err:    `has no "other"`, plugins: []string{"other"},
		},
		{
			name:   "none but ours",
			before: map[string]string{"10-net.conflist": bareList, "net/zz-podshunt.conf": ourDropIn},
			after:  map[string]string{"net/zz-podshunt.conf": ""},
			err:    "no plugin besides podshunt",
		},
		{
			name:   "none at all",
			before: map[string]string{"10-net.conflist": bareList, "net/notes": "x"},
			err:    "no plugin configs found",
		},
		{
			name:     "plugins in the list, and more as files",
			before:   map[string]string{"10-net.conflist": `{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"a"}]}`, "net/10-mesh.conf": `{"type":"mesh"}`},
			after:    map[string]string{"10-net.conflist": `{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"a"},{"type":"podshunt"}]}`},
			conflist: "10-net.conflist", plugins: []string{"a", "podshunt", "mesh"},
		},
		{
			name:     "only those in the list",
			before:   map[string]string{"10-net.conflist": `{"cniVersion":"1.1.0","name":"net","loadOnlyInlinedPlugins":true,"plugins":[{"type":"a"}]}`, "net/10-mesh.conf": `{"type":"mesh"}`},
			after:    map[string]string{"10-net.conflist": `{"cniVersion":"1.1.0","name":"net","loadOnlyInlinedPlugins":true,"plugins":[{"type":"a"},{"type":"podshunt"}]}`},
			conflist: "10-net.conflist", plugins: []string{"a", "podshunt"},
		},
		{
			name:     "another network comes first",
			before:   map[string]string{"05-a.conflist": testList, "10-net.conflist": bareList, "net/10-a.conf": `{"type":"a"}`, "net/zz-podshunt.conf": ourDropIn},
			after:    map[string]string{"05-a.conflist": testBoth, "net/zz-podshunt.conf": ""},
			conflist: "05-a.conflist", plugins: []string{"a", "podshunt"},
		},
		{
			name:     "a file that is somebody else's",
			before:   map[string]string{"10-net.conflist": bareList, "net/10-a.conf": `{"type":"a"}`, "old/zz-podshunt.conf": `{"type":"b"}`},
			after:    map[string]string{"net/zz-podshunt.conf": ourDropIn},
			conflist: "net/zz-podshunt.conf", plugins: []string{"a", "podshunt"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ins := newTestInstaller(t)
			clean := map[string]string{} // before, without what an earlier agent has left
			for name, content := range tc.before {
				if err := os.MkdirAll(filepath.Dir(ins.conf(name)), 0o755); err != nil {
					t.Fatal(err)
				}
				writeFile(t, ins.conf(name), content)
				if content != ourDropIn {
					clean[name] = content
				}
			}
			ins.Reconcile()
			wantState(t, ins, tc.conflist, tc.err)
			want := map[string]string{}
			for _, files := range []map[string]string{tc.before, tc.after} {
				for name, content := range files {
					want[name] = content
				}
			}
			for name, content := range want {
				if content == "" {
					delete(want, name)
				}
			}
			wantTree(t, ins, "installed", want)
			wantPlugins(t, ins, tc.plugins)
			ins.Reconcile()
			New(ins.cfg).Reconcile()
			wantTree(t, ins, "kept, and by another agent", want)
			if remarks, err := ins.Uninstall(); err != nil || len(remarks) > 1 {
				t.Errorf("got remarks %q and error %v", remarks, err)
			}
			wantTree(t, ins, "uninstalled", clean)
		})
	}
}

// TestDropInFollowsList: the entry goes where the list has its plugins, and away with the list.
func TestDropInFollowsList(t *testing.T) {
	ins := newTestInstaller(t)
	if err := os.Mkdir(ins.conf("net"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, ins.conf("net/10-a.conf"), `{"type":"a"}`)
	writeFile(t, ins.conf("10-net.conflist"), bareList)
	ins.Reconcile()
	wantState(t, ins, "net/zz-podshunt.conf", "")

	if err := os.Remove(ins.conf("net/zz-podshunt.conf")); err != nil {
		t.Fatal(err)
	}
	ins.Reconcile()
	wantState(t, ins, "net/zz-podshunt.conf", "")

	writeFile(t, ins.conf("10-net.conflist"), `{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"a"}]}`)
	ins.Reconcile()
	wantState(t, ins, "10-net.conflist", "")
	wantPlugins(t, ins, []string{"a", "podshunt", "a"})

	writeFile(t, ins.conf("10-net.conflist"), bareList)
	ins.Reconcile()
	wantState(t, ins, "net/zz-podshunt.conf", "")
	if err := os.Remove(ins.conf("10-net.conflist")); err != nil {
		t.Fatal(err)
	}
	ins.Reconcile()
	wantTree(t, ins, "without the list", map[string]string{"net/10-a.conf": `{"type":"a"}`})
}

// TestDropInIsSeen: a runtime watches the directory of lists only, and reads them again when a
// name goes away there.
func TestDropInIsSeen(t *testing.T) {
	ins := newTestInstaller(t)
	if err := os.Mkdir(ins.conf("net"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, ins.conf("net/10-a.conf"), `{"type":"a"}`)
	writeFile(t, ins.conf("10-net.conflist"), bareList)
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, ins.cfg.ConfDir, unix.IN_MOVED_FROM|unix.IN_DELETE); err != nil {
		t.Fatal(err)
	}
	wantEvent := func(what string) {
		t.Helper()
		buffer := make([]byte, 4096)
		if n, err := unix.Read(fd, buffer); err != nil || n == 0 {
			t.Errorf("%s: no event in the directory of lists (%v)", what, err)
		}
	}
	ins.Reconcile()
	wantState(t, ins, "net/zz-podshunt.conf", "")
	wantEvent("installed")
	if _, err := ins.Uninstall(); err != nil {
		t.Fatal(err)
	}
	wantEvent("uninstalled")
}

// wantTree compares the directory of configurations and those below it.
func wantTree(t testing.TB, ins *Installer, what string, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(ins.cfg.ConfDir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(ins.cfg.ConfDir, path)
		got[name] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// wantPlugins compares what libcni runs of the first list.
func wantPlugins(t testing.TB, ins *Installer, want []string) {
	t.Helper()
	files, err := readDir(ins.cfg.ConfDir)
	if err != nil || len(files) == 0 {
		t.Fatalf("got files %v and error %v", files, err)
	}
	list, err := libcni.NetworkConfFromFile(files[0].path)
	if err != nil {
		if len(want) > 0 {
			t.Error(err)
		}
		return
	}
	var got []string
	for _, p := range list.Plugins {
		got = append(got, p.Network.Type)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("plugins (-want +got):\n%s", diff)
	}
}

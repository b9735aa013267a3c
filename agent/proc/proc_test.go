// SPDX-License-Identifier: Apache-2.0

package proc

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	uid1 = "0f1e2d3c-1111-4222-8333-444455556666"
	uid2 = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
	hash = "0123456789abcdef0123456789abcdef"
)

// fakeProcess is a process of a fake procfs; its network namespace is a file that
// holds the cookie.
type fakeProcess struct {
	pid    int
	start  int
	pod    string
	cookie int
}

func mustWrite(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// mustFakeNode makes a procfs with the node's first process, which has a hierarchy of
// cgroups on /cg.
func mustFakeNode(t testing.TB) (root string) {
	t.Helper()
	root = t.TempDir()
	mustWrite(t, filepath.Join(root, "1", "mountinfo"), "41 31 0:38 / /cg rw - cgroup2 cgroup2 rw\n")
	if err := os.MkdirAll(filepath.Join(root, "1", "root", "cg", "kubepods"), 0o700); err != nil {
		t.Fatal(err)
	}
	return root
}

func (p fakeProcess) mustAdd(t testing.TB, root string) {
	t.Helper()
	dir := filepath.Join(root, strconv.Itoa(p.pid))
	mustWrite(t, filepath.Join(dir, "cgroup"), "0::/kubepods/pod"+p.pod+"/c1\n")
	// A name may look like the fields after it.
	mustWrite(t, filepath.Join(dir, "stat"), fmt.Sprintf("%d (a) b) S %s%d 0 0\n", p.pid, strings.Repeat("0 ", 18), p.start))
	mustWrite(t, filepath.Join(dir, "ns", "net"), strconv.Itoa(p.cookie))
}

func readCookie(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(data), 10, 64)
}

func TestFind(t *testing.T) {
	// Each wanted path is that of the process.
	for _, tc := range []struct {
		name      string
		processes []fakeProcess
		change    func(t testing.TB, root string)
		want      map[string]Netns
	}{
		{name: "none", want: map[string]Netns{}},
		{
			name:      "two pods",
			processes: []fakeProcess{{10, 5, uid1, 100}, {11, 6, uid1, 100}, {12, 7, uid2, 200}},
			want:      map[string]Netns{uid1: {"10", 100}, uid2: {"12", 200}},
		},
		{
			name:      "not asked for",
			processes: []fakeProcess{{10, 5, hash, 100}},
			want:      map[string]Netns{},
		},
		{
			name:      "the oldest process counts, whatever its number",
			processes: []fakeProcess{{10, 6, uid1, 101}, {4000, 5, uid1, 100}},
			want:      map[string]Netns{uid1: {"4000", 100}},
		},
		{
			name:      "the lower number of two that are equally old",
			processes: []fakeProcess{{11, 5, uid1, 101}, {10, 5, uid1, 100}},
			want:      map[string]Netns{uid1: {"10", 100}},
		},
		{
			name:      "a helper of the runtime in the node's namespace",
			processes: []fakeProcess{{10, 5, uid1, 1}, {11, 6, uid1, 100}},
			want:      map[string]Netns{uid1: {"11", 100}},
		},
		{
			name:      "hostNetwork",
			processes: []fakeProcess{{10, 5, uid1, 1}, {11, 6, uid1, 1}},
			want:      map[string]Netns{},
		},
		{
			name:      "a process that ends meanwhile",
			processes: []fakeProcess{{10, 5, uid1, 100}, {11, 6, uid1, 100}},
			change: func(t testing.TB, root string) {
				if err := os.Remove(filepath.Join(root, "10", "ns", "net")); err != nil {
					t.Fatal(err)
				}
			},
			want: map[string]Netns{uid1: {"11", 100}},
		},
		{
			name:      "what is no process",
			processes: []fakeProcess{{10, 5, uid1, 100}},
			change: func(t testing.TB, root string) {
				mustWrite(t, filepath.Join(root, "sys", "cgroup"), "0::/kubepods/pod"+uid2+"\n")
				mustWrite(t, filepath.Join(root, "12", "cgroup"), "0::/kubepods/pod"+uid2+"\n")
				mustWrite(t, filepath.Join(root, "12", "stat"), "12 (short) S\n")
				mustWrite(t, filepath.Join(root, "13", "comm"), "gone\n")
			},
			want: map[string]Netns{uid1: {"10", 100}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := mustFakeNode(t)
			for _, p := range tc.processes {
				p.mustAdd(t, root)
			}
			if tc.change != nil {
				tc.change(t, root)
			}
			f := Finder{Root: root, HostNetns: []uint64{1}, NetnsCookie: readCookie}
			got, _, err := f.Find(map[string]bool{uid1: true, uid2: true})
			if err != nil {
				t.Fatal(err)
			}
			for uid, n := range tc.want {
				n.Path = filepath.Join(root, n.Path, "ns", "net")
				tc.want[uid] = n
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("found (-want +got)\n%s", diff)
			}
		})
	}
}

// The number of a process that ends is given to a process of another pod between
// the look at its cgroup and that at its network namespace.
func TestFindReusedPID(t *testing.T) {
	root := mustFakeNode(t)
	fakeProcess{10, 5, uid1, 100}.mustAdd(t, root)
	f := Finder{Root: root, NetnsCookie: func(path string) (uint64, error) {
		fakeProcess{10, 9, uid2, 200}.mustAdd(t, root)
		return readCookie(path)
	}}
	got, _, err := f.Find(map[string]bool{uid1: true})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]Netns{}, got); diff != "" {
		t.Errorf("found (-want +got)\n%s", diff)
	}
}

func TestFindWithoutProcfs(t *testing.T) {
	f := Finder{Root: filepath.Join(t.TempDir(), "none"), NetnsCookie: readCookie}
	if _, _, err := f.Find(map[string]bool{uid1: true}); !os.IsNotExist(err) {
		t.Errorf("got error %v, want %v", err, os.ErrNotExist)
	}
}

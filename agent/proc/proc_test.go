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

func TestPodUID(t *testing.T) {
	const systemd = "0f1e2d3c_1111_4222_8333_444455556666"
	for _, tc := range []struct{ name, content, want string }{
		{"cgroupfs", "0::/kubepods/besteffort/pod" + uid1 + "/c1\n", uid1},
		{"cgroupfs guaranteed", "0::/kubepods/pod" + uid1 + "/c1\n", uid1},
		{"systemd", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + systemd + ".slice/cri-containerd-c1.scope\n", uid1},
		{"systemd guaranteed", "0::/kubepods.slice/kubepods-pod" + systemd + ".slice/crio-c1.scope\n", uid1},
		{"systemd below a root", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + systemd + ".slice/x.scope\n", uid1},
		{"the pod's own cgroup", "0::/kubepods/pod" + uid1 + "\n", uid1},
		{"v1", "12:cpu,cpuacct:/kubepods/burstable/pod" + uid1 + "/c1\n1:name=systemd:/kubepods/burstable/pod" + uid1 + "/c1\n", uid1},
		{"hybrid", "9:name=systemd:/user.slice\n0::/kubepods/burstable/pod" + uid1 + "/c1\n", uid1},
		{"seen from another cgroup namespace", "0::/../../pod" + uid1 + "/c1\n", uid1},
		{"static", "0::/kubepods/burstable/pod" + hash + "/c1\n", hash},
		{"named by a container", "0::/kubepods/pod" + uid1 + "/c1/pod" + uid2 + "\n", uid1},
		{"systemd and a runtime without", "0::/system.slice/containerd.service/kubepods-burstable-pod" + systemd + ".slice:cri-containerd:c1\n", uid1},
		{"no pod", "0::/system.slice/kubelet.service\n", ""},
		{"kubepods", "0::/kubepods/burstable\n", ""},
		{"short UID", "0::/kubepods/pod0f1e2d3c/c1\n", ""},
		{"upper case", "0::/kubepods/pod" + strings.ToUpper(uid1) + "/c1\n", ""},
		{"empty", "", ""},
		{"no path", "0::\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := podUID(tc.content); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

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
			root := t.TempDir()
			for _, p := range tc.processes {
				p.mustAdd(t, root)
			}
			if tc.change != nil {
				tc.change(t, root)
			}
			f := Finder{Root: root, HostNetns: []uint64{1}, NetnsCookie: readCookie}
			got, err := f.Find(map[string]bool{uid1: true, uid2: true})
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
	root := t.TempDir()
	fakeProcess{10, 5, uid1, 100}.mustAdd(t, root)
	f := Finder{Root: root, NetnsCookie: func(path string) (uint64, error) {
		fakeProcess{10, 9, uid2, 200}.mustAdd(t, root)
		return readCookie(path)
	}}
	got, err := f.Find(map[string]bool{uid1: true})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]Netns{}, got); diff != "" {
		t.Errorf("found (-want +got)\n%s", diff)
	}
}

func TestFindWithoutProcfs(t *testing.T) {
	f := Finder{Root: filepath.Join(t.TempDir(), "none"), NetnsCookie: readCookie}
	if _, err := f.Find(map[string]bool{uid1: true}); !os.IsNotExist(err) {
		t.Errorf("got error %v, want %v", err, os.ErrNotExist)
	}
}

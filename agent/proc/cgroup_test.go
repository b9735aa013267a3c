// SPDX-License-Identifier: Apache-2.0

package proc

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const systemdUID1 = "0f1e2d3c_1111_4222_8333_444455556666"

func TestPodPart(t *testing.T) {
	for _, tc := range []struct{ name, path, uid, parent string }{
		{"cgroupfs", "/kubepods/besteffort/pod" + uid1 + "/c1", uid1, "/kubepods/besteffort"},
		{"cgroupfs guaranteed", "/kubepods/pod" + uid1 + "/c1", uid1, "/kubepods"},
		{
			"systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + systemdUID1 + ".slice/cri-containerd-c1.scope",
			uid1, "/kubepods.slice/kubepods-burstable.slice",
		},
		{"systemd guaranteed", "/kubepods.slice/kubepods-pod" + systemdUID1 + ".slice/crio-c1.scope", uid1, "/kubepods.slice"},
		{
			"systemd below a root", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" +
				systemdUID1 + ".slice/x.scope", uid1, "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice",
		},
		{"the pod's own cgroup", "/kubepods/pod" + uid1, uid1, "/kubepods"},
		{"at the root", "/pod" + uid1, uid1, ""},
		{"static", "/kubepods/burstable/pod" + hash + "/c1", hash, "/kubepods/burstable"},
		{"named by a container", "/kubepods/pod" + uid1 + "/c1/pod" + uid2, uid1, "/kubepods"},
		{
			"systemd and a runtime without", "/system.slice/containerd.service/kubepods-burstable-pod" + systemdUID1 + ".slice:cri-containerd:c1",
			uid1, "/system.slice/containerd.service",
		},
		{"no pod", "/system.slice/kubelet.service", "", ""},
		{"kubepods", "/kubepods/burstable", "", ""},
		{"short UID", "/kubepods/pod0f1e2d3c/c1", "", ""},
		{"upper case", "/kubepods/pod" + strings.ToUpper(uid1) + "/c1", "", ""},
		{"root", "/", "", ""},
		{"no path", "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if uid, parent := podPart(tc.path); uid != tc.uid || parent != tc.parent {
				t.Errorf("got %q below %q, want %q below %q", uid, parent, tc.uid, tc.parent)
			}
		})
	}
}

// The hierarchies of a node are directories here; what is open in them is open to all users.
func TestPod(t *testing.T) {
	const (
		unified  = "1 0 0:1 / /cg rw - cgroup2 cgroup2 rw\n"
		version1 = "2 0 0:2 / /cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n" +
			"3 0 0:3 / /systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
		others = "others than root may make cgroups in "
		unseen = "no mount shows who made cgroup "
	)
	root := t.TempDir()
	for _, dir := range []string{
		"cg/kubepods/burstable", "cg/kubelet.slice/kubelet-kubepods.slice", "cg/user.slice/open/kubepods/closed", "cg/a b",
		"cpu/kubepods", "cpu/docker/id/kubelet/kubepods", "systemd/kubepods", "systemd/user.slice/open",
	} {
		if err := os.MkdirAll(filepath.Join(root, "1", "root", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for dir, mode := range map[string]os.FileMode{"cg/user.slice/open": 0o757, "systemd/user.slice/open": 0o775} {
		if err := os.Chmod(filepath.Join(root, "1", "root", dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct{ name, mounts, content, want, err string }{
		{"cgroupfs", unified, "0::/kubepods/burstable/pod" + uid1 + "/c1\n", uid1, ""},
		{"systemd below a root", unified, "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + systemdUID1 + ".slice/c1.scope\n", uid1, ""},
		{"at the root", unified, "0::/pod" + uid1 + "\n", uid1, ""},
		{"not wanted", unified, "0::/kubepods/pod" + hash + "/c1\n", "", ""},
		{"a user's", unified, "0::/user.slice/open/pod" + uid1 + "/c1\n", uid1, others},
		{"a user's, named as a kubelet's", unified, "0::/user.slice/open/kubepods/pod" + uid1 + "/c1\n", uid1, others},
		{"further down in a user's", unified, "0::/user.slice/open/kubepods/closed/pod" + uid1 + "/c1\n", uid1, others},
		{"named twice", unified, "0::/user.slice/open/pod" + uid1 + "/kubepods/pod" + uid2 + "/c1\n", uid1, others},
		{"gone", unified, "0::/gone/pod" + uid1 + "/c1\n", uid1, unseen},
		{"above the namespace's root", unified, "0::/../kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"mounted from above", "1 0 0:1 /../.. /cg rw - cgroup2 cgroup2 rw\n", "0::/../../kubepods/pod" + uid1 + "/c1\n", uid1, ""},
		{"beside what is mounted from above", "1 0 0:1 /.. /cg rw - cgroup2 cgroup2 rw\n", "0::/../../kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"version 1", version1, "12:cpu,cpuacct:/kubepods/pod" + uid1 + "/c1\n1:name=systemd:/kubepods/pod" + uid1 + "/c1\n0::/\n", uid1, ""},
		{"hybrid", version1 + unified, "9:name=systemd:/user.slice\n0::/kubepods/burstable/pod" + uid1 + "/c1\n", uid1, ""},
		{"hierarchy that is not mounted", version1, "0::/kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"controller that is not mounted", version1, "7:cpu,memory:/kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"a user's in one hierarchy", version1, "7:name=systemd:/user.slice/open/pod" + uid1 + "\n4:cpu,cpuacct:/user.slice\n", uid1, others},
		{"a user's in one, a pod's in another", version1, "7:name=systemd:/user.slice/open/pod" + uid1 + "\n4:cpu,cpuacct:/kubepods/pod" + uid2 + "\n", uid2, ""},
		{"nested kubelet", "2 0 0:2 /docker/id /cpu/docker/id rw - cgroup cgroup rw,cpu\n", "4:cpu:/docker/id/kubelet/kubepods/pod" + uid1 + "/c1\n", uid1, ""},
		{"beside a nested kubelet", "2 0 0:2 /docker/id /cpu/docker/id rw - cgroup cgroup rw,cpu\n", "4:cpu:/docker/id2/kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"covered mount", "2 0 0:2 / /covered rw - cgroup cgroup rw,cpu\n" + version1, "4:cpu:/kubepods/pod" + uid1 + "/c1\n", uid1, ""},
		{"space", `1 0 0:1 /x /cg/a\040b rw - cgroup2 cgroup2 rw` + "\n", "0::/x/pod" + uid1 + "/c1\n", uid1, ""},
		{"no hierarchy", unified, "\n0:\n", "", ""},
		{"empty", unified, "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mustWrite(t, filepath.Join(root, "1", "mountinfo"), "31 23 0:28 / /sys rw - tmpfs tmpfs rw\n"+tc.mounts)
			got, err := Finder{Root: root}.readMounts().pod(tc.content, map[string]bool{uid1: true, uid2: true})
			if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.HasPrefix(err.Error(), tc.err) {
				t.Errorf("got %q and error %v, want %q and %q", got, err, tc.want, tc.err)
			}
		})
	}
}

// mustMakeCgroup makes a cgroup2 of its own for a test.
func mustMakeCgroup(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_ROOT") != "" {
			t.Fatal("root is needed for cgroups")
		}
		t.Skip("root is needed for cgroups")
	}
	mounted, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounted)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			dir := filepath.Join(fields[1], fmt.Sprint("podshunt-proc-", os.Getpid()))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { mustRemoveCgroup(t, dir) })
			return dir
		}
	}
	t.Fatal("no cgroup2 in /proc/mounts")
	return ""
}

// mustRemoveCgroup removes a cgroup without processes, and those below it. The kernel may
// count a process for a while after its parent has waited for it.
func mustRemoveCgroup(t testing.TB, dir string) {
	t.Helper()
	var dirs []string
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	for _, dir := range slices.Backward(dirs) {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			err := os.Remove(dir)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				t.Error(err)
				break
			}
		}
	}
}

// mustRun starts a command in a cgroup and in a network namespace of its own, and
// returns its pid.
func mustRun(t testing.TB, cgroup string, command ...string) int {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

// netnsInode stands in for the cookie, for which the namespace would have to be entered.
func netnsInode(path string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return st.Ino, err
}

// TestFindInCgroups finds a pod in the machine's own cgroups, and not what a user has
// made in a part that is his, from the namespace of the machine and from that of a
// container in another pod.
func TestFindInCgroups(t *testing.T) {
	runtime.LockOSThread() // of which the namespace is changed; processes end with their parent's thread
	defer runtime.UnlockOSThread()
	root := mustMakeCgroup(t)
	mustMake := func(path string) string {
		t.Helper()
		dir := filepath.Join(root, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	const user = 12345
	users := mustMake("user.slice/user@12345.service")
	if err := os.Chown(users, user, user); err != nil {
		t.Fatal(err)
	}
	forged := filepath.Join(users, "kubepods", "pod"+uid1)
	both := filepath.Join(users, "kubepods", "pod"+uid2, "c1")
	mkdir := exec.Command("mkdir", "-p", forged, both)
	mkdir.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	if out, err := mkdir.CombinedOutput(); err != nil {
		t.Fatalf("make cgroups as a user: %v: %s", err, out)
	}
	node := mustRun(t, root, "sleep", "600")
	// The user's are older.
	older := []int{mustRun(t, forged, "sleep", "600"), mustRun(t, both, "sleep", "600")}
	pod := mustRun(t, mustMake("kubepods/burstable/pod"+uid2+"/c1"), "sleep", "600")
	cookie, err := netnsInode(fmt.Sprintf("/proc/%d/ns/net", pod))
	if err != nil {
		t.Fatal(err)
	}

	check := func(procfs string) {
		t.Helper()
		f := Finder{Root: procfs, NetnsCookie: netnsInode}
		found, refused, err := f.Find(map[string]bool{uid1: true, uid2: true})
		if err != nil {
			t.Fatal(err)
		}
		want := Netns{Path: filepath.Join(procfs, strconv.Itoa(pod), "ns/net"), Cookie: cookie}
		if diff := cmp.Diff(map[string]Netns{uid2: want}, found); diff != "" {
			t.Errorf("found (-want +got)\n%s", diff)
		}
		refusal := fmt.Sprint(refused[uid1])
		if len(refused) != 1 || !strings.HasPrefix(refusal, "others than root may make cgroups in ") ||
			!strings.HasSuffix(refusal, users+": its owner is 12345, its mode 0755") {
			t.Errorf("refused: got %v, want %s for what %d made in %s", refused, uid1, user, users)
		}
	}
	check("/proc")

	// A procfs of these processes, with a first one that may be looked at.
	procfs := t.TempDir()
	mustLink := func(target int, name string) {
		t.Helper()
		if err := os.Symlink(fmt.Sprint("/proc/", target), filepath.Join(procfs, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range append(older, pod) {
		mustLink(pid, strconv.Itoa(pid))
	}
	mustLink(os.Getpid(), "self")
	container := mustRun(t, mustMake("kubepods/burstable/pod"+hash+"/c1"), "unshare", "--cgroup", "sleep", "600")
	own, err := os.Open("/proc/thread-self/ns/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		a, err1 := os.Stat("/proc/thread-self/ns/cgroup")
		b, err2 := os.Stat(fmt.Sprintf("/proc/%d/ns/cgroup", container))
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if !os.SameFile(a, b) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the container has no cgroup namespace of its own")
		}
	}
	inside, err := os.Open(fmt.Sprintf("/proc/%d/ns/cgroup", container))
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	if err := unix.Setns(int(inside.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		t.Fatal(err)
	}
	seen := func() string {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pod))
		if err != nil {
			t.Error(err)
		}
		return string(content)
	}
	if want := "0::/../../pod" + uid2 + "/c1\n"; !strings.HasSuffix(seen(), want) {
		t.Errorf("got cgroups %q, want %q last", seen(), want)
	}

	// The names are not told, so that nothing is found.
	f := Finder{Root: procfs, NetnsCookie: netnsInode}
	found, refused, err := f.Find(map[string]bool{uid1: true, uid2: true})
	if err != nil || len(found) != 0 || len(refused) != 2 {
		t.Errorf("got %v, refused %v and error %v, want both refused", found, refused, err)
	}
	for uid, refusal := range refused {
		if want := `no mount shows who made cgroup "/../..`; !strings.HasPrefix(refusal.Error(), want) {
			t.Errorf("%s: got refusal %v, want %s", uid, refusal, want)
		}
	}

	// The node's first process has them.
	mustLink(node, "1")
	check(procfs)
	if want := "0::/../../pod" + uid2 + "/c1\n"; !strings.HasSuffix(seen(), want) {
		t.Errorf("after a search: got cgroups %q, want %q last", seen(), want)
	}
	if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		t.Fatal(err)
	}
}

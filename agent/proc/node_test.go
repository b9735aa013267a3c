// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package proc

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// containerEnv makes a process stand in for an agent in a container: it has the paths of
// two procfs of the node, one to look through, and one to find itself in.
const containerEnv = "PODSHUNT_TEST_PROC"

func TestMain(m *testing.M) {
	if paths := os.Getenv(containerEnv); paths != "" {
		os.Exit(inContainer(filepath.SplitList(paths)))
	}
	os.Exit(sandbox.Main(m.Run))
}

// result is what a Finder returns.
type result struct {
	Found   map[string]Netns
	Refused map[string]string
	// Self and There are the numbers that the process has in its own and in the node's procfs.
	Self, There int
}

func find(procfs string) (result, error) {
	found, refused, err := Finder{Root: procfs, NetnsCookie: netnsInode}.Find(map[string]bool{uid1: true, uid2: true})
	r := result{Found: found, Refused: map[string]string{}}
	for uid, err := range refused {
		r.Refused[uid] = err.Error()
	}
	return r, err
}

func inContainer(procfs []string) (status int) {
	r, err := find(procfs[0])
	there, selfErr := Self(procfs[1])
	r.Self, r.There = os.Getpid(), there
	if err := errors.Join(err, selfErr, json.NewEncoder(os.Stdout).Encode(r)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// findInContainer finds with the namespaces that a container has and the capabilities that
// the chart gives to the agent for this.
func findInContainer(procfs ...string) (r result, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	cmd := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--cgroup", "--mount-proc",
		"setpriv", "--bounding-set=-all,+sys_admin,+sys_ptrace", "--no-new-privs", self)
	cmd.Env = append(os.Environ(), containerEnv+"="+strings.Join(procfs, string(filepath.ListSeparator)))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(out, &r)
}

// mustRun starts a command in a cgroup and in a network namespace of its own, and
// returns its pid.
func mustRun(t testing.TB, cgroup string, command ...string) int {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := sandbox.StartIn(cgroup, (*exec.Cmd).Start, cmd); err != nil {
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
	s := sandboxtest.MustNew(t, sandbox.Config{})
	mustMake := func(path string) string {
		t.Helper()
		dir, err := s.AddCgroup(path)
		if err != nil {
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
	node := mustRun(t, mustMake(""), "sleep", "600")
	// The user's are older.
	older := []int{mustRun(t, forged, "sleep", "600"), mustRun(t, both, "sleep", "600")}
	pod := mustRun(t, mustMake("kubepods/burstable/pod"+uid2+"/c1"), "sleep", "600")
	cookie, err := netnsInode(fmt.Sprintf("/proc/%d/ns/net", pod))
	if err != nil {
		t.Fatal(err)
	}

	check := func(r result, err error, procfs string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		want := Netns{Path: filepath.Join(procfs, strconv.Itoa(pod), "ns/net"), Cookie: cookie}
		if diff := cmp.Diff(map[string]Netns{uid2: want}, r.Found); diff != "" {
			t.Errorf("found (-want +got)\n%s", diff)
		}
		refusal := r.Refused[uid1]
		if len(r.Refused) != 1 || !strings.HasPrefix(refusal, "others than root may make cgroups in ") ||
			!strings.HasSuffix(refusal, users+": its owner is 12345, its mode 0755") {
			t.Errorf("refused: got %v, want %s for what %d made in %s", r.Refused, uid1, user, users)
		}
	}
	r, err := find("/proc")
	check(r, err, "/proc")

	// The node's procfs as the chart mounts it, and of these processes one with a first
	// process that may be looked at.
	mounted, procfs := mustMountProc(t), t.TempDir()
	mustLink := func(target int, name string) {
		t.Helper()
		if err := os.Symlink(filepath.Join(mounted, strconv.Itoa(target)), filepath.Join(procfs, name)); err != nil {
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
	r, err = find(procfs)
	if err != nil || len(r.Found) != 0 || len(r.Refused) != 2 {
		t.Errorf("got %+v and error %v, want both refused", r, err)
	}
	for uid, refusal := range r.Refused {
		if want := `no mount shows who made cgroup "/../..`; !strings.HasPrefix(refusal, want) {
			t.Errorf("%s: got refusal %v, want %s", uid, refusal, want)
		}
	}

	// The node's first process has them.
	mustLink(node, "1")
	r, err = find(procfs)
	check(r, err, procfs)
	if want := "0::/../../pod" + uid2 + "/c1\n"; !strings.HasSuffix(seen(), want) {
		t.Errorf("after a search: got cgroups %q, want %q last", seen(), want)
	}
	if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		t.Fatal(err)
	}

	// In a PID namespace of its own, the agent has another number than on the node.
	r, err = findInContainer(procfs, mounted)
	check(r, err, procfs)
	if r.Self != 1 || r.There <= 1 {
		t.Errorf("in a container: got process %d, %d on the node, want 1 and another one", r.Self, r.There)
	}
}

// mustMountProc mounts this process's procfs elsewhere, only to be read.
func mustMountProc(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount("/proc", dir, "", unix.MS_BIND, "")
	if err == nil {
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		err = unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

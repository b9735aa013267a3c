// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// A mount hides what is below it. So there is none but on /sys/fs/bpf or on an empty
// directory below it, and none where a bpffs is.
func TestMountBPFFS(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	// A process with a mount namespace of its own stands for the node.
	process := exec.Command("sleep", "600")
	process.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	proc := fmt.Sprintf("/proc/%d", process.Process.Pid)
	const place = "/sys/fs/bpf"
	// Nothing is mounted there, and directories can be made.
	inMountNamespace(t, proc+"/ns/mnt", func() error { return unix.Mount("none", place, "tmpfs", 0, "") })
	root := proc + "/root"
	for _, dir := range []string{place + "/full", s.Base + "/full"} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(root+dir+"/file", nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{place + "/empty", s.Base + "/empty"} {
		if err := os.Mkdir(root+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(s.Base+"/empty", root+place+"/link"); err != nil {
		t.Fatal(err)
	}

	mount := func(dir string, mounted bool, text string) {
		t.Helper()
		got, err := datapath.MountBPFFS(proc+"/ns/mnt", dir)
		if got != mounted || (err == nil) != (text == "") || err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got mounted %t and error %v, want %t and an error with %q", dir, got, err, mounted, text)
		}
		if err != nil {
			return
		}
		var st unix.Statfs_t
		if err := unix.Statfs(root+dir, &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
			t.Errorf("%s: got a file system of type %x and error %v, want a bpffs", dir, st.Type, err)
		}
	}
	const accepted = ": accepted are /sys/fs/bpf and empty directories below it"
	mount(s.Base+"/full", false, accepted)
	mount(s.Base+"/empty", false, accepted)
	mount(s.Base+"/none/such", false, accepted)
	mount("/", false, accepted)
	mount(place+"/../bpf-other", false, accepted)
	mount(place+"/link", false, "it is a link to "+s.Base+"/empty")
	mount(place+"/full", false, "accepted is an empty directory, and it holds file")
	mount(place, false, "accepted is an empty directory, and it holds ")
	mount(place+"/empty", true, "")
	mount(place+"/empty", false, "")
	mount(place+"/empty/deep/below", false, "")
	mount(place+"/new", true, "")
	// One that is there already, such as that of the sandbox, serves wherever it is.
	mount(s.BPF, false, "")
	mount(s.BPF+"/below", false, "")
	inMountNamespace(t, proc+"/ns/mnt", func() error { return unix.Mount("none", place, "tmpfs", 0, "") })
	mount(place, true, "")
	mount(place, false, "")

	if _, err := os.Stat(root + s.Base + "/full/file"); err != nil {
		t.Errorf("hidden by a mount: %v", err)
	}
	if _, err := os.Stat(root + s.Base + "/none"); !os.IsNotExist(err) {
		t.Errorf("got error %v for a directory that is refused, want it not made", err)
	}
	// Nothing of it is seen in the namespace of this process.
	var st unix.Statfs_t
	if err := unix.Statfs(s.Base+"/empty", &st); err != nil || st.Type == unix.BPF_FS_MAGIC {
		t.Errorf("got a file system of type %x and error %v here, want no bpffs", st.Type, err)
	}
}

// inMountNamespace runs f on a thread in another mount namespace. The thread ends
// with it, unless it is the main thread, which is left alone.
func inMountNamespace(t testing.TB, namespace string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	var enter func()
	enter = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				enter()
			}()
			<-ended
			return
		}
		fd, err := unix.Open(namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Unshare(unix.CLONE_FS)
		}
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNS)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}
	go enter()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// An agent that may mount does not do so on any directory.
func TestOpenMountsInItsPlaceOnly(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	dir := t.TempDir()
	cfg := datapath.DefaultConfig()
	cfg.Cgroup, cfg.PinDir = s.Cgroup, filepath.Join(dir, "podshunt")
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // in case it does
	if _, err := datapath.Open(cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "mount a bpffs on "+dir+": accepted are /sys/fs/bpf") {
		t.Errorf("got error %v, want one that says where a bpffs is mounted", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("got %v and error %v, want nothing made", entries, err)
	}
}

func TestNoMount(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	cfg := datapath.DefaultConfig()
	cfg.Cgroup, cfg.PinDir, cfg.MountBPFFS = s.Cgroup, filepath.Join(t.TempDir(), "podshunt"), false
	_, err := datapath.Open(cfg, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "run `podshunt-agent mount-bpffs` on the node first") {
		t.Errorf("got error %v, want one that says how to mount", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(cfg.PinDir)); err != nil || len(entries) > 0 {
		t.Errorf("got %v and error %v, want nothing made", entries, err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package datapath_test

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

func TestMountBPFFS(t *testing.T) {
	s := sandbox.MustNew(t, sandbox.Config{})
	// A process with a mount namespace of its own stands for the node.
	process := exec.Command("sleep", "60")
	process.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	proc := fmt.Sprintf("/proc/%d", process.Process.Pid)
	dir := filepath.Join(s.Base, "other-bpf")
	for _, want := range []bool{true, false} {
		mounted, err := datapath.MountBPFFS(proc+"/ns/mnt", dir)
		if err != nil || mounted != want {
			t.Fatalf("got %t and error %v, want %t", mounted, err, want)
		}
	}
	for path, want := range map[string]bool{dir: false, proc + "/root" + dir: true} {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil || (st.Type == unix.BPF_FS_MAGIC) != want {
			t.Errorf("%s: got a file system of type %x and error %v, want a bpffs: %t", path, st.Type, err, want)
		}
	}
}

func TestNoMount(t *testing.T) {
	s := sandbox.MustNew(t, sandbox.Config{})
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

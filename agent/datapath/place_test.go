// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestMountBPFFS(t *testing.T) {
	mustNode(t, nil) // needs root as well, and says so
	// A process with a mount namespace of its own stands for the node.
	process := exec.Command("sleep", "60")
	process.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	proc := fmt.Sprintf("/proc/%d", process.Process.Pid)
	dir := filepath.Join(t.TempDir(), "bpf")
	for _, want := range []bool{true, false} {
		mounted, err := MountBPFFS(proc+"/ns/mnt", dir)
		if err != nil || mounted != want {
			t.Fatalf("got %t and error %v, want %t", mounted, err, want)
		}
	}
	for path, want := range map[string]bool{dir: false, proc + "/root" + dir: true} {
		if there, err := isBPFFS(path); err != nil || there != want {
			t.Errorf("bpffs at %s: got %t and error %v, want %t", path, there, err, want)
		}
	}
}

func TestNoMount(t *testing.T) {
	n := mustNode(t, nil)
	cfg := n.cfg
	cfg.MountBPFFS = false
	cfg.PinDir = filepath.Join(t.TempDir(), "podshunt")
	_, err := Open(cfg, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "run `podshunt-agent mount-bpffs` on the node first") {
		t.Errorf("got error %v, want one that says how to mount", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(cfg.PinDir)); err != nil || len(entries) > 0 {
		t.Errorf("got %v and error %v, want nothing made", entries, err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// AddCgroup makes a cgroup, with those above it, below the sandbox's. Close kills
// what runs there and removes it.
func (s *Sandbox) AddCgroup(path string) (string, error) {
	dir := filepath.Join(s.ownCgroup(), path)
	return dir, os.MkdirAll(dir, 0o755)
}

// ownCgroup is the part of Cgroup that no other sandbox of the process shares.
func (s *Sandbox) ownCgroup() string { return filepath.Join(s.Cgroup, filepath.Base(s.Base)) }

// StartIn calls start, such as Start of a pod, for a process in a cgroup.
func StartIn(cgroup string, start func(*exec.Cmd) error, cmd *exec.Cmd) error {
	dir, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer dir.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	return start(cmd)
}

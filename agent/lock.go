// SPDX-License-Identifier: Apache-2.0

// The lock of a run directory: one agent for each.

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/proc"
)

// errLocked says that another agent uses the run directory.
var errLocked = errors.New("another podshunt-agent is running")

// lockRunDir makes this process the only agent with the run directory, until the
// returned file is closed or the process ends. It returns errLocked if another one
// has it, by its number in the procfs of the node: in containers, many have the same.
func lockRunDir(dir, procfs string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			pid, _ := io.ReadAll(f)
			return nil, fmt.Errorf("%w: process %s holds %s", errLocked, strings.TrimSpace(string(pid)), path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	pid, err := proc.Self(procfs)
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(f, pid)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// isRunDirLocked reports whether an agent uses the run directory, also one that does not listen yet or any more.
func isRunDirLocked(dir string) bool {
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

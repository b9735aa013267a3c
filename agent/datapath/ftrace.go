// SPDX-License-Identifier: Apache-2.0

// Whether the kernel runs the guards that are attached.

package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/podshunt/podshunt/bpf"
)

// ftraceFile has 0 while the kernel calls none of the fentry, fexit and fmod_ret programs that
// are attached, nor says so to those who attach more (register_ftrace_direct in
// kernel/trace/ftrace.c). A kernel without the file calls them by other means.
const ftraceFile = "/proc/sys/kernel/ftrace_enabled"

// CheckFtrace returns an error if the kernel does not call tracing programs that are attached.
func CheckFtrace() error {
	content, err := os.ReadFile(ftraceFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("is ftrace enabled: %w", err)
	case bytes.Equal(bytes.TrimSpace(content), []byte("0")):
		return errors.New("kernel.ftrace_enabled is 0, so that the kernel does not call tracing programs (sysctl -w kernel.ftrace_enabled=1)")
	}
	return nil
}

// UpdateTraced lets every message go by TCP while the kernel does not call the guards, or the
// observer: those that are attached already just see nothing any more. It returns why that is
// so, or nil, and ErrUnloaded after an unload.
func (d *Datapath) UpdateTraced() (untraced, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, ErrUnloaded
	}
	if len(d.cfg.Guards) > 0 || d.observer == ObserverFexit {
		untraced = CheckFtrace()
	}
	return untraced, d.setControl(func(s *bpf.ShortcutSettings) { s.Untraced = number(untraced != nil) })
}

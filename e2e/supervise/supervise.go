// SPDX-License-Identifier: Apache-2.0

// Package supervise runs a program a second time, and afterwards removes what that
// run owns, however it ended: a directory, and a cgroup in each hierarchy, of its
// name. The next run removes what a killed one has left.
//
// It imports no module but golang.org/x/sys: e2e/cluster, whose go.mod is that of
// Kubernetes, has it by a link to this file.
package supervise

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// runEnv names the run to the process inside it.
	runEnv = "PODSHUNT_RUN"
	// removeTimeout is how long killed processes may take to leave their cgroups.
	removeTimeout = 10 * time.Second
)

// Runs are the runs of one kind of program.
type Runs struct {
	// Prefix is that of their names.
	Prefix string
	// Hierarchies are where cgroups are mounted in which a run may have one.
	Hierarchies []string
}

// Run is what one call of Supervise owns.
type Run struct {
	// Name is made of the prefix, the pid of the process that owns the run, and the
	// time at which that started, which together are never used twice before a reboot.
	Name string
	// Dir is made by Supervise, for root alone.
	Dir string
	// Cgroups are one in each hierarchy. Supervise makes none of them.
	Cgroups []string
}

func (k Runs) named(name string) Run {
	r := Run{Name: name, Dir: filepath.Join(os.TempDir(), name)}
	for _, h := range k.Hierarchies {
		r.Cgroups = append(r.Cgroups, filepath.Join(h, name))
	}
	return r
}

// NameOf names the run that a process would own. A process that has ended, reaped
// by its parent or not, gives fs.ErrNotExist.
func (k Runs) NameOf(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) {
		return "", fs.ErrNotExist // it ended between open and read
	}
	if err != nil {
		return "", err
	}
	// The command name, in parentheses, may contain anything; after it come the
	// state, field 3 of proc(5), and as field 22 the start time.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("parse /proc/%d/stat: %q", pid, stat)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return "", fs.ErrNotExist
	}
	return fmt.Sprintf("%s-%d-%s", k.Prefix, pid, fields[19]), nil
}

// Current returns the run that this process was started in by Supervise. The
// environment alone is not enough: what a run starts inherits it, and may call
// Supervise itself.
func (k Runs) Current() (Run, error) {
	name, err := k.NameOf(os.Getppid())
	if err != nil {
		return Run{}, err
	}
	if os.Getenv(runEnv) != name {
		return Run{}, errors.New("not inside a run")
	}
	return k.named(name), nil
}

// Supervise runs this program again, with its arguments, standard files and signals,
// and returns its exit status. It calls prepare before that, and after with how the
// run has ended.
func (k Runs) Supervise(prepare func(Run, *exec.Cmd) error, after func(Run, *os.ProcessState) error) (status int, err error) {
	// Pdeathsig is sent when the thread ends that started the child.
	runtime.LockOSThread()
	name, err := k.NameOf(os.Getpid())
	if err != nil {
		return 1, err
	}
	r := k.named(name)
	if err := k.sweep(); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, r.remove()) }()
	if err := os.Mkdir(r.Dir, 0o700); err != nil {
		return 1, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), runEnv+"="+r.Name)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// A terminal's interrupt then reaches it once, from us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := prepare(r, cmd); err != nil {
		return 1, err
	}
	if err := runAndSignal(cmd); err != nil {
		return 1, fmt.Errorf("start %s in run %s: %w", exe, r.Name, err)
	}
	err = after(r, cmd.ProcessState)
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal()), errors.Join(err, fmt.Errorf("run ended by signal: %v", ws.Signal()))
	}
	return cmd.ProcessState.ExitCode(), err
}

// runAndSignal runs cmd and passes signals on. How cmd ends is no error.
func runAndSignal(cmd *exec.Cmd) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			// It fails only when the process has just ended.
			_ = cmd.Process.Signal(s)
		case err := <-ended:
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
				return nil
			}
			return err
		}
	}
}

// sweep removes what runs have left whose owner is dead.
func (k Runs) sweep() error {
	pattern := regexp.MustCompile("^" + regexp.QuoteMeta(k.Prefix) + "-([0-9]+)-[0-9]+$")
	var errs []error
	for _, parent := range append(slices.Clone(k.Hierarchies), os.TempDir()) {
		entries, err := os.ReadDir(parent)
		errs = append(errs, err)
		for _, e := range entries {
			match := pattern.FindStringSubmatch(e.Name())
			if match == nil || !e.IsDir() {
				continue
			}
			pid, err := strconv.Atoi(match[1])
			if err != nil {
				continue
			}
			owner, err := k.NameOf(pid)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			} else if owner != e.Name() {
				errs = append(errs, k.named(e.Name()).remove())
			}
		}
	}
	return errors.Join(errs...)
}

// remove ends the processes in the cgroups and removes all that r owns. Its mounts
// go with its last process.
func (r Run) remove() error {
	var errs []error
	for _, c := range r.Cgroups {
		errs = append(errs, RemoveCgroup(c))
	}
	return errors.Join(append(errs, os.RemoveAll(r.Dir))...)
}

// RemoveCgroup kills the processes in a cgroup and removes it with its children. One
// that does not exist is no error.
func RemoveCgroup(path string) error {
	// In a hierarchy of version 1, which cannot, processes have to end by themselves.
	_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
	for deadline := time.Now().Add(removeTimeout); ; time.Sleep(10 * time.Millisecond) {
		err := removeTree(path)
		if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		// EBUSY until the killed processes have left.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
}

func removeTree(cgroup string) error {
	entries, err := os.ReadDir(cgroup)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(cgroup, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(cgroup)
}

// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/supervise"
)

// leakGrace is how long processes of a run may take to end after its main
// process before they count as leaked.
const leakGrace = time.Second

// Main calls body in a cgroup and a mount namespace of its own and returns the
// exit status for the process: os.Exit(sandbox.Main(m.Run)) in a TestMain, or
// the same with the body of a program. It must be called before anything else
// is started.
//
// To that end the process runs itself a second time, passes its arguments,
// standard files and signals on, and waits. Afterwards it ends what still runs
// in the cgroup and removes the cgroup and the directory of the run, however
// the second process ended; what that left behind (processes, cgroups, mounts,
// network namespaces, sandboxes that were not closed) makes the status 1. What
// earlier runs left whose owner is dead is removed first.
//
// Without root, Main only calls body; New then returns ErrNotRoot.
func Main(body func() int) int {
	if os.Geteuid() != 0 {
		return body()
	}
	status, err := half(body)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sandbox:", err)
		if status == 0 {
			status = 1
		}
	}
	return status
}

// cgroupRoot returns where cgroup2 is mounted.
func cgroupRoot() (string, error) {
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("find cgroup2 in /proc/mounts: not mounted; try `mount -t cgroup2 none /sys/fs/cgroup/unified`")
}

// runs are those of programs that call Main.
func runs() (supervise.Runs, error) {
	root, err := cgroupRoot()
	return supervise.Runs{Prefix: "podshunt", Hierarchies: []string{root}}, err
}

// current returns the run that this process was started in by Main, with a cgroup
// for all of its processes.
func current() (supervise.Run, error) {
	all, err := runs()
	if err != nil {
		return supervise.Run{}, err
	}
	r, err := all.Current()
	if err != nil {
		return r, fmt.Errorf("%w: call sandbox.Main from TestMain or main", err)
	}
	return r, nil
}

// half is what Main does outside of a run, or inside.
func half(body func() int) (int, error) {
	all, err := runs()
	if err != nil {
		return 1, err
	}
	if _, err := all.Current(); err == nil {
		return checked(body)
	}
	return all.Supervise(enclose, func(r supervise.Run, end *os.ProcessState) error {
		if !end.Exited() {
			return nil // it had no chance to clean up
		}
		return leaks(r)
	})
}

// enclose gives a run its cgroup and a mount namespace.
func enclose(r supervise.Run, cmd *exec.Cmd) error {
	if err := os.Mkdir(r.Cgroups[0], 0o755); err != nil {
		return err
	}
	// Not closed: it is needed when the process starts, and this one does little else.
	cgroup, err := unix.Open(r.Cgroups[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", r.Cgroups[0], err)
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, cgroup
	// With this flag os/exec also makes every mount private.
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	return nil
}

// checked is the inner half of Main: it returns the status of body, and an
// error that lists what body left behind in this process.
func checked(body func() int) (int, error) {
	mountsBefore, err := mountPoints()
	if err != nil {
		return 1, err
	}
	home, err := namespace("/proc/self/ns/net")
	if err != nil {
		return 1, err
	}
	status := body()

	mounts, err := mountPoints()
	errs := []error{err}
	for _, m := range mounts {
		if !slices.Contains(mountsBefore, m) {
			errs = append(errs, fmt.Errorf("leaked mount %s", m))
		}
	}
	for _, pattern := range []string{"/proc/self/task/*/ns/net", "/proc/self/fd/*"} {
		links, err := filepath.Glob(pattern)
		errs = append(errs, err)
		for _, link := range links {
			// A thread or a file may have gone meanwhile.
			if ns, err := namespace(link); err == nil && ns != 0 && ns != home {
				errs = append(errs, fmt.Errorf("leaked network namespace %d held by %s", ns, link))
			}
		}
	}
	return status, errors.Join(errs...)
}

// namespace returns the inode number of the namespace that a file stands for,
// 0 if it is another kind of file. The text of a link would not do: it is a
// path for a namespace that was opened by its bind mount.
func namespace(file string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(file, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		return 0, err
	}
	var st unix.Stat_t
	err := unix.Stat(file, &st)
	return st.Ino, err
}

// mountPoints lists this process's mounts in the order they were made.
func mountPoints() ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(info)) {
		points = append(points, strings.Fields(line)[4])
	}
	return points, nil
}

// leaks returns an error that lists what the processes of r left behind.
func leaks(r supervise.Run) error {
	var errs []error
	for deadline := time.Now().Add(leakGrace); ; time.Sleep(10 * time.Millisecond) {
		pids, err := os.ReadFile(filepath.Join(r.Cgroups[0], "cgroup.procs"))
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			break
		}
		if time.Now().After(deadline) {
			for _, pid := range strings.Fields(string(pids)) {
				command, _ := os.ReadFile("/proc/" + pid + "/comm")
				errs = append(errs, fmt.Errorf("leaked process %s (%s)", pid, strings.TrimSpace(string(command))))
			}
			break
		}
	}
	for _, dir := range []string{r.Cgroups[0], r.Dir} {
		entries, err := os.ReadDir(dir)
		errs = append(errs, err)
		for _, e := range entries {
			// The files of a cgroup are the kernel's.
			if dir == r.Dir || e.IsDir() {
				errs = append(errs, fmt.Errorf("leaked %s", filepath.Join(dir, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

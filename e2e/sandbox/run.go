// SPDX-License-Identifier: Apache-2.0

package sandbox

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
	// runEnv names the run to the process that Main starts inside it.
	runEnv = "PODSHUNT_SANDBOX_RUN"
	// leakGrace is how long processes of a run may take to end after its main
	// process before they count as leaked.
	leakGrace = time.Second
	// removeTimeout is how long a killed cgroup may take to become empty.
	removeTimeout = 5 * time.Second
)

// runPattern matches the name of a run: the pid of its owner and the time that
// process started, which together are never used twice before a reboot.
var runPattern = regexp.MustCompile(`^podshunt-([0-9]+)-[0-9]+$`)

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
	half := supervise
	if _, err := current(); err == nil {
		half = func() (int, error) { return checked(body) }
	}
	status, err := half()
	if err != nil {
		fmt.Fprintln(os.Stderr, "sandbox:", err)
		if status == 0 {
			status = 1
		}
	}
	return status
}

// run is what one call of Main owns.
type run struct {
	name string
	// dir is where its sandboxes keep their state.
	dir string
	// cgroup holds every process of the run but its owner.
	cgroup string
}

// newRun names the run that the process pid owns.
func newRun(pid int) (run, error) {
	name, err := processName(pid)
	if err != nil {
		return run{}, err
	}
	root, err := cgroupRoot()
	if err != nil {
		return run{}, err
	}
	return run{name: name, dir: filepath.Join(os.TempDir(), name), cgroup: filepath.Join(root, name)}, nil
}

// current returns the run that this process was started in by Main. The
// variable alone is not enough: programs started by a test inherit it, and may
// call Main themselves.
func current() (run, error) {
	r, err := newRun(os.Getppid())
	if err != nil {
		return run{}, err
	}
	if os.Getenv(runEnv) != r.name {
		return run{}, errors.New("not inside sandbox.Main: call it from TestMain or main")
	}
	return r, nil
}

// processName names the run of a process. A process that has ended, reaped by
// its parent or not, gives fs.ErrNotExist.
func processName(pid int) (string, error) {
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
	return fmt.Sprintf("podshunt-%d-%s", pid, fields[19]), nil
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

// supervise is the outer half of Main.
func supervise() (status int, err error) {
	// Pdeathsig is sent when the thread ends that started the child.
	runtime.LockOSThread()
	r, err := newRun(os.Getpid())
	if err != nil {
		return 1, err
	}
	if err := sweep(filepath.Dir(r.dir), filepath.Dir(r.cgroup)); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, r.remove()) }()
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		return 1, err
	}
	if err := os.Mkdir(r.cgroup, 0o755); err != nil {
		return 1, err
	}
	state, err := r.start()
	if err != nil {
		return 1, err
	}
	if ws := state.Sys().(syscall.WaitStatus); ws.Signaled() {
		// It had no chance to clean up.
		return 128 + int(ws.Signal()), fmt.Errorf("run ended by signal: %v", ws.Signal())
	}
	return state.ExitCode(), r.leaks()
}

// start runs this program again inside r until it ends.
func (r run) start() (*os.ProcessState, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cgroup, err := os.Open(r.cgroup)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()

	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), runEnv+"="+r.name)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
		// With this flag os/exec also makes every mount private.
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
		// A terminal's interrupt then reaches it once, from us.
		Setpgid: true,
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s in cgroup %s: %w", exe, r.cgroup, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			// It fails only when the process has just ended.
			_ = cmd.Process.Signal(s)
		case err := <-ended:
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
				return nil, err
			}
			return cmd.ProcessState, nil
		}
	}
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
func (r run) leaks() error {
	var errs []error
	for deadline := time.Now().Add(leakGrace); ; time.Sleep(10 * time.Millisecond) {
		pids, err := os.ReadFile(filepath.Join(r.cgroup, "cgroup.procs"))
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
	for _, dir := range []string{r.cgroup, r.dir} {
		entries, err := os.ReadDir(dir)
		errs = append(errs, err)
		for _, e := range entries {
			// The files of a cgroup are the kernel's.
			if dir == r.dir || e.IsDir() {
				errs = append(errs, fmt.Errorf("leaked %s", filepath.Join(dir, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

// remove ends the processes of r and removes all that it owns. Its mounts go
// with its last process.
func (r run) remove() error {
	return errors.Join(removeCgroup(r.cgroup), os.RemoveAll(r.dir))
}

// sweep removes what runs have left whose owner is dead.
func sweep(tempDir, cgroupRoot string) error {
	var errs []error
	for _, parent := range []string{cgroupRoot, tempDir} {
		entries, err := os.ReadDir(parent)
		errs = append(errs, err)
		for _, e := range entries {
			match := runPattern.FindStringSubmatch(e.Name())
			if match == nil || !e.IsDir() {
				continue
			}
			pid, err := strconv.Atoi(match[1])
			if err != nil {
				continue
			}
			owner, err := processName(pid)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			} else if owner != e.Name() {
				dead := run{dir: filepath.Join(tempDir, e.Name()), cgroup: filepath.Join(cgroupRoot, e.Name())}
				errs = append(errs, dead.remove())
			}
		}
	}
	return errors.Join(errs...)
}

// removeCgroup kills the processes in a cgroup and removes it with its
// children. A cgroup that does not exist is no error.
func removeCgroup(path string) error {
	err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
	for deadline := time.Now().Add(removeTimeout); err == nil; time.Sleep(10 * time.Millisecond) {
		// EBUSY until the killed processes have left.
		err = removeTree(path)
		if errors.Is(err, unix.EBUSY) && time.Now().Before(deadline) {
			err = nil
			continue
		}
		break
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("remove cgroup: %w", err)
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

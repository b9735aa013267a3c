// SPDX-License-Identifier: Apache-2.0

// Package cluster_test runs podshunt on a real Kubernetes cluster of two nodes:
// etcd, API server, controller manager, scheduler, and on each node an
// unmodified kubelet, kube-proxy, containerd and runc. kube-proxy is in iptables
// mode on the first node and in nftables mode on the second.
//
// A node is a set of namespaces of this machine. Nothing is touched outside of
// them but directories and cgroups that have the name of the run.
package cluster_test

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
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// runEnv names the run to the process that TestMain starts inside it.
	runEnv = "PODSHUNT_CLUSTER_RUN"
	// removeTimeout is how long killed processes may take to leave their cgroups.
	removeTimeout = 10 * time.Second
)

// runPattern matches the name of a run: the pid of its owner and the time that
// process started, which together are never used twice before a reboot.
var runPattern = regexp.MustCompile(`^podshunt-cluster-([0-9]+)-[0-9]+$`)

// TestMain runs the tests in a second process and cleans up after it, however it
// ends: a test that takes too long has no chance to do so itself.
func TestMain(m *testing.M) {
	half := supervise
	if owner, err := processName(os.Getppid()); err == nil && os.Getenv(runEnv) == owner {
		half = func() (int, error) { return runTests(m, run(owner)) }
	}
	status, err := half()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		if status == 0 {
			status = 1
		}
	}
	os.Exit(status)
}

// run is the name of what one call of TestMain owns.
type run string

// directory holds the state of its nodes.
func (r run) directory() string { return filepath.Join(os.TempDir(), string(r)) }

// processName names the run of a process. A process that has ended gives fs.ErrNotExist.
func processName(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) {
		return "", fs.ErrNotExist
	}
	if err != nil {
		return "", err
	}
	// The command's name, in parentheses, may contain anything; after it come the
	// state, field 3 of proc(5), and as field 22 the start time.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("parse /proc/%d/stat: %q", pid, stat)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return "", fs.ErrNotExist
	}
	return fmt.Sprintf("podshunt-cluster-%d-%s", pid, fields[19]), nil
}

// supervise runs this program again, and removes what the run has left.
func supervise() (status int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("needs root: run `make test-cluster`")
	}
	// Pdeathsig is sent when the thread ends that started the child.
	runtime.LockOSThread()
	name, err := processName(os.Getpid())
	if err != nil {
		return 1, err
	}
	r := run(name)
	if err := sweep(); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, r.remove()) }()
	if err := os.Mkdir(r.directory(), 0o755); err != nil {
		return 1, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), runEnv+"="+name)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// A terminal's interrupt then reaches it once, from us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case s := <-signals:
				_ = cmd.Process.Signal(s) // fails only when the process has just ended
			case <-ended:
				return
			}
		}
	}()
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = r.keepLogs()
	}
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal()), errors.Join(err, fmt.Errorf("run ended by signal: %v", ws.Signal()))
	}
	return cmd.ProcessState.ExitCode(), err
}

// keepLogs copies the logs of a failed run's daemons to where they outlive it.
func (r run) keepLogs() error {
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	kept := filepath.Join(cache, "logs")
	if err := os.RemoveAll(kept); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "cluster: logs of the nodes are in", kept)
	return os.CopyFS(kept, os.DirFS(filepath.Join(r.directory(), "logs")))
}

// sweep removes what runs have left whose owner is dead.
func sweep() error {
	parents := append(hierarchies(), os.TempDir())
	var errs []error
	for _, parent := range parents {
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
				errs = append(errs, run(e.Name()).remove())
			}
		}
	}
	return errors.Join(errs...)
}

// remove removes the cgroups and the directory of a run. Its processes, mounts
// and network namespaces have gone with process 1 of each node.
func (r run) remove() error {
	var errs []error
	for _, hierarchy := range hierarchies() {
		errs = append(errs, removeCgroup(filepath.Join(hierarchy, string(r))))
	}
	return errors.Join(append(errs, os.RemoveAll(r.directory()))...)
}

// hierarchies returns where cgroup hierarchies, of both versions, are mounted.
func hierarchies() []string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil // without /proc no run has ever started
	}
	var points []string
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[2] == "cgroup" || fields[2] == "cgroup2" {
			points = append(points, fields[1])
		}
	}
	return points
}

// removeCgroup removes a cgroup with its children. One that does not exist is no error.
func removeCgroup(path string) error {
	for deadline := time.Now().Add(removeTimeout); ; time.Sleep(20 * time.Millisecond) {
		err := removeTree(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		// EBUSY until the killed processes have left.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
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

// runTests is the inner half of TestMain.
func runTests(m *testing.M, r run) (int, error) {
	// Nodes end with the thread that has started them.
	runtime.LockOSThread()
	c, err := newCluster(r)
	if err != nil {
		return 1, err
	}
	defer c.stop()
	began := time.Now()
	if err := c.start(); err != nil {
		c.dump(os.Stderr)
		return 1, err
	}
	fmt.Printf("cluster: up in %.1f s\n", time.Since(began).Seconds())
	suite = c
	status := m.Run()
	c.printFigures(os.Stdout)
	return status, nil
}

// suite is the cluster that tests run on. TestMain has no other way to pass it.
var suite *cluster

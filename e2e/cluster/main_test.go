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
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/e2e/cluster/supervise"
)

// TestMain runs the tests in a second process and cleans up after it, however it
// ends: a test that takes too long has no chance to do so itself.
func TestMain(m *testing.M) {
	status, err := runHalf(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		if status == 0 {
			status = 1
		}
	}
	os.Exit(status)
}

// runHalf is what TestMain does outside of a run, or inside.
func runHalf(m *testing.M) (int, error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("needs root: run `make test-cluster`")
	}
	// The processes, mounts and network namespaces of a node go with its process 1.
	all := supervise.Runs{Prefix: "podshunt-cluster", Hierarchies: hierarchies()}
	if r, err := all.Current(); err == nil {
		return runTests(m, run(r.Name))
	}
	return all.Supervise(
		// Users of the nodes look into it.
		func(r supervise.Run, _ *exec.Cmd) error { return os.Chmod(r.Dir, 0o755) },
		func(r supervise.Run, end *os.ProcessState) error {
			if end.Success() {
				return nil
			}
			return run(r.Name).keepLogs()
		})
}

// run is the name of what one call of TestMain owns.
type run string

// directory holds the state of its nodes.
func (r run) directory() string { return filepath.Join(os.TempDir(), string(r)) }

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

// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// node is a machine of the cluster: namespaces that end with its process 1.
type node struct {
	number    int
	name      string
	proxyMode string // kube-proxy's
	cluster   *cluster
	init      *exec.Cmd
	daemons   map[string]*daemon
}

type daemon struct {
	args  []string
	cmd   *exec.Cmd
	ended chan struct{}
}

func (n *node) address() string { return fmt.Sprintf("10.89.0.%d", n.number) }

// podRange is the node's part of clusterCIDR.
func (n *node) podRange() string { return fmt.Sprintf("10.88.%d.0/24", n.number) }

// cgroup is the path of the node's pods in every hierarchy.
func (n *node) cgroup() string { return fmt.Sprintf("/%s/%s", n.cluster.run, n.name) }

// directory is the node's own tmpfs, as seen on the node.
func (n *node) directory() string { return filepath.Join(n.cluster.run.directory(), n.name) }

func (n *node) log(daemon string) string {
	return filepath.Join(n.cluster.run.directory(), "logs", n.name+"-"+daemon+".log")
}

// boot starts process 1 and returns when the node's namespaces are complete.
func (n *node) boot() error {
	if err := errors.Join(os.MkdirAll(filepath.Dir(n.log("init")), 0o755), os.Mkdir(n.directory(), 0o755)); err != nil {
		return err
	}
	log, err := os.Create(n.log("init"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("./node-init.sh", n.name, n.cgroup(), n.directory(), n.cluster.debs, n.cluster.bin)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.name, err)
	}
	n.init = cmd
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		text, _ := os.ReadFile(n.log("init"))
		return fmt.Errorf("boot %s: %q, %w: %s", n.name, line, err, text)
	}
	return nil
}

func (n *node) pid() string { return strconv.Itoa(n.init.Process.Pid) }

// halt ends all processes of the node.
func (n *node) halt() {
	if n.init != nil {
		_ = n.init.Process.Kill() // fails only when it has ended
		_ = n.init.Wait()         // always "signal: killed"
	}
}

// command returns a command that runs on the node, and ends when ctx does.
func (n *node) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", n.pid(), "--mount", "--net", "--pid", "--uts", "--",
		// Killing nsenter would leave its child running.
		"setpriv", "--pdeathsig", "KILL", name,
	}, args...)...)
	cmd.Env = []string{
		"PATH=" + n.cluster.bin + ":/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + n.cluster.run.directory(),
		"KUBECONFIG=" + n.cluster.kubeconfig(),
		"LANG=C.UTF-8",
	}
	return cmd
}

// output runs a command on the node and returns what it prints.
func (n *node) output(timeout time.Duration, stdin io.Reader, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := n.command(ctx, name, args...)
	var stdout, stderr strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s on %s: %w: %s", strings.Join(append([]string{filepath.Base(name)}, args...), " "), n.name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// script runs shell commands on the node, and ends at the first that fails.
func (n *node) script(text string) error {
	_, err := n.output(stepTimeout, strings.NewReader(text), "bash", "-euo", "pipefail", "-s")
	return err
}

// startDaemon runs a program on the node until stopDaemon.
func (n *node) startDaemon(name string, args ...string) error {
	log, err := os.OpenFile(n.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := n.command(context.Background(), name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s on %s: %w", name, n.name, err)
	}
	d := &daemon{args: args, cmd: cmd, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the log tells why
		close(d.ended)
	}()
	n.daemons[name] = d
	return nil
}

// stopDaemon kills a program that startDaemon started.
func (n *node) stopDaemon(name string) {
	d := n.daemons[name]
	_ = d.cmd.Process.Kill() // fails only when it has ended
	<-d.ended
}

// restartDaemon starts a program as it was started before.
func (n *node) restartDaemon(name string) error { return n.startDaemon(name, n.daemons[name].args...) }

// running returns an error that names the daemons that have ended.
func (n *node) running() error {
	var errs []error
	for name, d := range n.daemons {
		select {
		case <-d.ended:
			errs = append(errs, fmt.Errorf("%s on %s has ended: %s", name, n.name, tail(n.log(name), 10)))
		default:
		}
	}
	return errors.Join(errs...)
}

// tail returns the last lines of a file.
func tail(file string, lines int) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return lastLines(string(text), lines)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

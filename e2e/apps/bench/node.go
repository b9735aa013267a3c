// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/apps/overlay"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// What a user sets so that all of the programs take part, whatever the hazards of the
// kernel: the one place where bench knows of it.
const (
	acceptHazards = "--accept-hazards=fionread-tcp,fionread-redirected,splice,blocking-recv"
	takesPart     = api.AnnotationShortcut + ": enabled"
)

const (
	// startTimeout is how long a server may take until it answers.
	startTimeout = time.Minute
	// stopTimeout is how long it may take to end.
	stopTimeout = 30 * time.Second
	// grace is what a client may take besides its own time: a connection that stalls
	// fails by it.
	grace = 20 * time.Second
)

// receiveBuffer and congestion are the kernel's own defaults on machines with some
// gigabytes of memory, as in hack/bench. A machine may be tuned, but users' mostly are not.
const (
	receiveBuffer = "4096 131072 6291456"
	congestion    = "cubic"
)

// variant is a way for a client and a server to be connected.
type variant string

const (
	// tcp runs in cgroups to which no program of podshunt is attached.
	tcp        variant = "TCP"
	shortcut   variant = "shortcut"
	unixSocket variant = "Unix socket"
)

// side is one pod, and what runs there.
type side string

const (
	client side = "client"
	proxy  side = "proxy"
	server side = "server"
)

// sides in the order in which their processor time is shown.
func sides() []side { return []side{server, proxy, client} }

// placement says which CPU each side is pinned to; a side that is missing is not.
type placement struct {
	name string
	cpus map[side]int
}

// node is three pods, wired by CNI plugins, and an agent that sees one cgroup of two.
type node struct {
	*sandbox.Agent
	pods map[side]*sandbox.Pod
	// dir is a directory that the account may pass through.
	dir string
	// stderr is where progress and the agent's log go.
	stderr io.Writer
}

func newNode(ctx context.Context, stderr io.Writer) (_ *node, err error) {
	s, err := sandbox.New(sandbox.Config{Podshunt: true})
	if err != nil {
		return nil, err
	}
	n := &node{Agent: s.NewAgent(), pods: map[side]*sandbox.Pod{}, stderr: stderr}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	n.Log = n.stderr
	if n.dir, err = os.MkdirTemp("", "podshunt-bench-"); err != nil {
		return nil, err
	}
	if err := os.Chmod(n.dir, 0o711); err != nil {
		return nil, err
	}
	watched, err := n.AddCgroup("watched")
	if err != nil {
		return nil, err
	}
	var entries []string
	for _, side := range sides() {
		entries = append(entries, string(side)+" "+takesPart)
	}
	if err := n.WritePods(entries...); err != nil {
		return nil, err
	}
	if err := n.Start(ctx, acceptHazards, "--cgroup="+watched); err != nil {
		return nil, err
	}
	for _, side := range sides() {
		p, err := n.AddPod(string(side), sandbox.PodOptions{})
		if err != nil {
			return nil, err
		}
		n.pods[side] = p
		for name, value := range map[string]string{
			"net.ipv4.tcp_rmem": receiveBuffer,
			// Else the thousands of connections of one run would still be around, in
			// TIME_WAIT, to take ports and time from the next.
			"net.ipv4.tcp_max_tw_buckets": "0",
			// wrk has a connection for each request.
			"net.ipv4.ip_local_port_range": "10000 65000",
		} {
			if err := p.Sysctl(name, value); err != nil {
				return nil, err
			}
		}
		if err := p.Do(setCongestion); err != nil {
			return nil, err
		}
	}
	status, err := sandbox.Show[api.Status](ctx, n.Agent, "status")
	if err != nil {
		return nil, err
	}
	for _, p := range status.Pods {
		if !p.Enrolled {
			return nil, fmt.Errorf("pod %s takes no part: %s", p.Pod, p.Message)
		}
	}
	return n, nil
}

// setCongestion sets the congestion control of all connections of the thread's network
// namespace, by its routes: the kernel refuses the sysctl where the machine has another.
func setCongestion() error {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, r := range routes {
		r.Congctl = congestion
		if err := netlink.RouteReplace(&r); err != nil {
			return fmt.Errorf("set congestion control of route %s: %w", r, err)
		}
	}
	return nil
}

// close takes everything down; the programs have ended.
func (n *node) close() error {
	var errs []error
	if n.dir != "" {
		errs = append(errs, os.RemoveAll(n.dir))
	}
	return errors.Join(append(errs, n.Stop(), n.Close())...)
}

// cgroup is that of a side in a variant.
func (n *node) cgroup(v variant, at side) (string, error) {
	root := "plain"
	if v == shortcut {
		root = "watched"
	}
	return n.AddCgroup(filepath.Join(root, strings.ReplaceAll(strings.ToLower(string(v)), " ", "-")+"-"+string(at)))
}

// process is what to run, as the account unless it is this program itself.
type process struct {
	side    side
	command []string
	// end is the signal that ends a server. Default: SIGTERM.
	end syscall.Signal
	// port is where a server listens on TCP, socket where on a Unix socket, if it does.
	port   uint16
	socket string
	// ready returns when a server that listens also answers, if that is not the same.
	ready func(context.Context, instance) error
}

// command prepares a process in a directory.
func (n *node) command(ctx context.Context, dir string, p process) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.command[0], p.command[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "USER="+overlay.AccountName)
	cmd.WaitDelay = stopTimeout
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if p.command[0] != self {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: overlay.AccountID, Gid: overlay.AccountID}
	}
	return cmd
}

// start starts a process in the pod and the cgroup of its side, on the side's CPU.
func (n *node) start(cmd *exec.Cmd, v variant, at side, where placement) error {
	cgroup, err := n.cgroup(v, at)
	if err != nil {
		return err
	}
	// A process begins on the CPUs of the thread that starts it.
	return pinned(where.cpus, at, func() error { return sandbox.StartIn(cgroup, n.pods[at].Start, cmd) })
}

// pinned calls fn with the thread on the CPU of a side, if it has one.
func pinned(cpus map[side]int, at side, fn func() error) error {
	cpu, ok := cpus[at]
	if !ok {
		return fn()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return err
	}
	one.Set(cpu)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", cpu, err)
	}
	err := fn()
	return errors.Join(err, unix.SchedSetaffinity(0, &before))
}

// run runs a process to its end and returns what it prints.
func (n *node) run(ctx context.Context, dir string, v variant, where placement, p process, stdin io.Reader) (string, error) {
	cmd := n.command(ctx, dir, p)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := n.start(cmd, v, p.side, where)
	if err == nil {
		err = cmd.Wait()
	}
	if ctx.Err() != nil {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(p.command, " "), err, tail(stderr.String()+stdout.String()))
	}
	return stdout.String(), err
}

// serve starts a server, and returns when it listens. stop ends it.
func (n *node) serve(ctx context.Context, dir string, v variant, where placement, p process) (stop func() error, err error) {
	// It outlives ctx, to be ended in its own way: one that is killed leaves its
	// children behind.
	cmd := n.command(context.WithoutCancel(ctx), dir, p)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := n.start(cmd, v, p.side, where); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.command[0], err)
	}
	ended := make(chan struct{})
	var end error
	go func() {
		defer close(ended)
		end = cmd.Wait()
	}()
	stop = func() error {
		signal := p.end
		if signal == 0 {
			signal = syscall.SIGTERM
		}
		_ = cmd.Process.Signal(signal) // it fails if the server has ended
		select {
		case <-ended: // many a server calls its signal an error
			return nil
		case <-time.After(stopTimeout):
			err := errors.Join(fmt.Errorf("%s does not end", p.command[0]), cmd.Process.Kill())
			<-ended
			return err
		}
	}
	deadline := time.Now().Add(startTimeout)
	for {
		err := n.answers(p)
		if err == nil {
			return stop, nil
		}
		select {
		case <-ended:
			return nil, errors.Join(fmt.Errorf("%s has ended: %s", strings.Join(p.command, " "), tail(log.String())), end)
		case <-time.After(20 * time.Millisecond):
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("%s does not listen: %w: %s", p.command[0], err, tail(log.String())), stop())
		}
	}
}

// answers tries where a server listens from the node, whose connections are never paired.
func (n *node) answers(p process) error {
	if p.port != 0 {
		c, err := n.Node.Dial("tcp", n.address(p).String(), time.Second)
		if err != nil {
			return err
		}
		if err := c.Close(); err != nil {
			return err
		}
	}
	if p.socket != "" {
		c, err := net.Dial("unix", p.socket)
		if err != nil {
			return err
		}
		return c.Close()
	}
	return nil
}

// address is where a server listens.
func (n *node) address(p process) netip.AddrPort {
	return netip.AddrPortFrom(n.pods[p.side].IPv4, p.port)
}

// tail is the end of what a program has printed, on one line.
func tail(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	const most = 400
	if len(s) > most {
		s = "…" + s[len(s)-most:]
	}
	return s
}

// counters are what the machine has counted up to a moment.
type counters struct {
	// cpu is the processor time of each side's cgroup.
	cpu map[side]time.Duration
	// softirq is what the machine spent in interrupts and softirqs: of it, what ran in
	// the time of a process is also in cpu.
	softirq time.Duration
}

func (n *node) count(v variant) (counters, error) {
	c := counters{cpu: map[side]time.Duration{}}
	for _, at := range sides() {
		cgroup, err := n.cgroup(v, at)
		if err != nil {
			return c, err
		}
		text, err := os.ReadFile(filepath.Join(cgroup, "cpu.stat"))
		if err != nil {
			return c, err
		}
		if c.cpu[at], err = parseCPUStat(string(text)); err != nil {
			return c, err
		}
	}
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return c, err
	}
	c.softirq, err = parseStat(string(text))
	return c, err
}

// parseCPUStat reads the processor time from the cpu.stat of a cgroup.
func parseCPUStat(text string) (time.Duration, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, "usage_usec "); ok {
			us, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return time.Duration(us) * time.Microsecond, err
		}
	}
	return 0, errors.New("cpu.stat has no usage_usec")
}

// parseStat reads what all CPUs spent in interrupts and softirqs from /proc/stat.
func parseStat(text string) (time.Duration, error) {
	const tick = 10 * time.Millisecond // of USER_HZ
	first, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(first) // cpu user nice system idle iowait irq softirq
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", first)
	}
	irq, err := strconv.ParseInt(fields[6], 10, 64)
	softirq, err2 := strconv.ParseInt(fields[7], 10, 64)
	return time.Duration(irq+softirq) * tick, errors.Join(err, err2)
}

// traffic is what the kernel programs have counted, in bytes of paired connections.
type traffic struct{ sent, shortcut uint64 }

func (n *node) traffic(ctx context.Context) (traffic, error) {
	status, err := sandbox.Show[api.Status](ctx, n.Agent, "status")
	var t traffic
	for _, o := range status.Outcomes {
		if o.Kind == api.OutcomeMessage {
			t.sent += o.Bytes
		}
		if o.String() == "message_shortcut" {
			t.shortcut = o.Bytes
		}
	}
	return t, err
}

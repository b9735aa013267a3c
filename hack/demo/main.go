// SPDX-License-Identifier: Apache-2.0

// Demo shows podshunt at work on this machine without a cluster: two pods wired
// by CNI plugins, an agent, and the same measurements over plain TCP, over the
// shortcut, through a service address and over a unix socket. It needs root and
// touches only what it makes itself.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/measure"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

const (
	// serverPort is shortcut; excludedPort is what the demo keeps on TCP by annotation.
	serverPort   = 8000
	excludedPort = 9000
	// serviceAddress stands for a ClusterIP.
	serviceAddress = "10.96.0.1:80"
	// timeout limits each thing but a measurement that the demo waits for.
	timeout = 10 * time.Second
)

func main() {
	os.Exit(measure.Main(func() int { return sandbox.Main(body) }))
}

func body() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	bin := flags.String("bin", "bin", "`directory` of podshunt-agent and the CNI plugins")
	duration := flags.Duration("duration", 500*time.Millisecond, "how long one measurement counts")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s, err := sandbox.New(sandbox.Config{BinDir: *bin, Podshunt: true})
	if err != nil {
		return err
	}
	var log bytes.Buffer
	d := &demo{out: stdout, sandbox: s, agent: s.NewAgent(), duration: *duration}
	d.agent.Log = &log
	// After a failure or an interrupt this is the whole clean-up: the pins go with the sandbox's bpffs.
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := d.show(ctx); err != nil {
		err = errors.Join(err, d.agent.Stop())
		if ctx.Err() != nil {
			return errors.New("interrupted; cleaned up")
		}
		return errors.Join(err, fmt.Errorf("log of the agent:\n%s", &log))
	}
	if err := s.Close(); err != nil {
		return err
	}
	d.say("cleaned up")
	return nil
}

// demo is what the sections share.
type demo struct {
	out            io.Writer
	sandbox        *sandbox.Sandbox
	duration       time.Duration
	agent          *sandbox.Agent
	client, server *sandbox.Pod
	service        netip.AddrPort
}

// say prints a line, with $DIR for the long name of the directory that all is in.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintln(d.out, strings.ReplaceAll(fmt.Sprintf(format, args...), d.sandbox.Base, "$DIR"))
}

func (d *demo) section(title string) { d.say("\n== %s", title) }

// quote prints what another program has printed.
func (d *demo) quote(text string) {
	for line := range strings.Lines(text) {
		d.say("   %s", strings.TrimRight(line, "\n "))
	}
}

func (d *demo) show(ctx context.Context) error {
	if err := d.startAgent(ctx); err != nil {
		return err
	}
	if err := d.addPods(); err != nil {
		return err
	}
	if err := d.compare(ctx); err != nil {
		return err
	}
	open, err := d.showFlows(ctx)
	if err != nil {
		return err
	}
	defer open.close()
	if err := d.showExcluded(ctx); err != nil {
		return err
	}
	if err := d.showCounters(ctx); err != nil {
		return err
	}
	return d.unload(ctx, open)
}

func (d *demo) startAgent(ctx context.Context) error {
	d.say("podshunt: TCP between two pods of one machine, by the stack and by the shortcut")
	fmt.Fprintf(d.out, "DIR=%s\n", d.sandbox.Base)
	d.section("The agent")
	if err := d.writePods("disabled"); err != nil {
		return err
	}
	// Ping-pong waits inside of recv.
	const accept = "--accept-hazards=fionread-tcp,fionread-redirected,splice,blocking-recv"
	d.say("podshunt-agent %s", strings.Join(d.agent.RunArgs(accept), " \\\n   "))
	soon, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := d.agent.Start(soon, accept); err != nil {
		return err
	}
	status, err := d.status(ctx)
	if err != nil {
		return err
	}
	d.say("It runs on Linux %s and sees applications read by %s.", status.Kernel, status.Observer)
	var present []api.Hazard
	for _, h := range status.Hazards {
		if h.Present {
			present = append(present, h)
		}
	}
	if len(present) == 0 {
		d.say("This kernel has no hazards.")
		return nil
	}
	d.say("This kernel serves shortcut sockets differently from plain TCP:")
	t := newTable(d.out, 0)
	for _, h := range present {
		consequence := ""
		switch accepted := slices.Contains(status.AcceptedHazards, h.Name); {
		case accepted && h.Fatal:
			consequence = " (accepted; by default, no pod would take part here)"
		case accepted && h.Guard == "":
			consequence = " (accepted; by default, sockets in blocking mode would stay on TCP)"
		}
		fmt.Fprintf(t, "   %s\t%s%s\n", h.Name, h.Detail, consequence)
	}
	return t.Flush()
}

func newTable(w io.Writer, flags uint) *tabwriter.Writer {
	return tabwriter.NewWriter(w, 0, 0, 2, ' ', flags)
}

func (d *demo) status(ctx context.Context) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return sandbox.Show[api.Status](ctx, d.agent, "status")
}

// command runs a command of the agent and prints what it prints.
func (d *demo) command(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	text, err := d.agent.Run(ctx, name, d.agent.RunDir())
	if err != nil {
		return err
	}
	d.quote(text)
	return nil
}

// writePods writes the pods file with both pods opted in ("enabled") or out ("disabled").
func (d *demo) writePods(shortcut string) error {
	opted := api.AnnotationShortcut + ": " + shortcut
	return d.agent.WritePods("client "+opted, fmt.Sprintf("server %s, %s: '%d'", opted, api.AnnotationExcludePorts, excludedPort))
}

func (d *demo) addPods() (err error) {
	d.section("Two pods, wired by this conflist")
	var conflist struct {
		Name    string
		Version string            `json:"cniVersion"`
		Plugins []json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(d.sandbox.Conflist()), &conflist); err != nil {
		return err
	}
	d.say(`{"cniVersion": %q, "name": %q, "plugins": [`, conflist.Version, conflist.Name)
	for i, plugin := range conflist.Plugins {
		comma := ","
		if i == len(conflist.Plugins)-1 {
			comma = "]}"
		}
		var line bytes.Buffer
		if err := json.Compact(&line, plugin); err != nil {
			return err
		}
		d.say("   %s%s", &line, comma)
	}
	if d.client, err = d.sandbox.AddPod("client", sandbox.PodOptions{}); err != nil {
		return err
	}
	if d.server, err = d.sandbox.AddPod("server", sandbox.PodOptions{}); err != nil {
		return err
	}
	d.service = netip.MustParseAddrPort(serviceAddress)
	if err := d.sandbox.DNAT(d.service, d.address()); err != nil {
		return err
	}
	d.say("client %s, server %s, service address %s -> %s (DNAT)", d.client.IPv4, d.server.IPv4, d.service, d.address())
	return nil
}

func (d *demo) address() netip.AddrPort { return netip.AddrPortFrom(d.server.IPv4, serverPort) }

func (d *demo) showFlows(ctx context.Context) (*conversation, error) {
	d.section("A connection through the service address, as `podshunt-agent flows` shows it")
	c, err := d.converse(serverPort, d.service)
	if err != nil {
		return nil, err
	}
	if err := d.command(ctx, "flows"); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (d *demo) showExcluded(ctx context.Context) error {
	d.section(fmt.Sprintf("Next to one that stays on TCP, because the server has %s=%d", api.AnnotationExcludePorts, excludedPort))
	c, err := d.converse(excludedPort, netip.AddrPortFrom(d.server.IPv4, excludedPort))
	if err != nil {
		return err
	}
	defer c.close()
	return d.command(ctx, "flows")
}

func (d *demo) showCounters(ctx context.Context) error {
	d.section("What the kernel programs have counted (from `podshunt-agent status`)")
	status, err := d.status(ctx)
	if err != nil {
		return err
	}
	t := newTable(d.out, 0)
	for _, o := range status.Outcomes {
		if o.Count > 0 {
			size := ""
			if o.Bytes > 0 {
				size = fmt.Sprintf("%d bytes", o.Bytes)
			}
			fmt.Fprintf(t, "   %s\t%d\t%s\n", o, o.Count, size)
		}
	}
	return t.Flush()
}

func (d *demo) unload(ctx context.Context, open *conversation) error {
	d.section("podshunt-agent unload")
	if err := d.command(ctx, "unload"); err != nil {
		return err
	}
	if err := open.exchange(); err != nil {
		return fmt.Errorf("use the open connection after the unload: %w", err)
	}
	d.say("   the open connection went on, by TCP")
	if err := d.agent.Stop(); err != nil {
		return err
	}
	if _, err := os.Stat(d.sandbox.PinDir); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("unload left %s", d.sandbox.PinDir), err)
	}
	cgroup, err := os.Open(d.sandbox.Cgroup)
	if err != nil {
		return err
	}
	defer cgroup.Close()
	attached, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: ebpf.AttachCGroupSockOps})
	if err != nil {
		return fmt.Errorf("look for programs on the cgroup: %w", err)
	}
	if len(attached.Programs) > 0 {
		return fmt.Errorf("unload left %d programs on the cgroup", len(attached.Programs))
	}
	d.say("   no program is attached to the cgroup, nothing is pinned")
	return nil
}

// conversation is an open connection from the client pod to the server pod.
type conversation struct {
	listener       net.Listener
	client, server net.Conn
}

// converse connects to the server pod's port, where dial leads, and exchanges a few messages.
func (d *demo) converse(port uint16, dial netip.AddrPort) (_ *conversation, err error) {
	c := &conversation{}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.listener, err = d.server.Listen("tcp", netip.AddrPortFrom(d.server.IPv4, port).String()); err != nil {
		return nil, err
	}
	if c.client, err = d.client.Dial("tcp", dial.String(), timeout); err != nil {
		return nil, err
	}
	if err := c.listener.(*net.TCPListener).SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	if c.server, err = c.listener.Accept(); err != nil {
		return nil, err
	}
	return c, c.exchange()
}

// exchange sends messages there and back, as a client and a server do that each
// wait for the other. The first ones go by TCP: each receiver has to show how it
// reads.
func (c *conversation) exchange() error {
	const messages, size = 200, 1000
	deadline := time.Now().Add(timeout)
	if err := errors.Join(c.client.SetDeadline(deadline), c.server.SetDeadline(deadline)); err != nil {
		return err
	}
	answered := make(chan error, 1)
	go func() { answered <- echo(c.server, messages*size) }()
	buf := make([]byte, 4*size)
	for range messages {
		if _, err := c.client.Write(buf[:size]); err != nil {
			return err
		}
		if _, err := io.ReadAtLeast(c.client, buf, size); err != nil {
			return err
		}
	}
	return <-answered
}

// echo sends back what it reads, until that is so many bytes.
func echo(c net.Conn, bytes int) error {
	buf := make([]byte, 4096)
	for bytes > 0 {
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return err
		}
		bytes -= n
	}
	return nil
}

func (c *conversation) close() {
	for _, closer := range []io.Closer{c.client, c.server, c.listener} {
		if closer != nil {
			closer.Close()
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

// The command run: the agent's parts, and how they are joined.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/cri"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/hazards"
	"github.com/podshunt/podshunt/agent/kube"
	"github.com/podshunt/podshunt/agent/nat"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

const (
	// sweepInterval is the time between two sweeps of the datapath.
	sweepInterval = 30 * time.Second
	// handshakeAge is the age at which a sweep deletes the entries of a handshake. A client may retry its
	// SYN for longer, but each SYN writes a new entry.
	handshakeAge = time.Minute
)

func newRunCommand() *cobra.Command {
	cfg := defaults()
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the agent of this node",
		Long: `Runs the agent of this node, as root, until SIGTERM or SIGINT. After that,
connections go on as they are, and the next agent takes them over. "podshunt-agent
unload" takes podshunt out of the kernel. With --own-pod the agent uninstalls before
it ends, if it ends because its DaemonSet or namespace is deleted.

Either the cluster (--node-name) or a file (--pods-file) says which pods take part.
With --cni-conf-dir and --cni-bin-dir the agent installs the CNI plugin, the program
podshunt beside this one, in the container runtime's configuration, and keeps it
there.

` + hazardsHelp() + "\n" + guardsHelp,
		Example: `  podshunt-agent run --node-name=worker-1
  podshunt-agent run --pods-file=/etc/podshunt/pods.yaml --cni-conf-dir=/etc/cni/net.d --cni-bin-dir=/opt/cni/bin
  podshunt-agent run --node-name=worker-1 --disable-guards=splice,ulp`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cfg.complete(); err != nil {
				return err
			}
			return runAgent(cmd.Context(), cfg, newLogger(cmd.ErrOrStderr(), cfg))
		},
	}
	cfg.register(cmd)
	return cmd
}

// runAgent runs the agent until ctx ends.
func runAgent(ctx context.Context, cfg config, log *slog.Logger) error {
	lock, err := lockRunDir(cfg.runDir, cfg.proc)
	if err != nil {
		return err
	}
	defer lock.Close()
	runtime := cri.NewNode(cfg.proc, log)
	var dirs api.Runtime // to be written to
	if cfg.installs() {
		dirs, _ = runtime.Runtime()
	}
	kernelReport := withNode(cfg.kernelReport(), nodeReport(cfg.proc, dirs))
	if kernelReport.Reason == api.KernelLacksFeatures {
		return errors.New(kernelReport.Message)
	}
	host, err := hostNetns(cfg.proc, log)
	if err != nil {
		return err
	}
	cfg.datapath.AllowBlocking = slices.Contains(kernelReport.AcceptedHazards, hazards.BlockingRecv) || !present(kernelReport.Hazards, hazards.BlockingRecv)
	cfg.datapath.Guards = guardsIn(kernelReport.Hazards)
	for {
		err := runOnce(ctx, cfg, kernelReport, host, runtime, log)
		if !errors.Is(err, errDrained) {
			return err
		}
	}
}

// runOnce is runAgent until the kernel objects of before are drained, if they have to be: then
// it returns errDrained, and has to be called again.
func runOnce(ctx context.Context, cfg config, kernelReport api.KernelReport, host []uint64, runtime *cri.Node, log *slog.Logger) error {
	src, err := openSource(cfg, kernelReport.Message, log)
	if err != nil {
		return err
	}
	d, err := datapath.Open(cfg.datapath, log)
	if err != nil {
		return withCgroupAdvice(err, kernelReport.Node)
	}
	defer d.Close()
	reconciler, err := pods.New(pods.Config{
		Dir:         attachmentsIn(cfg.runDir),
		Source:      src,
		Proc:        cfg.proc,
		HostNetns:   host,
		Refused:     !kernelReport.TakesPart,
		Refusal:     kernelReport.Message,
		Report:      src.report,
		Datapath:    d,
		MaxPolicies: int(cfg.datapath.MaxPolicies),
		Redirects:   nat.Redirects,
		NetnsCookie: datapath.NetnsCookie,
		Now:         time.Now,
		Log:         log,
	})
	if err != nil {
		return err
	}
	n := newNode(reconciler, d, cfg, kernelReport, log)
	if d.Replacing() {
		reconciler.Stop(replacingMessage)
	}
	reconciler.Sync()
	n.lease = &lease{datapath: d, length: cfg.policyLease, log: log, vouch: func(now time.Time) error {
		// An agent that hangs must not vouch for the policy.
		return cmp.Or(reconciler.Alive(), src.vouch(now))
	}}
	n.runtime = runtime
	if cfg.installs() {
		cfg.cni.Log, cfg.cni.Runtime = log, n.runtime.Runtime
		n.installer = cniconf.New(cfg.cni)
	}
	socket := socketIn(cfg.runDir)
	listener, err := server.Listen(socket)
	if err != nil {
		return err
	}
	defer os.Remove(socket)
	log.Info("agent started", "version", version, "socket", socket, "pin_dir", cfg.datapath.PinDir,
		"cgroup", d.Cgroup(), "observer", d.Observer())
	if err := d.NoWatch(); err != nil {
		log.Warn("connections join at their handshake, which slows short ones down", "reason", err)
	}
	if err := d.NoJoin(); err != nil {
		log.Info("open connections stay on TCP until they are made anew", "reason", err)
	}
	if kernelReport.Message != "" {
		log.Error("no pod takes part", "reason", kernelReport.Message)
	}
	for _, w := range kernelReport.Node.Warnings {
		log.Warn("the node keeps podshunt from working as wanted", "code", w.Code, "reason", w.Message)
	}
	for _, h := range acceptedHazards(kernelReport.Hazards, kernelReport.AcceptedHazards) {
		log.Warn("a hazard of this kernel is accepted, and programs break", "hazard", h.Name, "programs", h.Consequence)
	}

	metrics := newMetrics(d, n.fixed, reconciler.Snapshot, n.unloaded.Load, n.lease.state)
	signalled := ctx.Done()
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	for _, port := range []struct {
		flag, address string
		serve         func(net.Listener) error
	}{
		{"health-address", cfg.healthAddress, func(l net.Listener) error { return server.ServeHealth(ctx, l, reconciler.Alive, n.ready, log) }},
		{"metrics-address", cfg.metricsAddress, func(l net.Listener) error { return server.ServeMetrics(ctx, l, metrics, log) }},
	} {
		if port.address == "" {
			continue
		}
		l, err := net.Listen("tcp", port.address)
		if err != nil {
			// Stop what the group serves already.
			stop()
			return errors.Join(fmt.Errorf("listen for --%s: %w", port.flag, err), listener.Close(), group.Wait())
		}
		group.Go(func() error { return port.serve(l) })
	}
	group.Go(func() error { return src.run(ctx) })
	group.Go(func() error { return reconciler.Run(ctx) })
	group.Go(func() error { return server.Serve(ctx, listener, measure(reconciler, metrics), n, log) })
	group.Go(func() error { return sweep(ctx, d, log) })
	group.Go(func() error { return watchTraced(ctx, d, log) })
	group.Go(func() error { return joinOpen(ctx, d, reconciler.Snapshot, log) })
	group.Go(func() error { return joinWatched(ctx, d, log) })
	group.Go(func() error { return n.lease.run(ctx) })
	if d.Replacing() {
		group.Go(func() error { return n.drain(ctx) })
	}
	if n.installer != nil {
		group.Go(func() error { return n.installer.Run(ctx) })
	}
	group.Go(func() error {
		select {
		case <-signalled:
			n.uninstallIf(ctx, src.removed, cfg.uninstallTimeout, cfg.uninstallForce)
			stop()
		case <-ctx.Done():
		}
		return nil
	})
	err = group.Wait()
	log.Info("agent stopped")
	return err
}

// source is a pods.Source with the functions that main needs of it.
type source struct {
	pods.Source
	run    func(context.Context) error
	report func([]pods.Pod) // sends Events; nil without a cluster
	vouch  func(now time.Time) error
	// removed reports whether podshunt is being removed from the cluster.
	removed func(context.Context) (bool, error)
}

func openSource(cfg config, refusal string, log *slog.Logger) (source, error) {
	if cfg.podsFile != "" {
		file := pods.NewFile(cfg.podsFile)
		run := func(ctx context.Context) error { return file.Run(ctx, log) }
		return source{
			Source: file, run: run,
			vouch:   func(time.Time) error { return nil },
			removed: func(context.Context) (bool, error) { return false, nil },
		}, nil
	}
	cluster, err := kube.Open(kube.Config{
		Kubeconfig:              cfg.kubeconfig,
		NodeName:                cfg.nodeName,
		SandboxedRuntimeClasses: cfg.sandboxed,
		DefaultNamespaces:       cfg.defaultNamespaces,
		Refusal:                 refusal,
		OwnPod:                  cfg.ownPod,
		UserAgent:               "podshunt-agent/" + version,
		Log:                     log,
	})
	if err != nil {
		return source{}, err
	}
	return source{cluster, cluster.Run, cluster.Report, cluster.Vouch, cluster.Removed}, nil
}

// sweep calls d.Sweep now and then, until ctx ends.
func sweep(ctx context.Context, d *datapath.Datapath, log *slog.Logger) error {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if err := d.Sweep(handshakeAge); err != nil {
				log.Warn("unfinished handshakes not swept", "err", err)
			}
		}
	}
}

const (
	// evictInterval is the time between two looks at whether a socket without callbacks is to
	// be evicted.
	evictInterval = time.Second
	// joinRetry is the time after which connections are looked at that could not be.
	joinRetry = time.Second
	// maxJoinRest is the longest rest after open connections have been looked at. It is
	// joinRest times as long as that took, so that it takes little of the node's time.
	joinRest    = 10
	maxJoinRest = time.Second
)

// joinOpen lets open connections join whenever something new is allowed, until ctx ends.
func joinOpen(ctx context.Context, d *datapath.Datapath, snapshot func() pods.Snapshot, log *slog.Logger) error {
	netns := func() (all []datapath.Netns) {
		for _, p := range snapshot().Pods {
			if p.NetnsCookie != 0 {
				all = append(all, datapath.Netns{Cookie: p.NetnsCookie, Path: p.Netns})
			}
		}
		return all
	}
	evict := time.NewTicker(evictInterval)
	defer evict.Stop()
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-evict.C:
			if err := d.EvictLate(netns); err != nil {
				log.Warn("sockets not evicted, trying again", "err", err)
			}
			continue
		case <-d.JoinDue():
		case <-retry:
		}
		began := time.Now()
		joined, err := d.Join(ctx, netns())
		retry = nil
		if err != nil && !errors.Is(err, datapath.ErrUnloaded) && ctx.Err() == nil {
			log.Warn("open connections not looked at, trying again", "err", err)
			retry = time.After(joinRetry)
		}
		if joined > 0 {
			log.Info("open connections have joined", "connections", joined)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(min(joinRest*time.Since(began), maxJoinRest)):
		}
	}
}

// joinWatched lets watched connections join, until ctx ends.
func joinWatched(ctx context.Context, d *datapath.Datapath, log *slog.Logger) error {
	for {
		err := d.JoinWatched(ctx)
		if err == nil {
			return nil
		}
		log.Warn("connections do not join, trying again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(joinRetry):
		}
	}
}

// hostNetns returns the cookies of network namespaces that belong to no pod: the
// agent's own, and the node's.
func hostNetns(proc string, log *slog.Logger) ([]uint64, error) {
	node := filepath.Join(proc, "1/ns/net")
	paths := []string{"/proc/self/ns/net"}
	if _, err := os.Stat(node); err == nil {
		paths = append(paths, node)
	} else {
		log.Warn("hostNetwork pods are known by the agent's own network namespace only", "err", err)
	}
	var cookies []uint64
	for _, path := range paths {
		cookie, err := datapath.NetnsCookie(path)
		if err != nil {
			return nil, fmt.Errorf("read the node's own network namespace: %w", err)
		}
		cookies = append(cookies, cookie)
	}
	return cookies, nil
}

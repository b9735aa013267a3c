// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/kube"
	"github.com/podshunt/podshunt/agent/nat"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

const (
	// sweepInterval is how often what handshakes have left is looked through.
	sweepInterval = 30 * time.Second
	// handshakeAge is when one has surely ended: a SYN is retried for longer, but writes its entry again.
	handshakeAge = time.Minute
)

// config is what the flags of run say.
type config struct {
	runDir   string
	socket   string // empty: agent.sock in runDir
	podsFile string
	// nodeName, kubeconfig, sandboxed and defaultNamespaces are for the cluster as the source of pods.
	nodeName          string
	kubeconfig        string
	sandboxed         patterns
	defaultNamespaces kube.Selector
	proc              string
	judgement
	logFormat string
	logLevel  slog.Level
	// metricsAddress is where metrics are served, healthAddress where probes are
	// answered; empty: nowhere. They are two, so that nobody who asks for metrics
	// keeps a probe waiting.
	metricsAddress string
	healthAddress  string
	policyLease    time.Duration
	datapath       datapath.Config
	cni            cniconf.Config // no ConfDir: nothing is installed
}

func defaults() config {
	return config{
		runDir:    api.RunDir,
		sandboxed: patterns{"*gvisor*", "*runsc*", "*kata*", "*firecracker*", "*quark*", "*edera*"},
		proc:      "/proc",
		judgement: newJudgement(),
		logFormat: "auto",
		logLevel:  slog.LevelInfo,
		datapath:  datapath.DefaultConfig(),

		policyLease: 5 * time.Minute,
	}
}

// parseConfig reads and checks the flags of run. It touches nothing.
func parseConfig(args []string, stderr io.Writer) (config, error) {
	cfg := defaults()
	flags := newFlags("run", stderr)
	flags.StringVar(&cfg.runDir, "run-dir", cfg.runDir, "`directory` of the lock, the socket and the attachments")
	flags.StringVar(&cfg.socket, "socket", cfg.socket, "unix socket to listen on (default agent.sock in the run directory)")
	flags.StringVar(&cfg.nodeName, "node-name", cfg.nodeName,
		"`name` of this node in the cluster whose API server says what the pods ask for; this or --pods-file is required")
	flags.StringVar(&cfg.kubeconfig, "kubeconfig", cfg.kubeconfig, "kubeconfig `file` for the API server (default the service account of the agent's pod)")
	flags.Var(&cfg.sandboxed, "sandboxed-runtime-classes", "`patterns` of runtime classes whose pods have a kernel of their own, separated by commas")
	flags.Var(&cfg.defaultNamespaces, "default-namespaces",
		"label `selector` of namespaces whose pods are opted in unless an annotation of theirs or of the namespace says otherwise (default none)")
	flags.StringVar(&cfg.podsFile, "pods-file", cfg.podsFile, "YAML `file` with the annotations of the pods of a machine without a cluster")
	flags.StringVar(&cfg.proc, "proc", cfg.proc, "`directory` where the procfs of the node is mounted")
	cfg.register(flags)
	flags.StringVar(&cfg.logFormat, "log-format", cfg.logFormat, "auto, text or json; auto is text on a terminal")
	flags.TextVar(&cfg.logLevel, "log-level", cfg.logLevel, "debug, info, warn or error")
	flags.StringVar(&cfg.metricsAddress, "metrics-address", cfg.metricsAddress,
		"TCP `address` such as :19469 for /metrics (default none)")
	flags.StringVar(&cfg.healthAddress, "health-address", cfg.healthAddress,
		"TCP `address` such as 127.0.0.1:19470 for /healthz and /readyz, another one than for metrics (default none)")
	d := &cfg.datapath
	flags.StringVar(&d.PinDir, "pin-dir", d.PinDir, "`directory` of a bpffs for the kernel objects")
	flags.BoolVar(&d.MountBPFFS, "mount-bpffs", d.MountBPFFS,
		"mount a bpffs for the pin directory where there is none, on /sys/fs/bpf or an empty directory below it; in a container it would end with it")
	flags.StringVar(&d.Cgroup, "cgroup", d.Cgroup, "cgroup2 `directory` whose processes are seen (default the cgroup2 mount)")
	flags.StringVar(&d.Observer, "observer", d.Observer, "auto, fexit or tracepoint: how reads of applications are seen")
	flags.Var((*count)(&d.Budget), "budget",
		"`bytes` the receiver of one direction may leave unread before its sender is put on TCP; each message counts 1024 more")
	flags.Uint64Var(&d.PodBudget, "pod-budget", d.PodBudget, "the same for all receivers of a pod together, in `bytes`")
	flags.DurationVar(&d.RefreshInterval, "refresh-interval", d.RefreshInterval,
		"how long a direction may do without TCP, so that conntrack and the like do not forget its connection; 0 is for ever")
	flags.DurationVar(&cfg.policyLease, "policy-lease", cfg.policyLease,
		"how long the policy in the kernel is trusted after the agent could last vouch for it; then all goes by TCP; 0 is for ever")
	flags.Var((*count)(&d.TrialReads), "trial-reads", "`number` of recv calls that a receiver has to make before anything is redirected to it")
	flags.Var((*count)(&d.TrialDrains), "trial-drains",
		"`number` of recv calls that find nothing, after one that was not filled, before anything is redirected to a receiver that waits for edges of epoll")
	flags.Var((*count)(&d.TrialBytes), "trial-bytes",
		"`bytes` that a receiver has to take by recv of bursts above 4 KiB before such are redirected to it; 0 also lets bursts grow")
	flags.Var((*count)(&d.MaxPods), "max-pods", "`size` of the map of pods")
	flags.Var((*count)(&d.MaxPolicies), "max-policies", "`size` of the policy map")
	flags.Var((*count)(&d.MaxFlows), "max-flows", "`size` of the map of connections")
	flags.Var((*count)(&d.MaxHandshakes), "max-handshakes", "`size` of the maps of unfinished handshakes")
	flags.StringVar(&cfg.cni.ConfDir, "cni-conf-dir", "", "`directory` of the runtime's network configurations, to keep the plugin's entry in (default none)")
	flags.StringVar(&cfg.cni.BinDir, "cni-bin-dir", "", "`directory` of the runtime's CNI plugins, to install the plugin in (default none)")
	flags.StringVar(&cfg.cni.Plugin, "plugin", "", "`file` to install as the plugin (default podshunt beside this program)")
	if err := parse(flags, args); err != nil {
		return config{}, err
	}
	if cfg.socket == "" {
		cfg.socket = filepath.Join(cfg.runDir, filepath.Base(api.Socket))
	}
	if cfg.cni.Plugin == "" {
		self, err := os.Executable()
		if err != nil {
			return config{}, err
		}
		cfg.cni.Plugin = filepath.Join(filepath.Dir(self), api.PluginType)
	}
	cfg.cni.NodeRoot = filepath.Join(cfg.proc, "1/root")
	cfg.cni.Section = api.PluginConf{AgentSocket: cfg.socket, AgentTimeout: api.PluginTimeout, AttachmentsDir: cfg.attachmentsDir()}
	return cfg, cfg.validate()
}

func (c config) validate() error {
	var errs []error
	oneOf := func(flag, value string, accepted ...string) {
		if !slices.Contains(accepted, value) {
			errs = append(errs, fmt.Errorf("--%s=%q: accepted are %s", flag, value, strings.Join(accepted, ", ")))
		}
	}
	errs = append(errs, c.judgement.validate())
	oneOf("log-format", c.logFormat, "auto", "text", "json")
	switch {
	case c.nodeName == "" && c.podsFile == "":
		errs = append(errs, errors.New("--node-name or --pods-file is required: the cluster or a file says which pods take part"))
	case c.nodeName != "" && c.podsFile != "":
		errs = append(errs, errors.New("--node-name and --pods-file exclude each other: either the cluster or a file says which pods take part"))
	case c.nodeName == "" && c.kubeconfig != "":
		errs = append(errs, errors.New("--kubeconfig is for the cluster: give --node-name, too, and not --pods-file"))
	}
	if err := api.CheckSocket(c.socket); err != nil {
		errs = append(errs, fmt.Errorf("--socket, or --run-dir: %w", err))
	}
	if c.healthAddress != "" && c.healthAddress == c.metricsAddress {
		errs = append(errs, fmt.Errorf("--health-address and --metrics-address are both %q: accepted are two different ones, "+
			"so that nobody who asks for metrics keeps a probe waiting", c.healthAddress))
	}
	if (c.cni.ConfDir == "") != (c.cni.BinDir == "") {
		errs = append(errs, errors.New("--cni-conf-dir and --cni-bin-dir: accepted are both, or none to install nothing"))
	}
	if c.cni.ConfDir != "" {
		if _, err := api.ParseConf(c.cni.Section.Section()); err != nil {
			errs = append(errs, fmt.Errorf("the plugin would not accept its configuration, see --socket and --run-dir: %w", err))
		}
	}
	if c.policyLease != 0 && c.policyLease < time.Second {
		errs = append(errs, fmt.Errorf("--policy-lease=%v: accepted are 0, which is for ever, and 1s and above", c.policyLease))
	}
	return errors.Join(append(errs, c.datapath.Validate())...)
}

func (c config) attachmentsDir() string {
	return filepath.Join(c.runDir, filepath.Base(api.AttachmentsDir))
}

// count is a flag of 32 bits.
type count uint32

var _ flag.Value = (*count)(nil)

func (c *count) String() string { return strconv.FormatUint(uint64(*c), 10) }

func (c *count) Set(text string) error {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return errors.New("accepted are numbers from 0 to 4294967295")
	}
	*c = count(n)
	return nil
}

// patterns is a flag with patterns as of path.Match.
type patterns []string

var _ flag.Value = (*patterns)(nil)

func (p *patterns) String() string { return strings.Join(*p, ",") }

func (p *patterns) Set(text string) error {
	*p = nil
	for item := range strings.SplitSeq(text, ",") {
		item = strings.TrimSpace(item)
		if _, err := path.Match(item, ""); err != nil {
			return fmt.Errorf("%q: accepted are patterns with * and ?, such as \"kata-*\"", item)
		}
		if item != "" {
			*p = append(*p, item)
		}
	}
	return nil
}

func newLogger(w io.Writer, cfg config) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.logFormat == "text" || cfg.logFormat == "auto" && isTerminal(w) {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func runCommand(ctx context.Context, args []string, stderr io.Writer) error {
	cfg, err := parseConfig(args, stderr)
	if err != nil {
		return err
	}
	log := newLogger(stderr, cfg)

	lock, err := lockRunDir(cfg.runDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	examination := cfg.examine()
	if examination.Missing != "" {
		return errors.New(examination.Missing)
	}
	host, err := hostNetns(cfg.proc, log)
	if err != nil {
		return err
	}
	cfg.datapath.AllowBlocking = examination.HazardsAccepted || !present(examination.Hazards, datapath.HazardSleepingRecv)
	cfg.datapath.Guards = guardsIn(examination.Hazards)
	src, err := openSource(cfg, examination.Refusal, log)
	if err != nil {
		return err
	}
	d, err := datapath.Open(cfg.datapath, log)
	if err != nil {
		return err
	}
	defer d.Close()
	registry, err := pods.New(pods.Config{
		Dir:         cfg.attachmentsDir(),
		Source:      src,
		Proc:        cfg.proc,
		HostNetns:   host,
		Refusal:     examination.Refusal,
		Report:      src.report,
		Datapath:    kernel{d},
		MaxPolicies: int(cfg.datapath.MaxPolicies),
		Redirects:   nat.Redirects,
		NetnsCookie: datapath.NetnsCookie,
		Now:         time.Now,
		Log:         log,
	})
	if err != nil {
		return err
	}
	registry.Sync()
	n := newNode(registry, d, cfg, examination, log)
	n.lease = &lease{datapath: d, length: cfg.policyLease, log: log, vouch: func(now time.Time) error {
		// An agent that hangs vouches for nothing.
		return cmp.Or(registry.Alive(), src.vouch(now))
	}}
	if cfg.cni.ConfDir != "" {
		cfg.cni.Log = log
		n.keeper = cniconf.New(cfg.cni)
	}
	listener, err := server.Listen(cfg.socket)
	if err != nil {
		return err
	}
	defer os.Remove(cfg.socket)
	log.Info("agent started", "version", version, "socket", cfg.socket, "pin_dir", cfg.datapath.PinDir,
		"cgroup", d.Cgroup(), "observer", d.Observer())
	if examination.Refusal != "" {
		log.Error("no pod takes part", "reason", examination.Refusal)
	}

	metrics := newMetrics(d, n.fixed, registry.Snapshot, n.unloaded.Load, n.lease.state)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	for _, port := range []struct {
		flag, address string
		serve         func(net.Listener) error
	}{
		{"health-address", cfg.healthAddress, func(l net.Listener) error { return server.ServeHealth(ctx, l, registry.Alive, n.ready, log) }},
		{"metrics-address", cfg.metricsAddress, func(l net.Listener) error { return server.ServeMetrics(ctx, l, metrics, log) }},
	} {
		if port.address == "" {
			continue
		}
		l, err := net.Listen("tcp", port.address)
		if err != nil {
			// What is served already ends with the group.
			stop()
			return errors.Join(fmt.Errorf("listen for --%s: %w", port.flag, err), listener.Close(), group.Wait())
		}
		group.Go(func() error { return port.serve(l) })
	}
	group.Go(func() error { return src.run(ctx) })
	group.Go(func() error { return registry.Run(ctx) })
	group.Go(func() error { return server.Serve(ctx, listener, measure(registry, metrics), n, log) })
	group.Go(func() error { return sweep(ctx, d, log) })
	group.Go(func() error { return n.lease.run(ctx) })
	if n.keeper != nil {
		group.Go(func() error { return n.keeper.Run(ctx) })
	}
	err = group.Wait()
	log.Info("agent stopped")
	return err
}

// source is a pods.Source with what main has to do for it.
type source struct {
	pods.Source
	run    func(context.Context) error
	report func([]pods.Pod) // nil if nobody is told
	vouch  func(now time.Time) error
}

func openSource(cfg config, refusal string, log *slog.Logger) (source, error) {
	if cfg.podsFile != "" {
		return source{Source: pods.NewFile(cfg.podsFile), run: func(context.Context) error { return nil }, vouch: func(time.Time) error { return nil }}, nil
	}
	cluster, err := kube.Open(kube.Config{
		Kubeconfig:              cfg.kubeconfig,
		NodeName:                cfg.nodeName,
		SandboxedRuntimeClasses: cfg.sandboxed,
		DefaultNamespaces:       cfg.defaultNamespaces,
		Refusal:                 refusal,
		UserAgent:               "podshunt-agent/" + version,
		Log:                     log,
	})
	if err != nil {
		return source{}, err
	}
	return source{cluster, cluster.Run, cluster.Report, cluster.Vouch}, nil
}

// sweep deletes what handshakes that never ended have left, until ctx ends.
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

// hostNetns returns the cookies of the network namespaces that are no pod's:
// the agent's own and that of the node.
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

// kernel is the datapath as the registry wants it.
type kernel struct {
	*datapath.Datapath
}

func (k kernel) SetPolicy(rules []policy.Rule) error { return k.Datapath.SetPolicy(convert(rules)) }

func (k kernel) UpdatePolicy(changed []policy.PairRules) error {
	converted := make([]datapath.PairRules, len(changed))
	for i, pair := range changed {
		converted[i] = datapath.PairRules{Client: pair.Client, Server: pair.Server, Rules: convert(pair.Rules)}
	}
	return k.Datapath.UpdatePolicy(converted)
}

func convert(rules []policy.Rule) []datapath.Rule {
	converted := make([]datapath.Rule, len(rules))
	for i, r := range rules {
		converted[i] = datapath.Rule{
			Client: r.Client, Server: r.Server, First: r.Ports.First, Last: r.Ports.Last,
			Verdict: verdict(r.Decision.Verdict), Reason: uint32(r.Decision.Reason),
		}
	}
	return converted
}

func verdict(v policy.Verdict) datapath.Verdict {
	switch v {
	case policy.Allow:
		return datapath.Allow
	case policy.Hold:
		return datapath.Hold
	}
	return datapath.Refuse
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/kube"
	"github.com/podshunt/podshunt/api"
)

// config is what the flags of run say.
type config struct {
	runDir   string
	podsFile string
	// nodeName, kubeconfig, sandboxed and defaultNamespaces are for the cluster as the source of pods.
	nodeName          string
	kubeconfig        string
	sandboxed         patterns
	defaultNamespaces kube.Selector
	proc              string
	kernelFlags
	logFormat string
	logLevel  string
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
		runDir:      api.RunDir,
		sandboxed:   patterns{"*gvisor*", "*runsc*", "*kata*", "*firecracker*", "*quark*", "*edera*"},
		proc:        "/proc",
		kernelFlags: kernelFlags{hazards: "refuse"},
		logFormat:   "auto",
		logLevel:    "info",
		datapath:    datapath.DefaultConfig(),
		policyLease: 5 * time.Minute,
	}
}

// register makes the flags of run.
func (c *config) register(cmd *cobra.Command) {
	flags, d := cmd.Flags(), &c.datapath
	runDirVar(cmd, &c.runDir)
	flags.StringVar(&c.nodeName, "node-name", c.nodeName,
		"`name` of this node in the cluster whose API server says what the pods ask for; this or --pods-file is required")
	fileVar(cmd, &c.kubeconfig, "kubeconfig", "kubeconfig `file` for the API server (default the service account of the agent's pod)")
	flags.Var(&c.sandboxed, "sandboxed-runtime-classes", "`patterns` of runtime classes whose pods have a kernel of their own, separated by commas")
	flags.Var(&c.defaultNamespaces, "default-namespaces",
		"label `selector` of namespaces whose pods are opted in unless an annotation of theirs or of the namespace says otherwise (default none)")
	fileVar(cmd, &c.podsFile, "pods-file", "YAML `file` with the annotations of the pods of a machine without a cluster")
	dirVar(cmd, &c.proc, "proc", "`directory` where the procfs of the node is mounted")
	c.kernelFlags.register(cmd)
	choiceVar(cmd, &c.logFormat, "log-format", "", "`form` of the log: auto, text or json; auto is text on a terminal", "auto", "text", "json")
	choiceVar(cmd, &c.logLevel, "log-level", "", "least `level` that is logged: debug, info, warn or error", "debug", "info", "warn", "error")
	flags.StringVar(&c.metricsAddress, "metrics-address", c.metricsAddress,
		"TCP `address` such as :19469 for /metrics (default none)")
	flags.StringVar(&c.healthAddress, "health-address", c.healthAddress,
		"TCP `address` such as 127.0.0.1:19470 for /healthz and /readyz, another one than for metrics (default none)")
	dirVar(cmd, &d.PinDir, "pin-dir", "`directory` of a bpffs for the kernel objects")
	flags.BoolVar(&d.MountBPFFS, "mount-bpffs", d.MountBPFFS,
		"mount a bpffs for the pin directory where there is none, on /sys/fs/bpf or an empty directory below it; in a container it would end with it")
	dirVar(cmd, &d.Cgroup, "cgroup", "cgroup2 `directory` whose processes are seen (default the cgroup2 mount)")
	flags.Uint32Var(&d.Budget, "budget", d.Budget,
		"`bytes` the receiver of one direction may leave unread before its sender is put on TCP; each message counts 1024 more")
	flags.Uint64Var(&d.PodBudget, "pod-budget", d.PodBudget, "the same for all receivers of a pod together, in `bytes`")
	flags.DurationVar(&d.RefreshInterval, "refresh-interval", d.RefreshInterval,
		"how long a direction may do without TCP, so that conntrack and the like do not forget its connection; 0 is for ever")
	flags.DurationVar(&c.policyLease, "policy-lease", c.policyLease,
		"how long the policy in the kernel is trusted after the agent could last vouch for it; then all goes by TCP; 0 is for ever")
	flags.Uint32Var(&d.TrialReads, "trial-reads", d.TrialReads, "`number` of recv calls that a receiver has to make before anything is redirected to it")
	flags.Uint32Var(&d.TrialDrains, "trial-drains", d.TrialDrains,
		"`number` of recv calls that find nothing, after one that was not filled, before anything is redirected to a receiver that waits for edges of epoll")
	flags.Uint32Var(&d.TrialBytes, "trial-bytes", d.TrialBytes,
		"`bytes` that a receiver has to take by recv of bursts above 4 KiB before such are redirected to it; 0 also lets bursts grow")
	flags.Uint32Var(&d.MaxPolicies, "max-policies", d.MaxPolicies, "`size` of the policy map; the maps of pods follow from it")
	flags.Uint32Var(&d.MaxFlows, "max-flows", d.MaxFlows, "`size` of the map of connections; those of sockets and of unfinished handshakes follow from it")
	dirVar(cmd, &c.cni.ConfDir, "cni-conf-dir", "`directory` of the runtime's network configurations, to keep the plugin's entry in (default none)")
	dirVar(cmd, &c.cni.BinDir, "cni-bin-dir", "`directory` of the runtime's CNI plugins, to install the plugin in (default none)")
}

// complete adds what follows from the flags, and checks all. It touches nothing.
func (c *config) complete() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c.cni.Plugin = filepath.Join(filepath.Dir(self), api.PluginType)
	c.cni.NodeRoot = filepath.Join(c.proc, "1/root")
	c.cni.Section = api.PluginConf{AgentSocket: socketIn(c.runDir), AgentTimeout: api.PluginTimeout, AttachmentsDir: attachmentsIn(c.runDir)}
	return usageError(c.validate())
}

func (c config) validate() error {
	var errs []error
	errs = append(errs, c.kernelFlags.validate())
	switch {
	case c.nodeName == "" && c.podsFile == "":
		errs = append(errs, errors.New("--node-name or --pods-file is required: the cluster or a file says which pods take part"))
	case c.nodeName != "" && c.podsFile != "":
		errs = append(errs, errors.New("--node-name and --pods-file exclude each other: either the cluster or a file says which pods take part"))
	case c.nodeName == "" && c.kubeconfig != "":
		errs = append(errs, errors.New("--kubeconfig is for the cluster: give --node-name, too, and not --pods-file"))
	}
	if err := api.CheckSocket(socketIn(c.runDir)); err != nil {
		errs = append(errs, fmt.Errorf("--run-dir: the agent's socket would be %w", err))
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
			errs = append(errs, fmt.Errorf("the plugin would not accept its configuration, see --run-dir: %w", err))
		}
	}
	if c.policyLease != 0 && c.policyLease < time.Second {
		errs = append(errs, fmt.Errorf("--policy-lease=%v: accepted are 0, which is for ever, and 1s and above", c.policyLease))
	}
	return errors.Join(append(errs, c.datapath.Validate())...)
}

func newLogger(w io.Writer, cfg config) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.logLevel)) // those that the flag accepts are levels
	options := &slog.HandlerOptions{Level: level}
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

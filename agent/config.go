// SPDX-License-Identifier: Apache-2.0

// What `run` is configured with, and its validation.

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
	"github.com/podshunt/podshunt/agent/proc"
	"github.com/podshunt/podshunt/api"
)

// config has the values of run's flags.
type config struct {
	runDir   string
	podsFile string
	// nodeName, kubeconfig, sandboxed and defaultNamespaces apply if the cluster says which pods take
	// part.
	nodeName          string
	kubeconfig        string
	sandboxed         patterns
	defaultNamespaces kube.Selector
	// ownPod is the agent's own pod, as namespace/name: if its DaemonSet is deleted, the agent uninstalls. Empty: it does not.
	ownPod string
	// uninstallTimeout and uninstallForce are as the flags of uninstall.
	uninstallTimeout time.Duration
	uninstallForce   bool
	proc             string
	kernelFlags
	logFormat string
	logLevel  string
	// metricsAddress serves metrics, healthAddress answers probes; empty serves
	// nothing. They must differ, so that nobody who asks for metrics keeps a
	// probe waiting.
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
		proc:        hostProc(),
		logFormat:   "auto",
		logLevel:    "info",
		datapath:    datapath.DefaultConfig(),
		policyLease: 5 * time.Minute,

		uninstallTimeout: defaultUnloadTimeout,
	}
}

// register adds the flags of run.
func (c *config) register(cmd *cobra.Command) {
	flags, d := cmd.Flags(), &c.datapath
	runDirVar(cmd, &c.runDir)
	flags.StringVar(&c.nodeName, "node-name", c.nodeName,
		"`name` of this node in the cluster, whose API server says which pods take part; this or --pods-file is required")
	fileVar(cmd, &c.kubeconfig, "kubeconfig", "kubeconfig `file` for the API server (default the service account of the agent's pod)")
	flags.Var(&c.sandboxed, "sandboxed-runtime-classes", "`patterns` of runtime classes whose pods have a kernel of their own and so stay on TCP, separated by commas")
	flags.Var(&c.defaultNamespaces, "default-namespaces",
		"label `selector` of namespaces whose pods are opted in, unless an annotation of the pod or the namespace says otherwise (default none)")
	flags.StringVar(&c.ownPod, "own-pod", c.ownPod,
		"`pod` of this agent, as namespace/name: when it ends because its DaemonSet or namespace is deleted, it uninstalls first (default it never does)")
	flags.DurationVar(&c.uninstallTimeout, "uninstall-timeout", c.uninstallTimeout, "how long to wait then until connections have read what was sent by the shortcut")
	flags.BoolVar(&c.uninstallForce, "uninstall-force", c.uninstallForce, "reset then the connections that take longer, and only these")
	fileVar(cmd, &c.podsFile, "pods-file", "YAML `file` with the annotations of pods, for a machine without a cluster")
	procVar(cmd, &c.proc)
	c.kernelFlags.register(cmd)
	choiceVar(cmd, &c.logFormat, "log-format", "", "`form` of the log: auto, text or json; auto is text on a terminal", "auto", "text", "json")
	choiceVar(cmd, &c.logLevel, "log-level", "", "least `level` that is logged: debug, info, warn or error", "debug", "info", "warn", "error")
	flags.StringVar(&c.metricsAddress, "metrics-address", c.metricsAddress,
		"TCP `address` such as :19469 for /metrics (default none)")
	flags.StringVar(&c.healthAddress, "health-address", c.healthAddress,
		"TCP `address` such as 127.0.0.1:19470 for /healthz and /readyz, another one than for metrics (default none)")
	dirVar(cmd, &d.PinDir, "pin-dir", "`directory` of a bpffs for the kernel objects")
	flags.BoolVar(&d.MountBPFFS, "mount-bpffs", d.MountBPFFS,
		"mount a bpffs for the pin directory if there is none, on /sys/fs/bpf or an empty directory below it; in a container the mount would end with the container")
	dirVar(cmd, &d.Cgroup, "cgroup", "cgroup2 `directory`: connections of the processes below it can be paired (default the cgroup2 mount)")
	flags.Uint32Var(&d.Budget, "budget", d.Budget,
		"`bytes` that the receiver of one direction may leave unread; more goes by TCP; each message counts 1024 more")
	flags.Uint64Var(&d.PodBudget, "pod-budget", d.PodBudget, "`bytes` that all receivers of a pod together may leave unread, see --budget")
	flags.DurationVar(&d.RefreshInterval, "refresh-interval", d.RefreshInterval,
		"send one message by TCP when a direction has sent none that way for so long, so that conntrack and the like do not forget the connection; 0 is never")
	flags.DurationVar(&c.policyLease, "policy-lease", c.policyLease,
		"how long the policy in the kernel is trusted after the agent last confirmed it; then all goes by TCP; 0 is for ever")
	flags.Uint32Var(&d.TrialReads, "trial-reads", d.TrialReads, "`number` of recv calls that a receiver must make on TCP before anything is sent to it by the shortcut")
	flags.Uint32Var(&d.TrialDrains, "trial-drains", d.TrialDrains,
		"`number` of times that a receiver with edge-triggered epoll must read until nothing is left, before anything is sent to it by the shortcut")
	flags.Uint32Var(&d.TrialBytes, "trial-bytes", d.TrialBytes,
		"`bytes` of bursts above 4 KiB that a receiver must read with recv on TCP before such bursts are sent to it by the shortcut; 0 allows bursts of any size")
	flags.Uint32Var(&d.JoinAfter, "join-after", d.JoinAfter,
		"`segments` of data that a connection must have sent and received before it joins, so that short ones cost nothing; 0 lets all join at their handshake")
	flags.Uint32Var(&d.LeaveRatio, "leave-ratio", d.LeaveRatio,
		"`times` as many messages that are no faster by the shortcut as those that are: then the connection goes back to TCP for a while; 0 lets none go back")
	choiceVar(cmd, &d.OnIncompatible, "on-incompatible", "",
		"`what` to do if the kernel objects of before have another layout, or maps of another size: drain takes them out once connections have read what was sent by the shortcut, and makes new ones; fail leaves them, and ends for another layout",
		datapath.OnIncompatibleDrain, datapath.OnIncompatibleFail)
	flags.Uint32Var(&d.MaxPolicies, "max-policies", d.MaxPolicies, "`entries` of the kernel map of policies; the sizes of the maps of pods follow from it")
	flags.Uint32Var(&d.MaxFlows, "max-flows", d.MaxFlows, "`entries` of the kernel map of paired connections; the sizes of the maps of sockets and of unfinished handshakes follow from it")
	dirVar(cmd, &c.cni.ConfDir, "cni-conf-dir", "`directory` of the runtime's network configurations, which the plugin's entry is kept in; auto: as the runtime is configured (default none)")
	dirVar(cmd, &c.cni.BinDir, "cni-bin-dir", "`directory` of the runtime's CNI plugins, to install the plugin in; auto: as the runtime is configured (default none)")
}

// complete derives the remaining settings from the flags, and checks all of them. It
// changes nothing on the node.
func (c *config) complete() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c.cni.Plugin = filepath.Join(filepath.Dir(self), api.PluginType)
	c.cni.NodeRoot = proc.Path(c.proc, 1, "root")
	c.cni.Section = api.PluginConf{AgentSocket: socketIn(c.runDir), AgentTimeout: api.PluginTimeout, AttachmentsDir: attachmentsIn(c.runDir)}
	if err := usageError(c.validate()); err != nil {
		return err
	}
	if c.cni.ConfDir == autoDir {
		c.cni.ConfDir, c.cni.BinDir, c.cni.Auto = "", "", true
	}
	return nil
}

// autoDir stands for the directories that the runtime is configured with.
const autoDir = "auto"

// installs reports whether the agent installs the plugin.
func (c config) installs() bool { return c.cni.Auto || c.cni.ConfDir != "" }

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
	switch {
	case c.ownPod == "":
	case c.nodeName == "":
		errs = append(errs, errors.New("--own-pod is for the cluster: give --node-name, too, and not --pods-file"))
	default:
		if err := checkPod(c.ownPod); err != nil {
			errs = append(errs, fmt.Errorf("--own-pod: %w", err))
		}
	}
	if c.uninstallTimeout <= 0 {
		errs = append(errs, fmt.Errorf("--uninstall-timeout=%s: accepted are durations above 0", c.uninstallTimeout))
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
	if (c.cni.ConfDir == autoDir) != (c.cni.BinDir == autoDir) {
		errs = append(errs, errors.New("--cni-conf-dir and --cni-bin-dir: accepted is auto for both, or for none"))
	}
	for flag, dir := range map[string]string{"cni-conf-dir": c.cni.ConfDir, "cni-bin-dir": c.cni.BinDir} {
		if dir != "" && dir != autoDir && !filepath.IsAbs(dir) {
			errs = append(errs, fmt.Errorf("--%s=%q: accepted is an absolute path, or auto", flag, dir))
		}
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
	_ = level.UnmarshalText([]byte(cfg.logLevel)) // the flag accepts levels only
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

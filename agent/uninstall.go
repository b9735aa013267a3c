// SPDX-License-Identifier: Apache-2.0

// The command uninstall, on one node or on all.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/kube"
	"github.com/podshunt/podshunt/api"
)

const (
	// uninstallsAtOnce bounds the nodes that are uninstalled at a time.
	uninstallsAtOnce = 16
	// execTimeout bounds what an exec takes besides the unload itself.
	execTimeout = 30 * time.Second
)

func newUninstallCommand() *cobra.Command {
	f := uninstallFlags{exec: kube.Exec{Parallel: uninstallsAtOnce}}
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take the plugin out of the CNI configuration, then unload; with --all-nodes everywhere",
		Long: `Takes podshunt's entry out of the container runtime's CNI configuration, which is
then byte for byte as before, and does what "podshunt-agent unload" does. The
plugin's binary stays, since a runtime may still call it for running pods;
--delete-binary deletes it where no such pod is left.

If an agent runs, it does the work, and knows the runtime's directories. If none
runs, name them with --cni-conf-dir and --cni-bin-dir. With --all-nodes the command
runs in all pods of the agent, through the API server; this is how the chart
uninstalls.`,
		Example: `  podshunt-agent uninstall
  podshunt-agent uninstall --cni-conf-dir=/etc/cni/net.d --cni-bin-dir=/opt/cni/bin
  podshunt-agent uninstall --cni-conf-dir=/etc/cni/net.d --cni-bin-dir=/opt/cni/bin --delete-binary
  podshunt-agent uninstall --all-nodes --namespace=podshunt --selector=app.kubernetes.io/name=podshunt`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.log = newLogger(cmd.ErrOrStderr(), defaults())
			if err := f.check(); err != nil {
				return usageError(err)
			}
			if !f.allNodes {
				err := f.run(cmd.Context(), api.PathUninstall, f.restoreCNI, cmd.OutOrStdout())
				if err == nil && f.deleteBinary {
					err = cniconf.DeleteBinary(f.confDir, f.binDir, f.cacheDir)
				}
				return err
			}
			f.exec.PodTimeout = f.longest() + execTimeout
			f.exec.Command = f.command()
			return uninstallAll(cmd.Context(), f.exec.Run, cmd.OutOrStdout())
		},
	}
	f.register(cmd)
	return cmd
}

// uninstallFlags has the values of uninstall's flags.
type uninstallFlags struct {
	unloadFlags
	confDir, binDir, cacheDir string
	deleteBinary              bool
	allNodes                  bool
	exec                      kube.Exec
}

func (f *uninstallFlags) register(cmd *cobra.Command) {
	f.unloadFlags.register(cmd)
	dirVar(cmd, &f.confDir, "cni-conf-dir", "`directory` of the runtime's network configurations, if no agent runs")
	dirVar(cmd, &f.binDir, "cni-bin-dir", "`directory` of the runtime's CNI plugins, if no agent runs")
	f.cacheDir = "/var/lib/cni"
	dirVar(cmd, &f.cacheDir, "cni-cache-dir", "`directory` in which runtimes keep what they have run for a pod, with --delete-binary")
	flags := cmd.Flags()
	flags.BoolVar(&f.deleteBinary, "delete-binary", false, "delete the plugin's binary, too, if no pod is left that was started with it, and no file names it")
	flags.BoolVar(&f.allNodes, "all-nodes", false, "do it in all pods of the agent, through the API server")
	fileVar(cmd, &f.exec.Kubeconfig, "kubeconfig", "`file` that says where the API server is (default the service account of this pod)")
	flags.StringVar(&f.exec.Namespace, "namespace", "", "namespace of the agent's pods, with --all-nodes")
	flags.StringVar(&f.exec.Selector, "selector", "", "labels of the agent's pods, with --all-nodes")
	flags.StringVar(&f.exec.Container, "container", "agent", "container of the agent in its pods, with --all-nodes")
}

func (f *uninstallFlags) check() error {
	if (f.confDir == "") != (f.binDir == "") {
		return errors.New("--cni-conf-dir and --cni-bin-dir: accepted are both, or none to leave the CNI configuration as it is")
	}
	if f.confDir == autoDir || f.binDir == autoDir {
		return errors.New("--cni-conf-dir and --cni-bin-dir: accepted are directories; auto is for the agent, which uninstalls from the directories that it has found")
	}
	if f.deleteBinary && (f.binDir == "" || f.allNodes) {
		return errors.New("--delete-binary: accepted with --cni-conf-dir and --cni-bin-dir, and without --all-nodes, whose agents keep the binary for running pods")
	}
	if f.allNodes && (f.exec.Namespace == "" || f.exec.Selector == "") {
		return errors.New("--all-nodes: --namespace and --selector are required, they say which pods are the agent's")
	}
	return f.unloadFlags.check()
}

// restoreCNI takes the plugin out of the CNI configuration of a node without an
// agent.
func (f *uninstallFlags) restoreCNI() (remarks []string, err error) {
	if f.confDir == "" {
		return nil, nil
	}
	return cniconf.Uninstall(f.confDir, f.binDir, f.log)
}

// command returns the command to run in the agents' pods.
func (f *uninstallFlags) command() []string {
	return []string{
		"podshunt-agent", "uninstall", "--run-dir=" + f.runDir, "--pin-dir=" + f.pinDir,
		"--timeout=" + f.timeout.String(), "--force=" + strconv.FormatBool(f.force),
	}
}

// uninstallAll uninstalls on all nodes, and prints what happened on each. Nodes where no agent
// can be asked do not make it fail: nobody could do more there.
func uninstallAll(ctx context.Context, run func(context.Context, func(kube.ExecResult)) error, stdout io.Writer) error {
	nodes, failed := 0, 0
	var absent []string
	err := run(ctx, func(r kube.ExecResult) {
		nodes++
		text := strings.TrimSpace(r.Output)
		switch {
		case r.Absent != "":
			absent = append(absent, cmp.Or(r.Node, "the node of "+r.Pod))
			text = "LEFT AS IT IS: " + r.Absent
		case r.Err != nil:
			failed++
			text = strings.TrimSpace(fmt.Sprintf("FAILED: %v\n%s", r.Err, text))
		}
		fmt.Fprintf(stdout, "%s: %s\n", cmp.Or(r.Node, r.Pod), strings.ReplaceAll(text, "\n", "\n    "))
	})
	if err != nil {
		return err
	}
	if len(absent) > 0 {
		slices.Sort(absent)
		fmt.Fprintf(stdout, "no agent runs on %d of %d nodes (%s): where one has run, its entry in the CNI configuration and its kernel objects stay until "+
			"`podshunt-agent uninstall` is run on the node\n", len(absent), nodes, strings.Join(absent, ", "))
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d nodes still have podshunt: repeat the uninstall when they can be reached and their connections have read what was sent, "+
			"or with --force (uninstall.force in the chart), which resets those that do not, or go on without them (helm uninstall --no-hooks); what stays in their kernels and CNI configuration then "+
			"is taken out by `podshunt-agent uninstall` on the node", failed, nodes)
	}
	_, err = fmt.Fprintf(stdout, "podshunt is out of %d nodes\n", nodes-len(absent))
	return err
}

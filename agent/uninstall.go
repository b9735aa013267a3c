// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/kube"
	"github.com/podshunt/podshunt/api"
)

const (
	// uninstallsAtOnce bounds how many nodes are asked at a time.
	uninstallsAtOnce = 16
	// execTimeout is what an exec may take besides the unload itself.
	execTimeout = 30 * time.Second
)

func uninstallCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	r := removal{log: newLogger(stderr, defaults())}
	flags := newFlags("uninstall", stderr)
	r.register(flags)
	confDir := flags.String("cni-conf-dir", "", "`directory` of the runtime's network configurations, if no agent runs")
	binDir := flags.String("cni-bin-dir", "", "`directory` of the runtime's CNI plugins, if no agent runs")
	allNodes := flags.Bool("all-nodes", false, "do it in all pods of the agent, by way of the API server")
	exec := kube.Exec{Parallel: uninstallsAtOnce}
	flags.StringVar(&exec.Kubeconfig, "kubeconfig", "", "`file` that says where the API server is (default the service account of this pod)")
	flags.StringVar(&exec.Namespace, "namespace", "", "namespace of the agent's pods, with --all-nodes")
	flags.StringVar(&exec.Selector, "selector", "", "labels of the agent's pods, with --all-nodes")
	flags.StringVar(&exec.Container, "container", "agent", "container of the agent in its pods, with --all-nodes")
	if err := parse(flags, args); err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	if (*confDir == "") != (*binDir == "") {
		return errors.New("--cni-conf-dir and --cni-bin-dir: accepted are both, or none to leave the CNI configuration as it is")
	}
	if !*allNodes {
		return r.run(ctx, api.PathUninstall, func() error {
			if *confDir == "" {
				return nil
			}
			return cniconf.Uninstall(*confDir, *binDir, r.log)
		}, stdout)
	}
	if exec.Namespace == "" || exec.Selector == "" {
		return errors.New("--all-nodes: --namespace and --selector are required, they say which pods are the agent's")
	}
	exec.PodTimeout = r.longest() + execTimeout
	exec.Command = r.command()
	return uninstallAll(ctx, exec.Run, stdout)
}

// command is what is run in the agent's pods.
func (r *removal) command() []string {
	command := []string{"podshunt-agent", "uninstall", "--run-dir=" + r.runDir, "--socket=" + r.socket, "--pin-dir=" + r.pinDir, "--timeout=" + r.timeout.String()}
	if r.force { // agents of former builds do not know it
		command = append(command, "--force")
	}
	return command
}

// uninstallAll prints what happened on each node.
func uninstallAll(ctx context.Context, run func(context.Context, func(kube.ExecResult)) error, stdout io.Writer) error {
	nodes, failed := 0, 0
	err := run(ctx, func(r kube.ExecResult) {
		nodes++
		text := strings.TrimSpace(r.Output)
		if r.Err != nil {
			failed++
			text = strings.TrimSpace(fmt.Sprintf("FAILED: %v\n%s", r.Err, text))
		}
		fmt.Fprintf(stdout, "%s: %s\n", r.Node, strings.ReplaceAll(text, "\n", "\n    "))
	})
	if err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d nodes still have podshunt: repeat the uninstall when they can be reached and their connections have read what was sent, "+
			"or with --force (uninstall.force in the chart), which resets those that do not, or go on without them (helm uninstall --no-hooks); what stays in their kernels and CNI configuration then "+
			"is taken out by `podshunt-agent uninstall` on the node", failed, nodes)
	}
	_, err = fmt.Fprintf(stdout, "podshunt is out of %d nodes\n", nodes)
	return err
}

// mountCommand is for an init container: the agent itself has no business in
// the node's mount namespace.
func mountCommand(args []string, stdout, stderr io.Writer) error {
	flags := newFlags("mount-bpffs", stderr)
	pinDir := flags.String("pin-dir", defaults().datapath.PinDir, "`directory` of the kernel objects; the mount is made on its parent")
	namespace := flags.String("mount-namespace", "/proc/1/ns/mnt", "mount namespace of the node")
	if err := parse(flags, args); err != nil {
		return err
	}
	dir := filepath.Dir(*pinDir)
	mounted, err := datapath.MountBPFFS(*namespace, dir)
	if err != nil {
		return err
	}
	text := "there is a bpffs at %s\n"
	if mounted {
		text = "mounted a bpffs on %s\n"
	}
	_, err = fmt.Fprintf(stdout, text, dir)
	return err
}

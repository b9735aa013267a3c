// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/kube"
)

func TestUninstallAll(t *testing.T) {
	results := []kube.ExecResult{{Node: "a", Output: "unloaded\n"}}
	runAll := func(_ context.Context, done func(kube.ExecResult)) error {
		for _, r := range results {
			done(r)
		}
		return nil
	}
	var out bytes.Buffer
	if err := uninstallAll(t.Context(), runAll, &out); err != nil {
		t.Error(err)
	}
	wantDiff(t, "all", "a: unloaded\npodshunt is out of 1 nodes\n", out.String())

	results = append(results, kube.ExecResult{Node: "d", Absent: "the node is not ready (NodeStatusUnknown)"}, kube.ExecResult{Pod: "agent-x", Absent: "the pod agent-x is pending"})
	out.Reset()
	if err := uninstallAll(t.Context(), runAll, &out); err != nil {
		t.Error(err)
	}
	wantDiff(t, "nodes without an agent", "a: unloaded\nd: LEFT AS IT IS: the node is not ready (NodeStatusUnknown)\nagent-x: LEFT AS IT IS: the pod agent-x is pending\n"+
		"no agent runs on 2 of 3 nodes (d, the node of agent-x): where one has run, its entry in the CNI configuration and its kernel objects stay until "+
		"`podshunt-agent uninstall` is run on the node\npodshunt is out of 1 nodes\n", out.String())

	results = append(results[:1], kube.ExecResult{Node: "b", Output: "CLIENT  SERVER\nx  y\n", Err: errors.New("exit code 1")})
	out.Reset()
	err := uninstallAll(t.Context(), runAll, &out)
	if exitStatus(err) != exitError || !strings.HasPrefix(err.Error(), "1 of 2 nodes still have podshunt: ") || !strings.Contains(err.Error(), "--no-hooks") {
		t.Errorf("got error %v, want one of the node b that names --no-hooks", err)
	}
	wantDiff(t, "one failed", "a: unloaded\nb: FAILED: exit code 1\n    CLIENT  SERVER\n    x  y\n", out.String())
}

// The agents on the nodes are told of a force, and given the time for it.
func TestUninstallCommand(t *testing.T) {
	f := uninstallFlags{unloadFlags: unloadFlags{runDir: "/r", pinDir: "/p", timeout: time.Minute}}
	command := []string{"podshunt-agent", "uninstall", "--run-dir=/r", "--pin-dir=/p", "--timeout=1m0s"}
	wantDiff(t, "command", append(command, "--force=false"), f.command())
	wantDiff(t, "longest", time.Minute, f.longest())
	f.force = true
	wantDiff(t, "forced", append(command, "--force=true"), f.command())
	wantDiff(t, "longest", time.Minute+resetTimeout, f.longest())
}

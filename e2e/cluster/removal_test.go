// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"strings"
	"testing"
)

// account and roles are what the agent's rights come from.
var (
	account = []string{"--namespace=" + release, "delete", "serviceaccount", release}
	roles   = []string{"--namespace=" + release, "delete", "clusterrolebinding/" + release, "rolebinding/" + release}
)

// TestRemoval deletes the chart in ways that run no hook, under load: the agents uninstall by
// themselves.
func TestRemoval(t *testing.T) {
	kubectl := func(commands ...[]string) func(*proof) {
		return func(p *proof) {
			p.Helper()
			for _, args := range commands {
				p.mustKubectl(args...)
			}
		}
	}
	deletion := func(cascade string) []string {
		return []string{"--namespace=" + release, "delete", daemonSet, "--cascade=" + cascade}
	}
	for _, tc := range []struct {
		name   string
		short  bool // it is a row of a short run, too
		remove func(*proof)
	}{
		{"Background", false, kubectl(deletion("background"))},
		{"Foreground", false, kubectl(deletion("foreground"))},
		{"Namespace", true, kubectl([]string{"delete", "namespace", release})},
		// 401 and 403 from the first request on.
		{"NoAccount", true, kubectl(account, deletion("background"))},
		{"NoRoles", false, kubectl(roles, deletion("foreground"))},
		{"NoHooks", false, func(p *proof) {
			if _, err := p.helm("uninstall", release, "--no-hooks"); err != nil {
				p.Fatal(err)
			}
		}},
	} {
		if testing.Short() && !tc.short {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			p := newProof(t)
			p.mustInstall()
			l := p.mustLoad()
			tc.remove(p)
			p.mustBeGone(p.nodes...)
			l.mustProgress()
			p.figure("without a hook, no trace is left: %s", l.mustFinish())
			if p.installed() {
				p.mustUninstall() // what is left of the release
			}
		})
	}
}

// mustBeGone waits until nodes are as before the install.
func (p *proof) mustBeGone(nodes ...*node) {
	p.Helper()
	for _, n := range nodes {
		if err := p.await("the removal on "+n.name, func() error {
			if got := p.mustRead(n, conflist); got != n.conflist() {
				return fmt.Errorf("%s is\n%s", conflist, got)
			}
			if out, err := n.output(stepTimeout, nil, "find", pinDir); err == nil {
				return fmt.Errorf("pinned:\n%s", out)
			}
			return nil
		}); err != nil {
			p.Fatal(err)
		}
	}
}

// TestNoRemoval has agents end for other reasons: nothing is uninstalled.
func TestNoRemoval(t *testing.T) {
	deletePods := []string{"--namespace=" + release, "delete", "pods", "--selector=app.kubernetes.io/component=agent"}
	for _, tc := range []struct {
		name     string
		short    bool
		commands [][]string
	}{
		{"Restart", true, [][]string{{"--namespace=" + release, "rollout", "restart", daemonSet}}},
		{"Pods", false, [][]string{deletePods}},
		{"Drain", false, [][]string{{"drain", "node2", "--ignore-daemonsets", "--force", "--pod-selector=app=nothing"}, deletePods, {"uncordon", "node2"}}},
		{"Orphans", false, [][]string{
			{"--namespace=" + release, "delete", daemonSet, "--cascade=orphan"},
			{"--namespace=" + release, "apply", "-f", "-"},
			deletePods,
		}},
		// Without its rights an agent does not learn whether its DaemonSet is there.
		{"NoRoles", false, [][]string{roles, deletePods}},
	} {
		if testing.Short() && !tc.short {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			p := newProof(t)
			p.mustInstall()
			l := p.mustLoad()
			before := p.conflistFiles()
			manifest, err := p.helm("get", "manifest", release)
			if err != nil {
				t.Fatal(err)
			}
			for _, args := range tc.commands {
				stdin := strings.NewReader(manifest)
				if _, err := p.control().output(longTimeout, stdin, "kubectl", args...); err != nil {
					t.Fatal(err)
				}
			}
			if tc.name != "NoRoles" { // where agents are not ready again
				p.mustRollOut()
				l.mustBeShortcut()
			}
			l.mustProgress()
			l.mustFinish()
			if after := p.conflistFiles(); after != before {
				t.Errorf("conflists and pins before:\n%s\nafter:\n%s", before, after)
			}
			if tc.name == "NoRoles" {
				p.mustUninstall()
			}
		})
	}
}

// conflistFiles identifies the files of all nodes that an uninstall would have replaced or deleted.
func (p *proof) conflistFiles() string {
	p.Helper()
	text := ""
	for _, n := range p.nodes {
		out, err := n.output(stepTimeout, nil, "stat", "--format=%n %i", conflist, pinDir)
		if err != nil {
			p.Fatal(err)
		}
		text += n.name + "\n" + out
	}
	return text
}

// TestUninstallWithoutNode uninstalls while a node is not ready: it is named, and cleans up when it is back.
func TestUninstallWithoutNode(t *testing.T) {
	if testing.Short() {
		return
	}
	p := newProof(t)
	p.mustInstall()
	l := p.mustLoad()
	lost := p.nodes[1]
	lost.stopDaemon("kubelet")
	p.mustKubectl("wait", "--for=condition=Ready=Unknown", "node/"+lost.name, "--timeout=3m")
	// Helm prints the hook's log to stderr.
	out, err := p.control().output(longTimeout, nil, "bash", "-c", "helm uninstall "+release+" --wait --namespace="+release+" 2>&1")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !strings.Contains(out, lost.name+": LEFT AS IT IS: the node is not ready") || !strings.Contains(out, "podshunt is out of 1 nodes") {
		t.Errorf("helm uninstall printed\n%s\nwant it to name %s", out, lost.name)
	}
	if err := lost.restartDaemon("kubelet"); err != nil {
		t.Fatal(err)
	}
	p.mustBeGone(p.nodes...)
	l.mustProgress()
	p.figure("helm uninstall while a node is not ready, which cleans up when it is back: %s", l.mustFinish())
	if err := p.awaitNodes(); err != nil {
		t.Error(err)
	}
}

// TestDeleteBinary runs the command of docs/operations.md that removes the binary from all nodes, with
// pods that were started with it and without them.
func TestDeleteBinary(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	n := p.nodes[0]
	p.mustRun(server("last", n))
	image := p.mustKubectl("--namespace="+release, "get", daemonSet, "--output=jsonpath={.spec.template.spec.containers[0].image}")
	p.mustUninstall()
	del := func(n *node) string {
		p.Helper()
		return p.mustKubectl("debug", "node/"+n.name, "--namespace="+p.namespace, "--quiet", "--attach", "--profile=sysadmin",
			"--image="+image, "--", "podshunt-agent", "uninstall",
			"--run-dir=/host/run/podshunt", "--pin-dir=/host/sys/fs/bpf/podshunt",
			"--cni-conf-dir=/host/etc/cni/net.d", "--cni-bin-dir=/host/opt/cni/bin", "--cni-cache-dir=/host/var/lib/cni", "--delete-binary")
	}
	there := func(n *node) bool {
		_, err := n.output(stepTimeout, nil, "stat", plugin)
		return err == nil
	}
	del(n)
	// What a container prints before kubectl is attached is in its log only.
	if err := p.await("the reason why the binary stays", func() error {
		out, err := p.kubectl("--namespace="+p.namespace, "logs", "--selector=app.kubernetes.io/managed-by=kubectl-debug")
		if err == nil && !strings.Contains(out, "pods were started with it") {
			err = fmt.Errorf("got %q", out)
		}
		return err
	}); err != nil || !there(n) {
		t.Errorf("a pod may need the binary: got %v, and there %v, want it to stay", err, there(n))
	}
	p.mustKubectl("--namespace="+p.namespace, "delete", "pod", "last")
	for _, n := range p.nodes {
		// Pods of earlier tests may still be ending.
		if err := p.await("the deletion of the binary on "+n.name, func() error {
			if out := del(n); there(n) {
				return fmt.Errorf("it printed %s", out)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	p.mustRun(server("after", n))
	p.figure("the plugin's binary stays while a pod was started with it, and is deleted on all nodes after that")
}

// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	release  = "podshunt"
	conflist = "/etc/cni/net.d/10-pods.conflist"
	// plugin stays when everything else goes: the runtime may still name it for a pod that was started with it.
	plugin    = "/opt/cni/bin/podshunt"
	pinDir    = "/sys/fs/bpf/podshunt"
	daemonSet = "daemonset/podshunt"
)

// The programs that helm may be.
const helm3, helm4 = "helm", "helm4"

// helm runs helm as a user does who reads README.
func (c *cluster) helm(args ...string) (string, error) {
	return c.control().output(longTimeout, nil, c.helmProgram, append(args, "--namespace="+release)...)
}

// chartValues are those that README has not: the kernel of this machine may be
// one that has to be accepted, and a node is not the whole machine.
func chartValues() []string {
	return []string{
		"--set=agent.acceptHazards={fionread-tcp,fionread-redirected,splice}",
		"--set=agent.cgroup=/run/cgroup2",
	}
}

// installed reports whether the chart is installed.
func (c *cluster) installed() bool {
	_, err := c.helm("status", release)
	return err == nil
}

// mustInstall installs the chart, unless it is, and returns how long that took.
func (p *proof) mustInstall() time.Duration {
	p.Helper()
	if p.installed() {
		return 0
	}
	began := time.Now()
	if _, err := p.helm(append([]string{"install", release, p.chart, "--create-namespace", "--wait"}, chartValues()...)...); err != nil {
		p.Fatal(err)
	}
	p.mustRollOut() // helm does not wait for as many pods as an update may replace at once
	return time.Since(began)
}

func (p *proof) mustUninstall() time.Duration {
	p.Helper()
	began := time.Now()
	if _, err := p.helm("uninstall", release, "--wait"); err != nil {
		p.Fatal(err)
	}
	return time.Since(began)
}

// mustRead returns a file of the node.
func (p *proof) mustRead(n *node, file string) string {
	p.Helper()
	content, err := os.ReadFile(filepath.Join("/proc", n.pid(), "root", file))
	if err != nil {
		p.Fatal(err)
	}
	return string(content)
}

// TestInstall installs the chart while pods talk that were there before.
func TestInstall(t *testing.T) {
	p := newProof(t)
	if p.installed() {
		p.mustUninstall()
	}
	n := p.nodes[0]
	before := p.mustRead(n, conflist)
	p.mustRun(optIn(server("server", n)))
	old := p.mustTalk(
		optIn(client("lasting", n, p.address("server")+":8080")),
		optIn(client("renewed", n, p.address("server")+":8080", "-requests=50")))
	lasting, renewed := old[0], old[1]

	p.figure("helm install --wait of two agents: %.1f s", p.mustInstall().Seconds())
	after := p.mustRead(n, conflist)
	if after == before || !strings.Contains(after, `"podshunt"`) {
		t.Errorf("conflist after the install:\n%s", after)
	}
	took := renewed.mustBecome("paired", settleTime, func(f flow) bool { return f.Paired })
	p.figure("a pod that ran before the install has its first paired connection %.1f s after helm returns", took.Seconds())
	for _, f := range lasting.flows() {
		if f.Paired || f.Reason == "" {
			t.Errorf("a connection that was there before the install: %v", f)
		}
	}
	lasting.mustFinish()
	renewed.mustFinish()

	// A pod made now is announced by the plugin.
	young := p.mustTalk(optIn(client("young", n, p.address("server")+":8080")))[0]
	p.figure("a pod made after the install: %.1f %% of bytes by the shortcut, all counted", 100*young.mustBeShortcut())
	agent := p.mustKubectl("get", "pods", "--namespace="+release, "--field-selector=spec.nodeName="+n.name, "-o=jsonpath={.items[0].metadata.name}")
	// The agent's pod is in a PID namespace of its own, and sees the node's runtime all the same.
	const runtime = "containerd, networks in /etc/cni/net.d, plugins in /opt/cni/bin"
	for command, wants := range map[string][]string{
		"flows": {p.namespace + "/young"}, "status": {p.namespace + "/young", runtime}, "doctor --accept-hazards=all": {runtime},
	} {
		out := p.mustKubectl(append([]string{"exec", "--namespace=" + release, agent, "--", "podshunt-agent"}, strings.Fields(command)...)...)
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("podshunt-agent %s has no %q:\n%s", command, want, out)
			}
		}
	}
	young.mustFinish()
}

// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// k3sConfDir and k3sBinDir are the directories of k3s.
const (
	k3sConfDir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
	k3sBinDir  = "/var/lib/rancher/k3s/data/cni"
)

// TestDirectories has a node on which containerd has the directories of k3s, beside one with
// the usual ones: with auto, each agent installs in those of its own node. k3s's own file is
// written in place when it starts.
func TestDirectories(t *testing.T) {
	if testing.Short() {
		return // it restarts containerd
	}
	p := newProof(t)
	if p.installed() {
		p.mustUninstall()
	}
	usual, k3s := p.nodes[0], p.nodes[1]
	k3s.mustMove(p, fmt.Sprintf(`
mkdir -p %[1]s %[2]s
cp %[3]s %[1]s
cp -p /opt/cni/bin/* %[2]s
rm -f %[2]s/podshunt
cp /etc/containerd/config.toml /etc/containerd/usual.toml
cat >>/etc/containerd/config.toml <<'END'
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "%[2]s"
conf_dir = "%[1]s"
END`, k3sConfDir, k3sBinDir, conflist))
	t.Cleanup(func() {
		if p.installed() {
			p.mustUninstall()
		}
		k3s.mustMove(p, "mv /etc/containerd/usual.toml /etc/containerd/config.toml\nrm -rf /var/lib/rancher")
	})

	args := append([]string{"install", release, p.chart, "--create-namespace", "--wait", "--set=agent.cniConfDir=auto", "--set=agent.cniBinDir=auto"}, chartValues()...)
	if _, err := p.helm(args...); err != nil {
		t.Fatal(err)
	}
	p.mustRollOut()
	k3sConflist := filepath.Join(k3sConfDir, filepath.Base(conflist))
	mustHave := func(n *node, file string) {
		t.Helper()
		if err := p.await("the entry on "+n.name, func() error {
			if got := p.mustRead(n, file); !strings.Contains(got, `"podshunt"`) {
				return fmt.Errorf("%s is\n%s", file, got)
			}
			return nil
		}); err != nil {
			log, _ := p.kubectl("--namespace="+release, "logs", "--selector=app.kubernetes.io/component=agent", "--prefix", "--tail=40")
			t.Fatalf("%v\nagents:\n%s", err, log)
		}
	}
	mustHave(usual, conflist)
	mustHave(k3s, k3sConflist)
	if got := p.mustRead(k3s, conflist); got != k3s.conflist() {
		t.Errorf("the file that containerd does not read on %s is\n%s", k3s.name, got)
	}
	p.mustRun(optIn(server("server", k3s)))
	talk := p.mustTalk(optIn(client("client", k3s, p.address("server")+":8080")))[0]
	p.figure("directories of k3s, by auto: %.1f %% of bytes by the shortcut", 100*talk.mustBeShortcut())
	talk.mustFinish()

	if err := k3s.script(fmt.Sprintf("cat >%s <<'END'\n%sEND", k3sConflist, k3s.conflist())); err != nil {
		t.Fatal(err)
	}
	mustHave(k3s, k3sConflist)
	p.mustUninstall()
	p.mustBeGone(p.nodes...)
	if got := p.mustRead(k3s, k3sConflist); got != k3s.conflist() {
		t.Errorf("%s after the uninstall:\n%s", k3sConflist, got)
	}
}

// mustMove changes the configuration of containerd by a script, and starts it again.
func (n *node) mustMove(p *proof, script string) {
	p.Helper()
	if err := n.script(script); err != nil {
		p.Fatal(err)
	}
	n.stopDaemon("containerd")
	if err := n.restartDaemon("containerd"); err != nil {
		p.Fatal(err)
	}
	if err := p.await("containerd", func() error {
		_, err := n.output(stepTimeout, nil, "ctr", "version")
		return err
	}); err != nil {
		p.Fatal(err)
	}
	p.mustKubectl("wait", "node/"+n.name, "--for=condition=Ready", fmt.Sprintf("--timeout=%v", stepTimeout))
}

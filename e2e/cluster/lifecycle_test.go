// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// load is traffic on every node: lasting connections, and ones that are made anew all the time.
type load struct {
	lasting, renewed []*traffic
	began            time.Time
}

func (p *proof) mustLoad() *load {
	p.Helper()
	l := &load{began: time.Now()}
	a, b := p.nodes[0], p.nodes[1]
	p.mustRun(optIn(server("server-a", a)), optIn(server("server-b", b)))
	targetA, targetB := p.address("server-a")+":8080", p.address("server-b")+":8080"
	lasting, renewed := []string{"-connections=8"}, []string{"-requests=20", "-interval=10ms"}
	all := p.mustTalk(
		optIn(client("lasting-a", a, targetA, lasting...)), optIn(client("lasting-b", b, targetB, lasting...)),
		optIn(client("renewed-a", a, targetA, renewed...)), optIn(client("renewed-b", b, targetB, renewed...)))
	l.lasting, l.renewed = all[:2], all[2:]
	l.mustBeShortcut()
	return l
}

// mustBeShortcut is that of each traffic: renewed connections are counted by nobody.
func (l *load) mustBeShortcut() {
	for _, tr := range l.lasting {
		tr.Helper()
		tr.mustBeShortcut()
	}
	for _, tr := range l.renewed {
		tr.mustBecome("paired", settleTime, isPaired)
	}
}

func (l *load) mustProgress() {
	for _, tr := range append(l.lasting, l.renewed...) {
		tr.Helper()
		tr.mustProgress()
	}
}

// mustFinish returns what to say of the load.
func (l *load) mustFinish() string {
	var bytes int64
	var connections int
	var longest time.Duration
	for _, tr := range append(l.lasting, l.renewed...) {
		tr.Helper()
		r := tr.mustFinish()
		bytes += r.Sent + r.Received
		connections += r.Connections
		longest = max(longest, r.Longest)
	}
	return fmt.Sprintf("%.0f MB over %d connections to the byte in %.0f s, longest request %v",
		megabytes(bytes), connections, time.Since(l.began).Seconds(), longest.Round(time.Millisecond))
}

func (p *proof) mustRollOut() {
	p.Helper()
	p.mustKubectl("--namespace="+release, "rollout", "status", daemonSet, fmt.Sprintf("--timeout=%v", stepTimeout))
}

// mustReplace replaces the agents' pods under load.
func (p *proof) mustReplace(what string, replace func()) {
	p.Helper()
	p.mustInstall()
	l := p.mustLoad()
	began := time.Now()
	replace()
	p.mustRollOut()
	took := time.Since(began)
	l.mustProgress()
	l.mustBeShortcut()
	p.figure("%s in %.1f s: %s", what, took.Seconds(), l.mustFinish())
}

// TestRollingUpdate restarts the DaemonSet under load.
func TestRollingUpdate(t *testing.T) {
	p := newProof(t)
	p.mustReplace("rolling update of two agents", func() {
		p.mustKubectl("--namespace="+release, "rollout", "restart", daemonSet)
	})
}

// TestUpgrade is helm upgrade under load.
func TestUpgrade(t *testing.T) { testUpgrade(t) }

func testUpgrade(t *testing.T) {
	t.Helper()
	p := newProof(t)
	p.mustReplace("helm upgrade", func() {
		args := append([]string{"upgrade", release, p.chart, "--wait", "--set=agent.logLevel=debug"}, chartValues()...)
		if _, err := p.helm(args...); err != nil {
			t.Fatal(err)
		}
	})
}

// TestCrashLoop has agents that end as soon as they start.
func TestCrashLoop(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	l := p.mustLoad()
	p.mustKubectl("--namespace="+release, "patch", daemonSet, "--type=json", `--patch=[
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--no-such-flag"},
		{"op": "add", "path": "/spec/updateStrategy", "value": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}}}]`)
	if err := p.await("agents that crash", func() error {
		out := p.mustKubectl("--namespace="+release, "get", "pods", "-o=jsonpath={.items[*].status.containerStatuses[0].restartCount}")
		for _, restarts := range strings.Fields(out) {
			if restarts == "0" {
				return fmt.Errorf("restarts: %s", out)
			}
		}
		if len(strings.Fields(out)) != len(p.nodes) {
			return fmt.Errorf("restarts: %q", out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	n := p.nodes[0]
	p.mustRun(optIn(server("orphan-server", n)))
	young := p.mustTalk(optIn(client("orphan", n, p.address("orphan-server")+":8080", "-requests=20")))[0]
	start := time.Since(began)
	l.mustProgress()
	p.mustKubectl("--namespace="+release, "rollout", "undo", daemonSet)
	p.mustRollOut()
	l.mustProgress()
	l.mustBeShortcut()
	adopted := young.mustBecome("paired", settleTime, isPaired)
	young.mustFinish()
	p.figure("agents in a crash loop: two pods start one after the other and talk within %.1f s, are paired %.1f s after the agent is back; %s",
		start.Seconds(), adopted.Seconds(), l.mustFinish())
}

// TestServerDown stops the API server.
func TestServerDown(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	l := p.mustLoad()
	p.control().stopDaemon("kube-apiserver")
	began := time.Now()
	for time.Since(began) < 5*time.Second {
		l.mustProgress()
		time.Sleep(time.Second)
	}
	l.mustBeShortcut()
	down := time.Since(began)
	if err := p.startAPIServer(); err != nil {
		t.Fatal(err)
	}
	l.mustProgress()
	// What is asked for from now on counts again, on each node.
	began = time.Now()
	for _, tr := range l.lasting {
		p.mustAnnotate("pod", tr.client, disabled)
	}
	for _, tr := range l.lasting {
		tr.mustBecome("on TCP", stepTimeout, isOnTCP)
	}
	back := time.Since(began)
	p.figure("no API server for %.0f s: flows stay on the shortcut and new ones are paired; an opt-out counts %.1f s after it is back; %s",
		down.Seconds(), back.Seconds(), l.mustFinish())
}

// TestUninstall takes everything out under load.
func TestUninstall(t *testing.T) { testUninstall(t) }

// TestHelm4 does with Helm 4, which lets the API server merge the fields of an object, and
// waits by other rules, what the tests above do with Helm 3: it upgrades Helm 3's release,
// uninstalls it, installs and uninstalls.
func TestHelm4(t *testing.T) {
	if testing.Short() {
		return // other tests use Helm 3
	}
	p := newProof(t)
	p.mustInstall()
	p.helmProgram = helm4
	defer func() { p.helmProgram = helm3 }()
	t.Run("Upgrade", testUpgrade)
	p.mustUninstall()
	t.Run("Uninstall", testUninstall)
}

func testUninstall(t *testing.T) {
	t.Helper()
	p := newProof(t)
	p.mustInstall()
	var all []*traffic
	for _, n := range p.nodes {
		name := "server-" + n.name
		p.mustRun(optIn(server(name, n)))
		all = append(all, p.mustTalk(optIn(client("client-"+n.name, n, p.address(name)+":8080", "-connections=8")))...)
	}
	for _, tr := range all {
		tr.mustBeShortcut()
	}
	took := p.mustUninstall()
	for _, n := range p.nodes {
		if got := p.mustRead(n, conflist); got != n.conflist() {
			t.Errorf("%s on %s after the uninstall:\n%s\nwant:\n%s", conflist, n.name, got, n.conflist())
		}
		if out, err := n.output(stepTimeout, nil, "find", pinDir); err == nil {
			t.Errorf("left on %s:\n%s", n.name, out)
		}
	}
	var bytes int64
	for _, tr := range all {
		tr.mustProgress()
		r := tr.mustFinish()
		bytes += r.Sent + r.Received
	}
	p.figure("helm uninstall under load: %.1f s, %.0f MB over 16 connections to the byte, conflists as before, nothing pinned", took.Seconds(), megabytes(bytes))
	p.mustRun(server("last", p.nodes[0]))
}

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
	for _, n := range p.nodes {
		name := "server-" + n.name
		p.mustRun(optIn(server(name, n)))
		target := p.address(name) + ":8080"
		l.lasting = append(l.lasting, p.mustTalk(optIn(client("lasting-"+n.name, n, target, "-connections=8")))...)
		l.renewed = append(l.renewed, p.mustTalk(optIn(client("renewed-"+n.name, n, target, "-requests=20", "-interval=5ms")))...)
	}
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

// TestRollingUpdate replaces the agents' pods under load.
func TestRollingUpdate(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	l := p.mustLoad()
	began := time.Now()
	p.mustKubectl("--namespace="+release, "rollout", "restart", daemonSet)
	p.mustRollOut()
	took := time.Since(began)
	l.mustProgress()
	l.mustBeShortcut()
	p.figure("rolling update of two agents in %.1f s: %s", took.Seconds(), l.mustFinish())
}

// TestUpgrade is helm upgrade under load.
func TestUpgrade(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	l := p.mustLoad()
	began := time.Now()
	args := append([]string{"upgrade", release, p.chart, "--wait", "--set=agent.logLevel=debug"}, chartValues()...)
	if _, err := p.helm(args...); err != nil {
		t.Fatal(err)
	}
	p.mustRollOut()
	took := time.Since(began)
	l.mustProgress()
	l.mustBeShortcut()
	p.figure("helm upgrade in %.1f s: %s", took.Seconds(), l.mustFinish())
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
	for time.Since(began) < 10*time.Second {
		l.mustProgress()
		time.Sleep(time.Second)
	}
	l.mustBeShortcut()
	down := time.Since(began)
	if err := p.startAPIServer(); err != nil {
		t.Fatal(err)
	}
	l.mustProgress()
	// What is asked for from now on counts again.
	began = time.Now()
	p.mustAnnotate("pod", l.lasting[0].client, disabled)
	l.lasting[0].mustBecome("on TCP", stepTimeout, isOnTCP)
	back := time.Since(began)
	p.figure("no API server for %.0f s: flows stay on the shortcut and new ones are paired; an opt-out counts %.1f s after it is back; %s",
		down.Seconds(), back.Seconds(), l.mustFinish())
}

// TestStatefulSet has a server like a database behind a headless Service.
func TestStatefulSet(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	n := p.nodes[0]
	template := optIn(server("db", n))
	p.mustApply(
		p.service("db", "db", object{"clusterIP": "None", "ports": []object{{"port": 8082}}}),
		object{
			"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": object{"namespace": p.namespace, "name": "db"},
			"spec": object{
				"serviceName": "db", "replicas": 1, "selector": object{"matchLabels": template.labels},
				"template": object{"metadata": object{"labels": template.labels, "annotations": template.annotations}, "spec": template.spec()},
			},
		})
	p.mustKubectl("--namespace="+p.namespace, "rollout", "status", "statefulset/db", fmt.Sprintf("--timeout=%v", stepTimeout))
	flags := []string{"-protocol=database", "-size=4096", "-connections=16"}
	first := p.mustTalk(optIn(client("first", n, p.address("db-0")+":8082", flags...)))[0]
	share := first.mustBeShortcut()
	r := first.mustFinish()

	began := time.Now()
	uid := p.mustGet("pod", "db-0", ".metadata.uid")
	p.mustKubectl("--namespace="+p.namespace, "delete", "pod", "db-0")
	if err := p.await("db-0", func() error {
		if got, err := p.kubectl("--namespace="+p.namespace, "get", "pod", "db-0", "-o=jsonpath={.metadata.uid}"); err != nil || got == uid {
			return fmt.Errorf("still %s: %w", got, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	p.mustBeReady("pod/db-0")
	second := p.mustTalk(optIn(client("second", n, p.address("db-0")+":8082", flags...)))[0]
	again := second.mustBeShortcut()
	took := time.Since(began)
	second.mustFinish()
	p.figure("16 connections to a database: %d requests right, %.1f %% by the shortcut; its pod deleted and made again: %.1f %% after %.1f s",
		r.Requests, 100*share, 100*again, took.Seconds())
}

// TestEvents looks for what kubectl describe tells of pods that cannot take part.
func TestEvents(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	bad := server("bad", p.nodes[0])
	bad.annotations[annotation] = "yes"
	host := optIn(server("host", p.nodes[1]))
	host.hostNetwork = true
	good := optIn(server("good", p.nodes[0]))
	p.mustRun(bad, host, good)
	events := func(name string) string {
		return p.mustKubectl("--namespace="+p.namespace, "get", "events", "--field-selector=involvedObject.name="+name,
			`-o=jsonpath={range .items[*]}{.source.component}{.reportingComponent}: {.type} {.reason}: {.message}{"\n"}{end}`)
	}
	find := func(name, text string) (event string) {
		if err := p.await("an event of "+name, func() error {
			for line := range strings.Lines(events(name)) {
				if strings.HasPrefix(line, release) && strings.Contains(line, text) {
					event = strings.TrimSpace(line)
					return nil
				}
			}
			return fmt.Errorf("events:\n%s", events(name))
		}); err != nil {
			t.Error(err)
		}
		return event
	}
	p.figure("bad annotation: %s", find("bad", enabled))
	p.figure("hostNetwork:    %s", find("host", "hostNetwork"))
	if got := events("good"); strings.Contains(got, release) {
		t.Errorf("events of a pod that takes part:\n%s", got)
	}
}

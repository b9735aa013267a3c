// SPDX-License-Identifier: Apache-2.0

//go:build upgrade

package cluster_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// version is a release that versions.sh has made.
type version struct{ name, chart string }

// mustHave imports the image of a version into all nodes.
func (p *proof) mustHave(name string) version {
	p.Helper()
	cache, err := cacheDir()
	if err != nil {
		p.Fatal(err)
	}
	image, chart, err := madeRelease(filepath.Join(cache, "versions", name, "release"))
	if err != nil {
		p.Fatal(err)
	}
	for _, n := range p.nodes {
		archive, err := os.Open(image)
		if err != nil {
			p.Fatal(err)
		}
		defer archive.Close()
		if err := n.importImage(archive); err != nil {
			p.Fatal(err)
		}
	}
	return version{name, chart}
}

// mustHelm installs or upgrades, and returns how long it took until all agents are ready.
func (p *proof) mustHelm(command string, to version, values ...string) time.Duration {
	p.Helper()
	began := time.Now()
	if _, err := p.helm(append([]string{command, release, to.chart, "--wait"}, values...)...); err != nil {
		p.Fatal(err)
	}
	p.mustRollOut()
	return time.Since(began)
}

// mustLog returns the agents' logs.
func (p *proof) mustLog() string {
	p.Helper()
	return p.mustKubectl("--namespace="+release, "logs", daemonSet, "--all-pods", "--tail=-1")
}

// TestVersions upgrades and downgrades between versions under load. Between those of one layout
// connections stay on the shortcut; otherwise they go on by TCP, and new ones are paired. All is
// counted to the byte by those who send and receive it.
func TestVersions(t *testing.T) {
	p := newProof(t)
	if p.installed() {
		p.mustUninstall()
	}
	head := version{"HEAD", p.chart}
	base, other := p.mustHave("base"), p.mustHave("other")
	same := p.mustShareLayout(base)
	p.mustHelm("install", base, append(chartValues(), "--create-namespace")...)
	l := p.mustLoad()
	for _, step := range []struct {
		to   version
		same bool
	}{{head, same}, {base, same}, {head, same}, {other, false}, {head, false}} {
		took := p.mustHelm("upgrade", step.to, chartValues()...)
		replaced := strings.Contains(p.mustLog(), "the pins are replaced")
		if replaced == step.same {
			t.Errorf("to %s: pins replaced: %t, want %t", step.to.name, replaced, !step.same)
		}
		l.mustProgress()
		if step.same {
			l.mustBeShortcut()
		}
		for _, tr := range l.renewed {
			tr.mustBecome("paired", settleTime, isPaired)
		}
		p.figure("upgrade to %s in %.1f s, pins replaced: %t", step.to.name, took.Seconds(), replaced)
	}
	p.figure("upgrades and downgrades: %s", l.mustFinish())
	p.mustUninstall()
}

// mustShareLayout reports whether the layout of the base is HEAD's.
func (p *proof) mustShareLayout(base version) bool {
	p.Helper()
	cache, err := cacheDir()
	if err != nil {
		p.Fatal(err)
	}
	was, err := os.ReadFile(filepath.Join(cache, "versions", base.name, "layout"))
	if err != nil {
		p.Fatal(err)
	}
	is, err := os.ReadFile("../../bpf/flow.h")
	if err != nil {
		p.Fatal(err)
	}
	return strings.Contains(string(is), string(was))
}

// TestFirstLayout upgrades from the oldest version whose kernel objects can be replaced.
func TestFirstLayout(t *testing.T) {
	p := newProof(t)
	if p.installed() {
		p.mustUninstall()
	}
	p.mustHelm("install", p.mustHave("first"), "--set=agent.kernelHazards=accept", "--set=agent.cgroup=/run/cgroup2", "--create-namespace")
	var all []*traffic
	for _, n := range p.nodes {
		p.mustRun(optIn(server("server-"+n.name, n)))
		target := p.address("server-"+n.name) + ":8080"
		all = append(all, p.mustTalk(optIn(client("lasting-"+n.name, n, target, "-connections=8")), optIn(client("renewed-"+n.name, n, target, "-requests=20", "-interval=10ms")))...)
	}
	if err := p.await("connections on the shortcut", func() error {
		for _, tr := range all {
			out := p.mustKubectl("exec", "--namespace="+release, p.agentOn(tr.node), "--", "podshunt-agent", "flows")
			if !strings.Contains(out, tr.client+" ") || !strings.Contains(out, "shortcut") {
				return errNotYet(out)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	took := p.mustHelm("upgrade", version{"HEAD", p.chart}, append(chartValues(), "--reset-values")...)
	if log := p.mustLog(); !strings.Contains(log, "the pins are replaced") {
		t.Errorf("got the log\n%s\nwant it to say that the pins are replaced", log)
	}
	for _, tr := range all {
		tr.mustProgress()
		if strings.HasPrefix(tr.client, "renewed") {
			tr.mustBecome("paired", settleTime, isPaired)
		}
	}
	var bytes int64
	for _, tr := range all {
		r := tr.mustFinish()
		bytes += r.Sent + r.Received
	}
	p.figure("upgrade from the first layout in %.1f s: %.0f MB to the byte", took.Seconds(), megabytes(bytes))
	p.mustUninstall()
}

// agentOn returns the name of a node's agent.
func (p *proof) agentOn(n *node) string {
	p.Helper()
	return p.mustKubectl("get", "pods", "--namespace="+release, "--selector=app.kubernetes.io/name=podshunt", "--field-selector=spec.nodeName="+n.name, "-o=jsonpath={.items[0].metadata.name}")
}

type errNotYet string

func (e errNotYet) Error() string { return "not yet:\n" + string(e) }

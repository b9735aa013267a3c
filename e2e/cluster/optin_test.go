// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func optIn(p pod) pod {
	p.annotations[annotation] = enabled
	return p
}

// mustAnnotate is kubectl annotate, for an object of the proof's namespace.
func (p *proof) mustAnnotate(kind, name, value string) {
	p.Helper()
	args := []string{"annotate", "--overwrite", kind, name, annotation + "=" + value}
	if value == "" {
		args[len(args)-1] = annotation + "-"
	}
	if kind != "namespace" {
		args = append(args, "--namespace="+p.namespace)
	}
	p.mustKubectl(args...)
}

func isPaired(f flow) bool   { return f.Paired }
func isUnpaired(f flow) bool { return !f.Paired }

// isOnTCP accepts paired flows of which both directions are back on TCP, and say so.
func isOnTCP(f flow) bool {
	return f.Paired && !f.ToServer.Shortcut && !f.ToClient.Shortcut && f.ToServer.Reason != "" && f.ToClient.Reason != ""
}

// proveAnnotate opts running pods in and out.
func proveAnnotate(t *testing.T) {
	p := newProof(t)
	n := p.nodes[0]
	p.mustRun(server("server", n))
	all := p.mustTalk(
		client("lasting", n, p.address("server")+":8080", "-requests=1000000"),
		client("renewed", n, p.address("server")+":8080", "-requests=30", "-interval=1ms"))
	renewed := all[1]
	p.mustAnnotate("pod", "server", enabled)
	p.mustAnnotate("pod", "renewed", enabled)
	began := time.Now()
	renewed.mustBecome("paired", settleTime, isPaired)
	in := time.Since(began)

	p.mustAnnotate("pod", "lasting", enabled)
	lasting := all[0]
	var joined, again time.Duration
	const times = 10
	agent, err := show[status](n, "status")
	if err != nil {
		t.Fatal(err)
	}
	if agent.OpenConnections.Join {
		joined = lasting.mustBecome("on the shortcut", settleTime, isShortcut)
		lasting.mustBeCounted()
		for range times {
			p.mustAnnotate("pod", "lasting", disabled)
			lasting.mustBecome("on TCP", inForce, isOnTCP)
			p.mustAnnotate("pod", "lasting", enabled)
			again = max(again, lasting.mustBecome("on the shortcut", settleTime, isShortcut))
		}
		p.figure("opt-in: an open connection on the shortcut after %.2f s, %d times again after %.2f s at most", joined.Seconds(), times, again.Seconds())
	} else {
		p.figure("opt-in: open connections stay on TCP here: %s", agent.OpenConnections.Message)
	}
	late := p.mustTalk(optIn(client("late", n, p.address("server")+":8080")))[0]
	late.mustBeShortcut()
	p.mustAnnotate("pod", "late", disabled)
	out := late.mustBecome("on TCP", inForce, isOnTCP)
	reason := late.flows()[0].ToServer.Message
	late.mustProgress()
	late.mustFinish()
	lasting.mustFinish()
	renewed.mustFinish()
	p.figure("opt-in: connections paired %.2f s after kubectl annotate; opt-out: live ones on TCP after %.2f s (%q), no byte lost",
		in.Seconds(), out.Seconds(), reason)
}

// proveNamespace is the namespace's annotation, and the pod's own that wins.
func proveNamespace(t *testing.T) {
	p := newProof(t)
	n := p.nodes[0]
	p.mustAnnotate("namespace", p.namespace, enabled)
	p.mustRun(server("server", n))
	target := p.address("server") + ":8080"
	no := client("refuses", n, target)
	no.annotations[annotation] = disabled
	all := p.mustTalk(client("inherits", n, target), no)
	share := all[0].mustBeShortcut()
	all[1].mustBecome("unpaired", settleTime, isUnpaired)
	for _, tr := range all {
		tr.mustFinish()
	}
	p.figure("the namespace's default: %.1f %% by the shortcut; a pod of it with its own %q: none", 100*share, disabled)
}

// provePolicy creates a NetworkPolicy under a live flow, and deletes it.
func provePolicy(t *testing.T) {
	p := newProof(t)
	n := p.nodes[0]
	p.mustRun(optIn(server("server", n)))
	tr := p.mustTalk(optIn(client("client", n, p.address("server")+":8080")))[0]
	tr.mustBeShortcut()

	p.mustApply(object{
		"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
		"metadata": object{"namespace": p.namespace, "name": "deny-all"},
		"spec":     object{"podSelector": object{"matchLabels": object{"app": "server"}}, "policyTypes": []string{"Ingress"}},
	})
	named := func(f flow) bool {
		return isOnTCP(f) && strings.Contains(f.ToServer.Message, p.namespace+"/deny-all")
	}
	off := tr.mustBecome("on TCP because of the policy", inForce, named)
	tr.mustProgress()
	p.mustKubectl("--namespace="+p.namespace, "delete", "networkpolicy", "deny-all")
	on := tr.mustBecome("on the shortcut", settleTime, isShortcut)
	tr.mustBeCounted()
	tr.mustFinish()
	p.figure("NetworkPolicy under a live flow: on TCP and named after %.2f s, back after %.2f s, no byte lost", off.Seconds(), on.Seconds())
}

// proveEvents looks for what kubectl describe tells of pods that cannot take part.
func proveEvents(t *testing.T) {
	p := newProof(t)
	bad := server("bad", p.nodes[0])
	bad.annotations[annotation] = "yes"
	host := optIn(server("host", p.nodes[1]))
	host.hostNetwork = true
	good := optIn(server("good", p.nodes[0]))
	p.mustRun(bad, host, good)
	events := func(name string) string {
		return p.mustKubectl("--namespace="+p.namespace, "get", "events", "--field-selector=involvedObject.name="+name,
			`-o=jsonpath={range .items[*]}{.source.component}: {.type} {.reason}: {.message}{"\n"}{end}`)
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

// proveExamples has the API server check the objects of docs/examples that are its own.
func proveExamples(t *testing.T) {
	p := newProof(t)
	file, err := filepath.Abs("../../docs/examples/redis-same-node.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.control().output(stepTimeout, nil, "kubectl", "--namespace="+p.namespace, "apply", "--dry-run=server", "--warnings-as-errors", "--validate=strict", "-f", file)
	if err != nil || strings.Count(out, "created (server dry run)") != 3 {
		t.Errorf("got %v and %q, want three objects", err, out)
	}
}

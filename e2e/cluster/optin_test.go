// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
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

// TestAnnotate opts running pods in and out.
func TestAnnotate(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
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
	late := p.mustTalk(optIn(client("late", n, p.address("server")+":8080")))[0]
	late.mustBeShortcut()
	p.mustAnnotate("pod", "late", disabled)
	out := late.mustBecome("on TCP", inForce, isOnTCP)
	reason := late.flows()[0].ToServer.Reason
	late.mustProgress()
	late.mustFinish()
	all[0].mustFinish()
	renewed.mustFinish()
	p.figure("opt-in: connections paired %.2f s after kubectl annotate; opt-out: live ones on TCP after %.2f s (%q), no byte lost",
		in.Seconds(), out.Seconds(), reason)
}

// TestNamespace is the namespace's annotation, and the pod's own that wins.
func TestNamespace(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	n := p.nodes[0]
	p.mustAnnotate("namespace", p.namespace, enabled)
	no := client("refuses", n, "")
	no.annotations[annotation] = disabled
	p.mustRun(server("server", n))
	no.args = client("", n, p.address("server")+":8080").args
	all := p.mustTalk(client("inherits", n, p.address("server")+":8080"), no)
	share := all[0].mustBeShortcut()
	all[1].mustBecome("unpaired", settleTime, isUnpaired)
	for _, tr := range all {
		tr.mustFinish()
	}
	p.figure("the namespace's default: %.1f %% by the shortcut; a pod of it with its own %q: none", 100*share, disabled)
}

// TestPolicy creates a NetworkPolicy under a live flow, and deletes it.
func TestPolicy(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
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
		return isOnTCP(f) && strings.Contains(f.ToServer.Detail, p.namespace+"/deny-all")
	}
	off := tr.mustBecome("on TCP because of the policy", inForce, named)
	tr.mustProgress()
	p.mustKubectl("--namespace="+p.namespace, "delete", "networkpolicy", "deny-all")
	on := tr.mustBecome("on the shortcut", settleTime, isShortcut)
	tr.mustBeCounted()
	tr.mustFinish()
	p.figure("NetworkPolicy under a live flow: on TCP and named after %.2f s, back after %.2f s, no byte lost", off.Seconds(), on.Seconds())
}

// TestSameAddress gives a pod the address of one that was killed.
func TestSameAddress(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	n := p.nodes[0]
	p.mustRun(optIn(server("server", n)))
	address := p.address("server")
	tr := p.mustTalk(optIn(client("client", n, address+":8080")))[0]
	tr.mustBeShortcut()
	p.mustKubectl("--namespace="+p.namespace, "delete", "pod", "server", "--grace-period=0", "--force")
	// The bridge's IPAM counts on from the last address that it gave.
	if err := n.script("until ! ls /var/lib/cni/networks/pods/" + address + " 2>/dev/null; do sleep 0.05; done\n" +
		"a=" + address + "; printf %s ${a%.*}.$((${a##*.} - 1)) >/var/lib/cni/networks/pods/last_reserved_ip.0"); err != nil {
		t.Fatal(err)
	}
	p.mustRun(optIn(server("server", n)))
	if got := p.address("server"); got != address {
		t.Fatalf("the second server got %s, want %s", got, address)
	}
	began := time.Now()
	for r := tr.must("get", "report"); r.Open < 4; r = tr.must("get", "report") {
		if time.Since(began) > stepTimeout {
			t.Fatalf("the client is not back: %+v", r)
		}
		time.Sleep(50 * time.Millisecond)
	}
	tr.mustBecome("on the shortcut", settleTime, isShortcut)
	if r := tr.must("get", "report"); r.Failed == 0 {
		t.Error("no connection has failed although its server was killed")
	}
	p.figure("a server killed and made again with its address %s: the client's new connections are on the shortcut", address)
}

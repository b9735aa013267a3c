// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"strings"
	"testing"
)

func (p *proof) service(name, app string, spec object) object {
	spec["selector"] = object{"app": app}
	return object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": p.namespace, "name": name}, "spec": spec}
}

func (p *proof) mustGet(kind, name, path string) string {
	p.Helper()
	return p.mustKubectl("--namespace="+p.namespace, "get", kind, name, "-o=jsonpath={"+path+"}")
}

// TestServices takes every way to a server that a Service has, in both modes of kube-proxy.
func TestServices(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	for _, n := range p.nodes {
		name := "server-" + n.name
		p.mustRun(optIn(server(name, n)))
		ports := []object{{"name": "frames", "port": 80, "targetPort": 8080}}
		p.mustApply(
			p.service(name, name, object{"ports": ports}),
			p.service(name+"-headless", name, object{"ports": ports, "clusterIP": "None"}),
			p.service(name+"-nodeport", name, object{"ports": ports, "type": "NodePort"}))
		pod, service := p.address(name), p.mustGet("service", name, ".spec.clusterIP")
		nodePort := n.address() + ":" + p.mustGet("service", name+"-nodeport", ".spec.ports[0].nodePort")
		var headless string
		if err := p.await("the endpoint of the headless Service", func() error {
			headless = p.mustKubectl("--namespace="+p.namespace, "get", "endpointslices",
				"--selector=kubernetes.io/service-name="+name+"-headless", "-o=jsonpath={.items[0].endpoints[0].addresses[0]}:{.items[0].ports[0].port}")
			if !strings.HasPrefix(headless, pod) {
				return fmt.Errorf("%q", headless)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, tr := range p.mustTalk(
			optIn(client("direct-"+n.name, n, pod+":8080")),
			optIn(client("clusterip-"+n.name, n, service+":80")),
			optIn(client("headless-"+n.name, n, headless)),
			optIn(client("mptcp-"+n.name, n, pod+":8081")),
			optIn(client("database-"+n.name, n, pod+":8082", "-protocol=database", "-size=4096")),
		) {
			share := tr.mustBeShortcut()
			r := tr.mustFinish()
			p.figure("%-16s kube-proxy in %s mode: %.1f %% by the shortcut, %d requests, longest %v",
				tr.client, n.proxyMode, 100*share, r.Requests, r.Longest)
		}
		tr := p.mustTalk(optIn(client("nodeport-"+n.name, n, nodePort)))[0]
		tr.mustBecome("unpaired", settleTime, isUnpaired)
		reason := tr.flows()[0].Reason
		r := tr.mustFinish()
		p.figure("%-16s kube-proxy in %s mode: on TCP (%q), %d requests", tr.client, n.proxyMode, reason, r.Requests)
	}
}

// TestNodes has a Service with a server on each node: only connections that stay on the node are paired.
func TestNodes(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	a, b := p.nodes[0], p.nodes[1]
	p.mustRun(optIn(server("near", a)), optIn(server("far", b)))
	all := p.mustTalk(
		optIn(client("same-node", a, p.address("near")+":8080")),
		optIn(client("other-node", a, p.address("far")+":8080")))
	share := all[0].mustBeShortcut()
	all[1].mustBecome("unpaired", settleTime, isUnpaired)
	reason := all[1].flows()[0].Reason
	far, err := show[[]flow](b, "flows")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range far {
		if f.Paired && f.Server.Pod == (podRef{p.namespace, "far"}) {
			t.Errorf("paired on %s: %v", b.name, f)
		}
	}
	for _, tr := range all {
		tr.mustFinish()
	}
	p.figure("same node: %.1f %% by the shortcut; other node: never paired (%q)", 100*share, reason)
}

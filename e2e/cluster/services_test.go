// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func (p *proof) service(name, app string, spec object) object {
	spec["selector"] = object{"app": app}
	return object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": p.namespace, "name": name}, "spec": spec}
}

func (p *proof) mustGet(kind, name, path string) string {
	p.Helper()
	return p.mustKubectl("--namespace="+p.namespace, "get", kind, name, "-o=jsonpath={"+path+"}")
}

// proveServices takes every way to a server that a Service has, in the node's mode of kube-proxy.
func proveServices(t *testing.T, number int) {
	p := newProof(t)
	n := p.nodes[number-1]
	p.mustRun(optIn(server("server", n)))
	ports := []object{{"name": "frames", "port": 80, "targetPort": 8080}}
	p.mustApply(
		p.service("server", "server", object{"ports": ports}),
		p.service("headless", "server", object{"ports": ports, "clusterIP": "None"}),
		p.service("nodeport", "server", object{"ports": ports, "type": "NodePort"}))
	pod, service := p.address("server"), p.mustGet("service", "server", ".spec.clusterIP")
	nodePort := n.address() + ":" + p.mustGet("service", "nodeport", ".spec.ports[0].nodePort")
	var headless string
	if err := p.await("the endpoint of the headless Service", func() error {
		headless = p.mustKubectl("--namespace="+p.namespace, "get", "endpointslices",
			"--selector=kubernetes.io/service-name=headless", "-o=jsonpath={.items[0].endpoints[0].addresses[0]}:{.items[0].ports[0].port}")
		if !strings.HasPrefix(headless, pod) {
			return fmt.Errorf("%q", headless)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	agent, err := show[status](n, "status")
	if err != nil {
		t.Fatal(err)
	}
	for _, tr := range p.mustTalk(
		optIn(client("direct", n, pod+":8080")),
		optIn(client("clusterip", n, service+":80")),
		optIn(client("headless", n, headless)),
		optIn(client("mptcp", n, pod+":8081")),
		optIn(client("database", n, pod+":8082", "-protocol=database", "-size=4096")),
		optIn(client("nodeport", n, nodePort)), // kube-proxy changes its source address
	) {
		if tr.client == "nodeport" && !agent.NewConnections.Watched {
			tr.mustBecome("unpaired", settleTime, isUnpaired) // at the handshake, only addresses lead to the peer
			tr.mustFinish()
			continue
		}
		share := tr.mustBeShortcut()
		r := tr.mustFinish()
		p.figure("%-9s kube-proxy in %s mode: %.1f %% by the shortcut, %d requests, longest %v",
			tr.client, n.proxyMode, 100*share, r.Requests, r.Longest)
	}
}

// proveNodes has a server on each node: only connections that stay on the node are paired.
func proveNodes(t *testing.T) {
	p := newProof(t)
	a, b := p.nodes[0], p.nodes[1]
	p.mustRun(optIn(server("near", a)), optIn(server("far", b)))
	all := p.mustTalk(
		optIn(client("same-node", a, p.address("near")+":8080")),
		optIn(client("other-node", a, p.address("far")+":8080")))
	share := all[0].mustBeShortcut()
	all[1].mustBecome("unpaired", settleTime, isUnpaired)
	reason := all[1].flows()[0].Message
	far, err := show[flowList](b, "flows")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range far.Items {
		if f.Paired && f.Server.Pod == (podRef{p.namespace, "far"}) {
			t.Errorf("paired on %s: %v", b.name, f)
		}
	}
	for _, tr := range all {
		tr.mustFinish()
	}
	p.figure("same node: %.1f %% by the shortcut; other node: never paired (%q)", 100*share, reason)
}

// proveStatefulSet has a server like a database behind a headless Service.
func proveStatefulSet(t *testing.T) {
	p := newProof(t)
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

// proveSameAddress gives a pod the address of one that was killed. Until the pod has
// it, no other may start: the rest waits for the parallel part.
func proveSameAddress(t *testing.T) {
	p := newProof(t)
	n := p.nodes[0]
	p.mustRun(optIn(server("server", n)))
	address := p.address("server")
	tr := p.mustTalk(optIn(client("client", n, address+":8080")))[0]
	tr.mustBeShortcut()
	p.mustKubectl("--namespace="+p.namespace, "delete", "pod", "server", "--grace-period=0", "--force")
	// The bridge's IPAM counts on from the last address that it gave, and the node
	// would look for the new pod at the old one's MAC address for half a minute.
	if err := n.script("a=" + address + `
until ! ls /var/lib/cni/networks/pods/$a 2>/dev/null; do sleep 0.05; done
printf %s ${a%.*}.$((${a##*.} - 1)) >/var/lib/cni/networks/pods/last_reserved_ip.0
ip neighbour flush to $a`); err != nil {
		t.Fatal(err)
	}
	second := optIn(server("server", n))
	second.namespace = p.namespace
	p.mustApply(second.manifest())
	p.mustKubectl("--namespace="+p.namespace, "wait", "pod/server", "--for=jsonpath={.status.podIP}="+address, fmt.Sprintf("--timeout=%v", stepTimeout))
	t.Parallel()
	p.mustBeReady("pod/server")
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

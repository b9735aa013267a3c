// SPDX-License-Identifier: Apache-2.0

package cluster_test

import "testing"

// provePlain is the cluster by itself: pods that are not opted in, Services, and both modes of kube-proxy.
func provePlain(t *testing.T) {
	p := newProof(t)
	for _, n := range p.nodes {
		name := "server-" + n.name
		p.mustRun(server(name, n))
		p.mustApply(p.service(name, name, object{"ports": []object{{"port": 80, "targetPort": 8080}}}))
	}
	address := func(server string) string { return p.mustGet("service", server, ".spec.clusterIP") + ":80" }
	for _, tr := range p.mustTalk(
		client("iptables", p.nodes[0], address("server-node1")),
		client("nftables", p.nodes[1], address("server-node2")),
		client("across", p.nodes[0], address("server-node2")),
		client("database", p.nodes[1], p.address("server-node2")+":8082", "-protocol=database", "-size=4096"),
	) {
		r := tr.mustFinish()
		p.figure("%-8s %5d requests, %.1f MB, longest %v", tr.client, r.Requests, megabytes(r.Sent+r.Received), r.Longest)
	}
}

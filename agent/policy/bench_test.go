// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// largeCluster has 250 pods in 10 namespaces and 500 policies: in every
// namespace a default deny, and 49 that let 5 pods be reached by 10 others of the
// namespace, by another namespace, by a prefix, or by name, and reach others. A
// pod has labels of its own, as those of a StatefulSet.
func largeCluster(tb testing.TB) (pods []Pod, cluster Cluster) {
	cluster.Namespaces = map[string]map[string]string{}
	for n := range 10 {
		namespace := fmt.Sprint("team", n)
		cluster.Namespaces[namespace] = map[string]string{"kubernetes.io/metadata.name": namespace, "env": fmt.Sprint("env", n%3), "tenant": fmt.Sprint(n % 4)}
		add := func(format string, args ...any) {
			cluster.Policies = append(cluster.Policies, mustPolicy(tb, namespace, fmt.Sprint("policy", len(cluster.Policies)), fmt.Sprintf(format, args...)))
		}
		for i := range 25 {
			pods = append(pods, Pod{
				ID: uint64(len(pods) + 1), Namespace: namespace, Name: fmt.Sprint("pod-", i),
				Labels: map[string]string{
					"app": fmt.Sprint("app", i/5), "tier": fmt.Sprint("tier", i%3), "version": fmt.Sprint("v", i%2),
					"pod-template-hash": "5d89bdfbf9", "statefulset.kubernetes.io/pod-name": fmt.Sprint("pod-", i),
				},
				Ports:    []NamedPort{{"http", 8080}, {"metrics", 9100}},
				Settings: api.Settings{Enabled: true},
			})
		}
		add(`{podSelector: {}, policyTypes: [Ingress, Egress]}`)
		for i := range 49 {
			app, other := fmt.Sprint("app", i%5), fmt.Sprint("app", (i+1+i/5)%5)
			switch i % 7 {
			case 0:
				add(`{podSelector: {matchLabels: {app: %s}}, ingress: [{from: [{podSelector: {matchLabels: {app: %s}}}, {podSelector: {matchLabels: {tier: tier1}}}], ports: [{port: %d}, {port: http}]}]}`, app, other, 1000+i)
			case 1:
				add(`{podSelector: {matchLabels: {app: %s}}, ingress: [{from: [{namespaceSelector: {matchLabels: {tenant: "%d"}}, podSelector: {matchExpressions: [{key: tier, operator: In, values: [tier0, tier2]}]}}], ports: [{port: %d, endPort: %d}]}]}`, app, i%4, 1000+10*i, 1005+10*i)
			case 2:
				add(`{podSelector: {matchLabels: {app: %s}}, ingress: [{from: [{ipBlock: {cidr: 10.244.0.0/18, except: [10.244.3.0/24]}}], ports: [{port: metrics}]}]}`, app)
			case 3:
				add(`{podSelector: {matchExpressions: [{key: version, operator: NotIn, values: [v0]}]}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {env: env%d}}}], ports: [{port: 8080}, {port: 53, protocol: UDP}]}]}`, i%3)
			case 4:
				add(`{podSelector: {matchLabels: {app: %s}}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}, {to: [{namespaceSelector: {}}], ports: [{port: 5432}, {port: 6379}]}]}`, app)
			case 5:
				add(`{podSelector: {matchLabels: {app: %s}}, ingress: [{ports: [{port: 443}]}]}`, app)
			case 6:
				add(`{podSelector: {matchLabels: {app: %s, tier: tier1}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {}}]}], egress: [{}]}`, app)
			}
		}
	}
	return pods, cluster
}

func BenchmarkCompile(b *testing.B) {
	pods, cluster := largeCluster(b)
	for b.Loop() {
		var c Compiler
		changed, _ := c.Update(pods, cluster, time.Unix(1_000_000, 0))
		b.ReportMetric(float64(len(changed)), "flows")
	}
}

// benchmarkUpdate has change make the cluster another one and back.
func benchmarkUpdate(b *testing.B, change func(pods []Pod, cluster *Cluster) []Pod) {
	pods, cluster := largeCluster(b)
	other := Cluster{Namespaces: maps.Clone(cluster.Namespaces), Policies: slices.Clone(cluster.Policies)}
	otherPods := change(slices.Clone(pods), &other)
	now := time.Unix(1_000_000, 0)
	var c Compiler
	c.Update(pods, cluster, now)
	changed := 0
	for i := 0; b.Loop(); i++ {
		var pairs []rule.PairRules
		if i%2 == 0 {
			pairs, _ = c.Update(otherPods, other, now)
		} else {
			pairs, _ = c.Update(pods, cluster, now)
		}
		changed += len(pairs)
	}
	b.ReportMetric(float64(changed)/float64(b.N), "pairs/op")
}

func BenchmarkPodChange(b *testing.B) {
	benchmarkUpdate(b, func(pods []Pod, _ *Cluster) []Pod {
		pods[105].Labels = maps.Clone(pods[105].Labels)
		pods[105].Labels["app"] = "app0"
		return pods
	})
}

func BenchmarkPodComesAndGoes(b *testing.B) {
	benchmarkUpdate(b, func(pods []Pod, _ *Cluster) []Pod { return slices.Delete(pods, 100, 101) })
}

func BenchmarkPolicyChange(b *testing.B) {
	benchmarkUpdate(b, func(pods []Pod, cluster *Cluster) []Pod {
		cluster.Policies[100] = mustPolicy(b, "team2", "policy100", "{podSelector: {matchLabels: {app: app1}}, ingress: [{}]}")
		return pods
	})
}

func BenchmarkNamespaceChange(b *testing.B) {
	benchmarkUpdate(b, func(pods []Pod, cluster *Cluster) []Pod {
		cluster.Namespaces["team2"] = map[string]string{"kubernetes.io/metadata.name": "team2", "env": "env0", "tenant": "0"}
		return pods
	})
}

func BenchmarkNoChange(b *testing.B) {
	benchmarkUpdate(b, func(pods []Pod, _ *Cluster) []Pod { return pods })
}

func BenchmarkExplain(b *testing.B) {
	pods, cluster := largeCluster(b)
	for b.Loop() {
		Explain(pods[10], pods[200], 8080, cluster, time.Unix(1_000_000, 0))
	}
}

// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// manyPods start at once.
const manyPods = 100

// mustTime puts a stopwatch between containerd on the node and the plugin, and
// returns the file that gets a line for each run. The agent sees the plugin
// itself: a mount of the node is not one of its pod.
func (p *proof) mustTime(n *node) (log string) {
	p.Helper()
	dir := filepath.Join(n.directory(), "stopwatch")
	if err := n.script(fmt.Sprintf(`
mkdir %[1]s
cp %[2]s %[1]s/plugin
cat >%[1]s/stopwatch <<'END'
#!/bin/bash
export LC_ALL=C
began=$EPOCHREALTIME
%[1]s/plugin
status=$?
echo "$CNI_COMMAND $((${EPOCHREALTIME/.} - ${began/.}))" >>%[1]s/log
exit $status
END
chmod +x %[1]s/stopwatch
: >%[1]s/log
mount --bind %[1]s/stopwatch %[2]s`, dir, plugin)); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() {
		if err := n.script("umount " + plugin + "; rm -r " + dir); err != nil {
			p.Error(err)
		}
	})
	return filepath.Join("/proc", n.pid(), "root", dir, "log")
}

// mustStartMany starts the pods of a ReplicaSet on the node, and returns how long the plugin has taken for each.
func (p *proof) mustStartMany(name string, n *node, log string) (durations []time.Duration, total time.Duration) {
	p.Helper()
	if err := os.Truncate(log, 0); err != nil {
		p.Fatal(err)
	}
	one := pod{node: n, args: []string{"pause"}}
	spec := one.spec()
	delete(spec["containers"].([]object)[0], "readinessProbe")
	labels := object{"app": name}
	began := time.Now()
	p.mustApply(object{
		"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": object{"namespace": p.namespace, "name": name},
		"spec": object{
			"replicas": manyPods, "selector": object{"matchLabels": labels},
			"template": object{"metadata": object{"labels": labels, "annotations": object{annotation: enabled}}, "spec": spec},
		},
	})
	p.mustKubectl("--namespace="+p.namespace, "wait", "replicaset/"+name, fmt.Sprintf("--for=jsonpath={.status.readyReplicas}=%d", manyPods),
		fmt.Sprintf("--timeout=%v", longTimeout))
	total = time.Since(began)
	content, err := os.ReadFile(log)
	if err != nil {
		p.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		command, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		microseconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			p.Fatalf("stopwatch: %q", line)
		}
		if command == "ADD" {
			durations = append(durations, time.Duration(microseconds)*time.Microsecond)
		}
	}
	if len(durations) < manyPods {
		p.Fatalf("the plugin was run %d times for %d pods", len(durations), manyPods)
	}
	slices.Sort(durations)
	p.mustKubectl("--namespace="+p.namespace, "delete", "replicaset", name, "--cascade=foreground", fmt.Sprintf("--timeout=%v", longTimeout))
	return durations, total
}

// quantile returns the value that a share of sorted values does not exceed.
func quantile(sorted []time.Duration, share float64) time.Duration {
	return sorted[min(len(sorted)-1, int(share*float64(len(sorted))))].Round(100 * time.Microsecond)
}

// TestManyPods starts many pods at once, with the agent and without it.
func TestManyPods(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	n := p.nodes[1]
	log := p.mustTime(n)
	check := func(name, agent string, limit time.Duration) {
		durations, total := p.mustStartMany(name, n, log)
		p.figure("%d pods at once in %.1f s, agent %s: the plugin takes p50 %v, p99 %v, at most %v",
			manyPods, total.Seconds(), agent, quantile(durations, 0.5), quantile(durations, 0.99), durations[len(durations)-1].Round(100*time.Microsecond))
		if got := quantile(durations, 0.99); got > limit {
			t.Errorf("agent %s: p99 of the plugin is %v, want at most %v", agent, got, limit)
		}
	}
	check("up", "up", 50*time.Millisecond)
	p.mustKubectl("--namespace="+release, "patch", daemonSet, `--patch={"spec": {"template": {"spec": {"nodeSelector": {"nowhere": "true"}}}}}`)
	p.mustKubectl("--namespace="+release, "wait", "pods", "--all", "--for=delete", fmt.Sprintf("--timeout=%v", stepTimeout))
	check("down", "down", 250*time.Millisecond)
	p.mustKubectl("--namespace="+release, "rollout", "undo", daemonSet)
	p.mustRollOut()
}

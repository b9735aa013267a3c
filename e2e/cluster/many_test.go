// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// manyPods start at once.
const manyPods = 100

// runs are those of one program for the pods of a ReplicaSet, sorted.
type runs struct{ wall, cpu []time.Duration }

func (r runs) String() string {
	quantiles := func(sorted []time.Duration) string {
		at := func(share float64) time.Duration {
			return sorted[min(len(sorted)-1, int(share*float64(len(sorted))))].Round(time.Millisecond)
		}
		return fmt.Sprintf("p50 %v, p99 %v", at(0.5), at(0.99))
	}
	return fmt.Sprintf("%s (of the processor: %s)", quantiles(r.wall), quantiles(r.cpu))
}

// mustTime puts a stopwatch between containerd on the node and the plugin, and
// returns the file that gets a line for each run. It times a program that does
// nothing as well: a machine that starts so many pods is busy, and every process
// waits for its turn. The agent sees the plugin itself, because a mount of the
// node is not one of its pod.
func (p *proof) mustTime(n *node) (log string) {
	p.Helper()
	dir := filepath.Join(n.directory(), "stopwatch")
	if err := n.script(fmt.Sprintf(`
mkdir %[1]s
cp %[2]s %[1]s/plugin
cat >%[1]s/stopwatch <<'END'
#!/bin/bash
export LC_ALL=C
TIMEFORMAT="nothing %%R %%U %%S"
{ time /bin/true; } 2>>%[1]s/log
TIMEFORMAT="$CNI_COMMAND %%R %%U %%S"
{ time %[1]s/plugin 2>&3; } 3>&2 2>>%[1]s/log
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

// mustStartMany starts the pods of a ReplicaSet on the node, and returns how
// long the plugin has taken for each of them, a program that does nothing, and
// all pods together.
func (p *proof) mustStartMany(name string, n *node, log string) (plugin, nothing runs, total time.Duration) {
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
		var command string
		var wall, user, system float64
		if _, err := fmt.Sscan(line, &command, &wall, &user, &system); err != nil {
			p.Fatalf("stopwatch: %q: %v", line, err)
		}
		of := map[string]*runs{"ADD": &plugin, "nothing": &nothing}[command]
		if of != nil {
			of.wall = append(of.wall, time.Duration(wall*1e9))
			of.cpu = append(of.cpu, time.Duration((user+system)*1e9))
		}
	}
	if len(plugin.wall) < manyPods {
		p.Fatalf("the plugin was run %d times for %d pods", len(plugin.wall), manyPods)
	}
	for _, durations := range [][]time.Duration{plugin.wall, plugin.cpu, nothing.wall, nothing.cpu} {
		slices.Sort(durations)
	}
	p.mustKubectl("--namespace="+p.namespace, "delete", "replicaset", name, "--cascade=foreground", fmt.Sprintf("--timeout=%v", longTimeout))
	return plugin, nothing, total
}

// TestManyPods starts many pods at once, with the agent and without it. How long
// that takes is measured, and depends on the machine; that all of them start is
// what has to hold.
func TestManyPods(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	n := p.nodes[1]
	log := p.mustTime(n)
	start := func(agent string) {
		plugin, nothing, total := p.mustStartMany(agent, n, log)
		p.figure("%d pods at once in %.1f s, agent %s: the plugin takes %v, a program that does nothing %v",
			manyPods, total.Seconds(), agent, plugin, nothing)
	}
	start("up")
	p.mustKubectl("--namespace="+release, "patch", daemonSet, `--patch={"spec": {"template": {"spec": {"nodeSelector": {"nowhere": "true"}}}}}`)
	p.mustKubectl("--namespace="+release, "wait", "pods", "--all", "--for=delete", fmt.Sprintf("--timeout=%v", stepTimeout))
	start("down")
	p.mustKubectl("--namespace="+release, "rollout", "undo", daemonSet)
	p.mustRollOut()
}

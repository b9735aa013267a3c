// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"fmt"
	"math"
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

// runs are those of one program on a node, sorted.
type runs struct{ wall, cpu []time.Duration }

func (r runs) String() string {
	quantiles := func(sorted []time.Duration) string {
		at := func(share float64) time.Duration { // by nearest rank
			return sorted[int(math.Ceil(share*float64(len(sorted))))-1].Round(time.Millisecond)
		}
		return fmt.Sprintf("p50 %v, p99 %v", at(0.5), at(0.99))
	}
	return fmt.Sprintf("%s (of the processor: %s)", quantiles(r.wall), quantiles(r.cpu))
}

// mustTime puts a stopwatch between containerd on the node and the plugin, and
// returns the file that gets a line for each run, until the end of the test. It times a
// program that does nothing as well: a machine that starts so many pods is busy,
// and every process waits for its turn. An agent that was started before sees the
// plugin itself, because a mount of the node is not one of its pod. A later one would
// find that the plugin cannot be replaced.
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
		// containerd may be running it at this moment, as for the DEL of an earlier test's pod.
		if err := n.script("umount --lazy " + plugin); err != nil {
			p.Error(err)
		}
	})
	return filepath.Join("/proc", n.pid(), "root", dir, "log")
}

// mustReadTimes returns how long the plugin has taken for each of the pods, and a
// program that does nothing.
func (p *proof) mustReadTimes(log string, pods int) (plugin, nothing runs) {
	p.Helper()
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
	if len(plugin.wall) < pods {
		p.Fatalf("the plugin was run %d times for %d pods", len(plugin.wall), pods)
	}
	for _, durations := range [][]time.Duration{plugin.wall, plugin.cpu, nothing.wall, nothing.cpu} {
		slices.Sort(durations)
	}
	return plugin, nothing
}

// TestManyPods starts many pods at once, half of them on a node with the agent and
// half on one without it. How long that takes is measured, and depends on the
// machine; that all of them start is what has to hold.
func TestManyPods(t *testing.T) {
	p := newProof(t)
	p.mustInstall()
	selectNodes := func(selector string) {
		p.mustKubectl("--namespace="+release, "patch", daemonSet,
			fmt.Sprintf(`--patch={"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": %s}}}}}`, selector))
		p.mustRollOut()
	}
	// The next test has all agents, and none of these pods.
	t.Cleanup(func() {
		p.mustKubectl("--namespace="+p.namespace, "delete", "replicasets", "--all", "--cascade=foreground")
		selectNodes("null")
	})
	selectNodes(strconv.Quote(p.nodes[0].name))
	p.mustKubectl("--namespace="+release, "wait", "pods", "--field-selector=spec.nodeName="+p.nodes[1].name, "--for=delete",
		fmt.Sprintf("--timeout=%v", stepTimeout))
	var logs []string
	var sets []object
	for _, n := range p.nodes {
		logs = append(logs, p.mustTime(n))
		spec := pod{node: n, args: []string{"pause"}}.spec()
		delete(spec["containers"].([]object)[0], "readinessProbe")
		labels := object{"app": n.name}
		sets = append(sets, object{
			"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": object{"namespace": p.namespace, "name": n.name},
			"spec": object{
				"replicas": manyPods / len(p.nodes), "selector": object{"matchLabels": labels},
				"template": object{"metadata": object{"labels": labels, "annotations": object{annotation: enabled}}, "spec": spec},
			},
		})
	}
	began := time.Now()
	p.mustApply(sets...)
	p.mustKubectl("--namespace="+p.namespace, "wait", "replicasets", "--all",
		fmt.Sprintf("--for=jsonpath={.status.readyReplicas}=%d", manyPods/len(p.nodes)), fmt.Sprintf("--timeout=%v", longTimeout))
	p.figure("%d pods at once on %d nodes in %.1f s", manyPods, len(p.nodes), time.Since(began).Seconds())
	for i, agent := range []string{"up", "down"} {
		plugin, nothing := p.mustReadTimes(logs[i], manyPods/len(p.nodes))
		p.figure("agent %s: the plugin takes %v, a program that does nothing %v", agent, plugin, nothing)
	}
}

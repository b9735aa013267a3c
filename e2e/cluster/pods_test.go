// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// pod is a pod of the suite's own image.
type pod struct {
	namespace, name string
	node            *node
	args            []string // of peer
	labels          map[string]string
	annotations     map[string]string
	hostNetwork     bool
}

func (p pod) manifest() object {
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"namespace": p.namespace, "name": p.name, "labels": p.labels, "annotations": p.annotations},
		"spec":     p.spec(),
	}
}

func (p pod) spec() object {
	spec := object{
		"terminationGracePeriodSeconds": 1,
		"automountServiceAccountToken":  false,
		"hostNetwork":                   p.hostNetwork,
		"containers": []object{{
			"name": "peer", "image": peerImage, "imagePullPolicy": "Never", "args": p.args,
			// The report is asked from the node, whose own connections are none of podshunt's business.
			"readinessProbe": object{"httpGet": object{"path": "/report", "port": 9090}, "periodSeconds": 1},
		}},
	}
	if p.node != nil {
		spec["nodeName"] = p.node.name
	}
	return spec
}

// proof is a test on the cluster: a namespace of its own, and traffic in it.
type proof struct {
	testing.TB
	*cluster
	namespace string
}

// newProof makes the namespace. At the end of the test the namespace goes, and a
// failed test tells what the cluster looked like.
func newProof(t *testing.T) *proof {
	t.Helper()
	p := &proof{TB: t, cluster: suite, namespace: strings.ToLower(strings.NewReplacer("Test", "", "/", "-", "_", "-").Replace(t.Name()))}
	p.mustKubectl("create", "namespace", p.namespace)
	// Pods need it; its controller may not yet be back after the API server.
	p.mustKubectl("--namespace="+p.namespace, "wait", "serviceaccount/default", "--for=create", fmt.Sprintf("--timeout=%v", stepTimeout))
	t.Cleanup(func() {
		if t.Failed() {
			p.dump(t.Output())
		}
		if _, err := p.kubectl("delete", "namespace", p.namespace, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	return p
}

// figure keeps a result for the end of the suite.
func (p *proof) figure(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	p.Log(text)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.figures = append(p.figures, fmt.Sprintf("%-16s %s", p.namespace, text))
}

func (p *proof) mustKubectl(args ...string) string {
	p.Helper()
	out, err := p.kubectl(args...)
	if err != nil {
		p.Fatal(err)
	}
	return out
}

// mustApply makes objects.
func (p *proof) mustApply(objects ...object) {
	p.Helper()
	text, err := json.Marshal(object{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		p.Fatal(err)
	}
	if _, err := p.control().output(stepTimeout, strings.NewReader(string(text)), "kubectl", "apply", "-f", "-"); err != nil {
		p.Fatal(err)
	}
}

// mustRun makes pods in the proof's namespace and returns when they are ready.
func (p *proof) mustRun(pods ...pod) {
	p.Helper()
	var objects []object
	var names []string
	for _, one := range pods {
		one.namespace = p.namespace
		objects = append(objects, one.manifest())
		names = append(names, "pod/"+one.name)
	}
	p.mustApply(objects...)
	p.mustBeReady(names...)
}

func (p *proof) mustBeReady(names ...string) {
	p.Helper()
	p.mustKubectl(append([]string{"-n", p.namespace, "wait", "--for=condition=Ready", fmt.Sprintf("--timeout=%v", stepTimeout)}, names...)...)
}

// address returns a pod's address.
func (p *proof) address(name string) string {
	p.Helper()
	return p.mustKubectl("-n", p.namespace, "get", "pod", name, "-o=jsonpath={.status.podIP}")
}

// server is a pod that serves frames at 8080, the same on an MPTCP listener at
// 8081, and keys and values at 8082.
func server(name string, on *node) pod {
	return pod{name: name, node: on, args: []string{"server"}, labels: map[string]string{"app": name}, annotations: map[string]string{}}
}

// client is a pod that talks to target all the time.
func client(name string, on *node, target string, flags ...string) pod {
	return pod{
		name: name, node: on, args: append([]string{"client", "-target=" + target}, flags...),
		labels: map[string]string{"app": name}, annotations: map[string]string{},
	}
}

// report is peer's Report.
type report struct {
	Connections, Open        int
	Requests, Sent, Received int64
	Longest                  time.Duration
	Failed                   int
	Errors                   []string
}

// ask calls a pod's peer from its node: the API server may be down.
func (n *node) ask(method, address, path string) (report, error) {
	var r report
	out, err := n.output(stepTimeout, nil, "peer", method, "http://"+address+":9090/"+path)
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	return r, err
}

// traffic is a client at work.
type traffic struct {
	*proof
	client  string
	node    *node
	address string
}

// mustTalk makes client pods and waits until they talk.
func (p *proof) mustTalk(clients ...pod) []*traffic {
	p.Helper()
	p.mustRun(clients...)
	args := []string{"--namespace=" + p.namespace, "get", "pods", "-o=jsonpath={.items[*].status.podIP}{.status.podIP}"}
	for _, one := range clients {
		args = append(args, one.name)
	}
	addresses := strings.Fields(p.mustKubectl(args...)) // of a list, or of the only one
	var all []*traffic
	for i, one := range clients {
		t := &traffic{proof: p, client: one.name, node: one.node, address: addresses[i]}
		t.mustProgress()
		all = append(all, t)
	}
	return all
}

func (t *traffic) must(method, path string) report {
	t.Helper()
	r, err := t.node.ask(method, t.address, path)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// mustProgress returns when every connection can have had an answer since the
// call. No connection has failed.
func (t *traffic) mustProgress() report {
	t.Helper()
	first := t.must("get", "report")
	for deadline := time.Now().Add(stepTimeout); ; time.Sleep(100 * time.Millisecond) {
		r := t.must("get", "report")
		t.mustBeWhole(r)
		if r.Requests >= first.Requests+20 {
			return r
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %d requests answered, none for %v", t.client, r.Requests, stepTimeout)
		}
	}
}

// mustFinish ends the traffic in good order: every request is answered to the byte.
func (t *traffic) mustFinish() report {
	t.Helper()
	r := t.must("post", "finish")
	t.mustBeWhole(r)
	if r.Open != 0 || r.Requests == 0 {
		t.Errorf("%s: %d connections open and %d requests answered at the end", t.client, r.Open, r.Requests)
	}
	return r
}

func (t *traffic) mustBeWhole(r report) {
	t.Helper()
	if r.Failed != 0 {
		t.Fatalf("%s: %d connections failed:\n%s", t.client, r.Failed, strings.Join(r.Errors, "\n"))
	}
}

func megabytes(n int64) float64 { return float64(n) / 1e6 }

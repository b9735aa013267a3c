// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/klog/v2"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/api"
)

func mustSource(t testing.TB, client *fake.Clientset, refusal string) *Source {
	t.Helper()
	s, err := newSource(Config{NodeName: "node", Refusal: refusal, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}, client, client)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs the source until the test ends.
func (s *Source) start(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not return")
		}
	})
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// changedUntil asks for the content only when Changed receives, until ok is true of the error.
func (s *Source) changedUntil(t testing.TB, what string, ok func(error) bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		select {
		case <-s.Changed():
		case <-deadline:
			t.Fatalf("%s: Changed does not tell of it", what)
		}
		if _, err := s.Content(); ok(err) {
			return
		}
	}
}

// mustContent waits for a content that is ready and up to date.
func (s *Source) mustContent(t testing.TB, what string, ok func(*pods.Content) bool) *pods.Content {
	t.Helper()
	var content *pods.Content
	waitFor(t, what, func() bool {
		var err error
		content, err = s.Content()
		return err == nil && content != nil && ok(content)
	})
	return content
}

func namespace(name string, annotations map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"name": name}, Annotations: annotations}}
}

func networkPolicy(name string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}}
}

func TestContent(t *testing.T) {
	client := fake.NewClientset(newPod("web", nil), newPod("other", func(p *corev1.Pod) { p.Annotations = nil }),
		namespace("shop", nil), networkPolicy("b"), networkPolicy("a"))
	s := mustSource(t, client, "")
	if content, err := s.Content(); content != nil || err != nil {
		t.Errorf("got %+v and error %v before Run, want nothing", content, err)
	}
	s.start(t)
	first := s.mustContent(t, "first content", func(*pods.Content) bool { return true })
	enabled := func(c *pods.Content, pod string) bool { return c.Pods[pod].Settings.Enabled }
	if len(first.Pods) != 2 || !enabled(first, "shop/web") || enabled(first, "shop/other") {
		t.Errorf("got pods %+v, want web opted in", first.Pods)
	}
	if diff := cmp.Diff(map[string]map[string]string{"shop": {"name": "shop"}}, first.Cluster.Namespaces); diff != "" {
		t.Errorf("namespaces (-want +got)\n%s", diff)
	}
	if p := first.Cluster.Policies; len(p) != 2 || p[0].Name != "a" || p[1].Name != "b" {
		t.Errorf("got policies %v, want a and b", p)
	}
	if again, _ := s.Content(); again != first {
		t.Error("got another content without a change")
	}

	// What has not changed keeps its pointer, and the old content stays as it was.
	ctx := t.Context()
	if _, err := client.CoreV1().Namespaces().Update(ctx, namespace("shop", map[string]string{api.AnnotationShortcut: "enabled"}), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	second := s.mustContent(t, "default of the namespace", func(c *pods.Content) bool { return enabled(c, "shop/other") })
	if enabled(first, "shop/other") {
		t.Error("the first content has changed")
	}
	if err := client.NetworkingV1().NetworkPolicies("shop").Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	third := s.mustContent(t, "policy deleted", func(c *pods.Content) bool { return len(c.Cluster.Policies) == 1 })
	if second.Cluster.Policies[1] != third.Cluster.Policies[0] {
		t.Error("a policy that has not changed has another pointer")
	}
	if err := client.CoreV1().Pods("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.mustContent(t, "pod deleted", func(c *pods.Content) bool { return len(c.Pods) == 1 })

	// Nothing else is asked, and of pods only those of the node.
	for _, a := range client.Actions() {
		var restrictions string
		switch a := a.(type) {
		case clienttesting.ListAction:
			restrictions = a.GetListRestrictions().Fields.String()
		case clienttesting.WatchAction:
			restrictions = a.GetWatchRestrictions().Fields.String()
		default:
			continue // a change by this test
		}
		want := map[string]string{"pods": "spec.nodeName=node", "namespaces": "", "networkpolicies": ""}
		if fields, ok := want[a.GetResource().Resource]; !ok || fields != restrictions {
			t.Errorf("%s %s with field selector %q", a.GetVerb(), a.GetResource().Resource, restrictions)
		}
	}
}

// A selector that selects nothing is told once, and again when that begins anew.
func TestDefaultNamespacesOfNone(t *testing.T) {
	client := fake.NewClientset(namespace("shop", nil))
	s := mustSource(t, client, "")
	var log bytes.Buffer
	s.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	if err := s.cfg.DefaultNamespaces.Set("name=stop"); err != nil {
		t.Fatal(err)
	}
	s.start(t)
	namespaces := func(n int) func(*pods.Content) bool {
		return func(c *pods.Content) bool { return c != nil && len(c.Cluster.Namespaces) == n }
	}
	warnings := func() int { return strings.Count(log.String(), "name=stop") }
	s.mustContent(t, "the namespace", namespaces(1))
	if got := warnings(); got != 1 {
		t.Errorf("with another namespace: got %d warnings, want 1", got)
	}
	api := client.CoreV1().Namespaces()
	for _, step := range []struct {
		change           string
		namespaces, want int
	}{{"made", 2, 1}, {"deleted", 1, 2}} {
		var err error
		if step.change == "made" {
			_, err = api.Create(t.Context(), namespace("stop", nil), metav1.CreateOptions{})
		} else {
			err = api.Delete(t.Context(), "stop", metav1.DeleteOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		s.mustContent(t, "the namespace that is "+step.change, namespaces(step.namespaces))
		if got := warnings(); got != step.want {
			t.Errorf("%s: got %d warnings, want %d", step.change, got, step.want)
		}
	}
}

func TestChanged(t *testing.T) {
	client := fake.NewClientset()
	s := mustSource(t, client, "")
	s.start(t)
	received := func(what string) {
		t.Helper()
		select {
		case <-s.Changed():
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: Changed does not receive", what)
		}
	}
	received("empty cluster")
	s.mustContent(t, "empty cluster", func(c *pods.Content) bool { return len(c.Pods) == 0 })
	if _, err := client.CoreV1().Pods("shop").Create(t.Context(), newPod("web", nil), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	received("pod")
	s.mustContent(t, "pod", func(c *pods.Content) bool { return len(c.Pods) == 1 })
}

// events returns "kind/name reason message" of the Events that were sent.
func events(client *fake.Clientset) []string {
	var sent []string
	for _, a := range client.Actions() {
		if a, ok := a.(clienttesting.CreateAction); ok && a.GetResource().Resource == "events" {
			e := a.GetObject().(*corev1.Event)
			sent = append(sent, fmt.Sprintf("%s/%s %s %s %s: %s", e.InvolvedObject.Kind, e.InvolvedObject.Name,
				e.InvolvedObject.UID, e.Type, e.Reason, e.Message))
		}
	}
	slices.Sort(sent)
	return sent
}

func TestReport(t *testing.T) {
	client := fake.NewClientset(newPod("web", func(p *corev1.Pod) { p.UID = "uid-web" }), newPod("bad", func(p *corev1.Pod) { p.UID = "uid-bad" }))
	s := mustSource(t, client, "hazard")
	s.start(t)
	s.mustContent(t, "content", func(c *pods.Content) bool { return len(c.Pods) == 2 })
	pod := func(name string, state api.PodState, reason api.PodReason, message string) pods.Pod {
		return pods.Pod{PodStatus: api.PodStatus{
			Pod: api.PodRef{Namespace: "shop", Name: name, UID: "of the runtime"}, State: state, Reason: reason, Message: message,
		}}
	}
	all := []pods.Pod{
		pod("bad", api.PodRefused, api.PodInvalidAnnotation, "bad annotation"), pod("web", api.PodOut, api.PodNotOptedIn, "not opted in"),
		pod("gone", api.PodRefused, api.PodEnrolFailed, "map full"),
	}
	s.Report(all)
	s.Report(all)
	want := []string{
		"Node/node node Warning KernelRefused: no pod takes part: hazard",
		"Pod/bad uid-bad Warning InvalidAnnotation: stays on TCP: bad annotation",
	}
	waitFor(t, "events", func() bool { return len(events(client)) >= len(want) })
	all[0], all[1] = pod("bad", api.PodEnrolled, "", ""), pod("web", api.PodRefused, api.PodHostNetwork, "hostNetwork")
	s.Report(all)
	want = append(want, "Pod/web uid-web Warning HostNetwork: stays on TCP: hostNetwork: run it without hostNetwork, or annotate it with podshunt.io/shortcut=disabled")
	waitFor(t, "events", func() bool { return len(events(client)) >= len(want) })
	if diff := cmp.Diff(want, events(client)); diff != "" {
		t.Errorf("events (-want +got)\n%s", diff)
	}
}

func TestOpen(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	dir := t.TempDir()
	good := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(good, []byte(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
`), 0o600); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	for _, tc := range []struct{ name, kubeconfig, want string }{
		{"outside of a cluster", "", "outside of a cluster's pod --kubeconfig is required"},
		{"no file", filepath.Join(dir, "none"), "read kubeconfig " + filepath.Join(dir, "none")},
		{"good", good, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Open(Config{Kubeconfig: tc.kubeconfig, NodeName: "n", Log: slog.New(slog.NewTextHandler(&log, nil))})
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want %q", err, tc.want)
			}
		})
	}
	klog.InfoS("a message of client-go", "key", "value")
	if want := `msg="a message of client-go" key=value`; !strings.Contains(log.String(), want) {
		t.Errorf("got log %q, want it to contain %q", log.String(), want)
	}
}

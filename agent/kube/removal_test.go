// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"log/slog"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/podshunt/podshunt/agent/pods"
)

// TestRemoved: what the API server and the watches say of the DaemonSet when the agent's pod is
// deleted.
func TestRemoved(t *testing.T) {
	now := metav1.Now()
	set := func() *appsv1.DaemonSet {
		return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "shunt", Name: "agents", UID: "1"}}
	}
	deleted := set()
	deleted.DeletionTimestamp = &now
	terminating := namespace("shunt", nil)
	terminating.DeletionTimestamp = &now
	sets, namespaces := appsv1.SchemeGroupVersion.WithResource("daemonsets"), corev1.SchemeGroupVersion.WithResource("namespaces")
	refuse := func(err error) func(testing.TB, *fake.Clientset) {
		return func(_ testing.TB, client *fake.Clientset) {
			client.PrependReactor("list", "daemonsets", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, err })
		}
	}
	forbidden := refuse(apierrors.NewForbidden(schema.GroupResource{Resource: "daemonsets"}, "agents", nil))
	unauthorized := refuse(apierrors.NewUnauthorized("the account is deleted"))
	apply := func(change func(clienttesting.ObjectTracker) error) func(testing.TB, *fake.Clientset) {
		return func(t testing.TB, client *fake.Clientset) {
			if err := change(client.Tracker()); err != nil {
				t.Fatal(err)
			}
		}
	}
	gone := apply(func(o clienttesting.ObjectTracker) error { return o.Delete(sets, "shunt", "agents") })
	for _, tc := range []struct {
		name string
		// first are what the agent finds at its start, besides its pod and the namespace.
		first []runtime.Object
		kind  string // of the pod's owner, DaemonSet by default
		do    []func(testing.TB, *fake.Clientset)
		want  bool
		fails bool
	}{
		{name: "replaced", first: []runtime.Object{set()}},
		{name: "gone", first: []runtime.Object{set()}, do: []func(testing.TB, *fake.Clientset){gone}, want: true},
		{name: "gone before the agent has started", want: true},
		{
			name: "being deleted", first: []runtime.Object{set()}, want: true,
			do: []func(testing.TB, *fake.Clientset){apply(func(o clienttesting.ObjectTracker) error { return o.Update(sets, deleted, "shunt") })},
		},
		{
			name: "its namespace is being deleted", first: []runtime.Object{set()}, want: true,
			do: []func(testing.TB, *fake.Clientset){apply(func(o clienttesting.ObjectTracker) error { return o.Update(namespaces, terminating, "") })},
		},
		{
			name: "deleted and made again", first: []runtime.Object{set()},
			do: []func(testing.TB, *fake.Clientset){gone, apply(func(o clienttesting.ObjectTracker) error { return o.Create(sets, set(), "shunt") })},
		},
		{name: "forbidden", first: []runtime.Object{set()}, do: []func(testing.TB, *fake.Clientset){forbidden}, fails: true},
		{name: "not let in", first: []runtime.Object{set()}, do: []func(testing.TB, *fake.Clientset){unauthorized}, fails: true},
		{name: "forbidden, and gone", first: []runtime.Object{set()}, do: []func(testing.TB, *fake.Clientset){forbidden, gone}, want: true},
		{name: "not let in, and gone", first: []runtime.Object{set()}, do: []func(testing.TB, *fake.Clientset){unauthorized, gone}, want: true},
		{name: "of a Job", kind: "Job"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			agent := newPod("agent", func(p *corev1.Pod) {
				p.Namespace = "shunt"
				p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "DaemonSet", Name: "agents", Controller: new(bool)}}
				*p.OwnerReferences[0].Controller = true
				if tc.kind != "" {
					p.OwnerReferences[0].Kind = tc.kind
				}
			})
			client := fake.NewClientset(append(tc.first, agent, namespace("shunt", nil))...)
			s, err := newSource(Config{NodeName: "node", OwnPod: "shunt/agent", Log: slog.New(slog.NewTextHandler(t.Output(), nil))}, client, client)
			if err != nil {
				t.Fatal(err)
			}
			s.start(t)
			if tc.kind == "" {
				waitFor(t, "the watch of the DaemonSet", func() bool { d := s.daemonSet.Load(); return d != nil && d.informer.HasSynced() })
			} else {
				s.mustContent(t, "content", func(*pods.Content) bool { return true })
			}
			for _, do := range tc.do {
				do(t, client)
			}
			ctx, cancel := context.WithTimeout(t.Context(), removedAfter(tc.fails))
			defer cancel()
			got, err := s.Removed(ctx)
			if got != tc.want || (err != nil) != tc.fails {
				t.Errorf("got %v and error %v, want %v and an error: %v", got, err, tc.want, tc.fails)
			}
		})
	}
}

// removedAfter is how long Removed may ask: briefly where no answer comes.
func removedAfter(none bool) time.Duration {
	if none {
		return time.Second
	}
	return time.Minute
}

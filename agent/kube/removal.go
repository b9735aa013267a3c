// SPDX-License-Identifier: Apache-2.0

// Whether podshunt is being removed from the cluster: what becomes of the agent's DaemonSet.

package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// askAgain is the time between two tries to learn what has become of the DaemonSet.
const askAgain = 200 * time.Millisecond

// daemonSet is the DaemonSet that the agent's own pod belongs to, as a watch shows it. It is
// watched from the start on: whoever deletes it mostly deletes at the same time what lets
// this agent ask for it, and a watch that is open goes on.
type daemonSet struct {
	namespace, name string
	informer        cache.SharedIndexInformer
}

// followDaemonSet finds the DaemonSet by the agent's own pod, and watches it until ctx ends.
func (s *Source) followDaemonSet(ctx context.Context) {
	if s.cfg.OwnPod == "" || !cache.WaitForCacheSync(ctx.Done(), s.synced[podKind]) {
		return
	}
	pod, ok := object[*corev1.Pod](s, podKind, s.cfg.OwnPod)
	if !ok || !slices.ContainsFunc(pod.OwnerReferences, isDaemonSet) {
		s.cfg.Log.Warn("the agent's pod belongs to no DaemonSet: it uninstalls nothing when it is deleted", "pod", s.cfg.OwnPod)
		return
	}
	d := &daemonSet{namespace: pod.Namespace, name: pod.OwnerReferences[slices.IndexFunc(pod.OwnerReferences, isDaemonSet)].Name}
	sets, named := s.client.AppsV1().DaemonSets(d.namespace), fields.OneTermEqualSelector("metadata.name", d.name).String()
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = named
			return sets.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = named
			return sets.Watch(ctx, o)
		},
	}
	d.informer = cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, s.client), &appsv1.DaemonSet{}, 0, cache.Indexers{})
	s.daemonSet.Store(d)
	d.informer.RunWithContext(ctx)
}

// Removed reports whether the agent's DaemonSet, or the namespace that it is in, is being
// deleted or is gone. Call it when the agent's pod is being deleted, while Run runs. It asks
// the API server, as the watches may be behind. An API server that refuses this agent (401,
// 403) has not said that anything is deleted: then, as with one that cannot be reached, it
// asks again, until the watches say so or ctx ends.
func (s *Source) Removed(ctx context.Context) (bool, error) {
	d := s.daemonSet.Load()
	if d == nil {
		return false, nil
	}
	for {
		removed, err := s.askRemoval(ctx, d)
		if err == nil {
			return removed, nil
		}
		if s.watchedRemoval(d) {
			return true, nil
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("ask for DaemonSet %s/%s: %w", d.namespace, d.name, err)
		case <-time.After(askAgain):
		}
	}
}

// watchedRemoval is what the watches say.
func (s *Source) watchedRemoval(d *daemonSet) bool {
	if d.informer.HasSynced() {
		found, _, _ := d.informer.GetIndexer().GetByKey(d.namespace + "/" + d.name) // no error of an informer's cache
		if set, ok := found.(*appsv1.DaemonSet); !ok || set.DeletionTimestamp != nil {
			return true
		}
	}
	namespace, ok := object[*corev1.Namespace](s, namespaceKind, d.namespace)
	return ok && namespace.DeletionTimestamp != nil
}

// askRemoval is what the API server says now. A pod of a namespace that is being deleted may
// go before its DaemonSet.
func (s *Source) askRemoval(ctx context.Context, d *daemonSet) (bool, error) {
	named := func(name string) metav1.ListOptions {
		return metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()}
	}
	sets, err := s.client.AppsV1().DaemonSets(d.namespace).List(ctx, named(d.name))
	if err != nil {
		return false, err
	}
	if !slices.ContainsFunc(sets.Items, func(set appsv1.DaemonSet) bool { return set.DeletionTimestamp == nil }) {
		return true, nil
	}
	namespaces, err := s.client.CoreV1().Namespaces().List(ctx, named(d.namespace))
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(namespaces.Items, func(n corev1.Namespace) bool { return n.DeletionTimestamp == nil }), nil
}

func isDaemonSet(owner metav1.OwnerReference) bool {
	return strings.HasPrefix(owner.APIVersion, "apps/") && owner.Kind == "DaemonSet" && owner.Controller != nil && *owner.Controller
}

// SPDX-License-Identifier: Apache-2.0

// Package kube knows what the API server says of this node: its pods, the
// namespaces and NetworkPolicies that they are judged by, and the agent's own
// DaemonSet. It lists and watches nothing else, so that its load on the API server
// does not grow with the cluster's pods or Services. While the API server is away,
// what was last known stays. It also tells users by Events where something keeps a
// pod on TCP. It is the only importer of client-go.
package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/podshunt/podshunt/agent/pods"
)

// Config configures a Source; all fields but Kubeconfig, Refusal and OwnPod are required.
type Config struct {
	// Kubeconfig is the path of a kubeconfig file; empty means the service account
	// of the agent's pod.
	Kubeconfig string
	// NodeName is the name of this node's Node object.
	NodeName string
	// SandboxedRuntimeClasses are patterns, as path.Match takes them, for the
	// names of runtime classes whose pods have a kernel of their own.
	SandboxedRuntimeClasses []string
	// DefaultNamespaces selects, by their labels, the namespaces whose pods are
	// opted in unless they, or the namespace, say otherwise.
	DefaultNamespaces Selector
	// Refusal says why no pod may take part, and becomes an Event on the node;
	// empty if pods may.
	Refusal string
	// OwnPod is the agent's own pod, as namespace/name, whose DaemonSet is watched; empty: none
	// is.
	OwnPod string
	// UserAgent names the agent to the API server.
	UserAgent string
	Log       *slog.Logger
}

// Source is a pods.Source that asks the API server. It is safe for concurrent use.
type Source struct {
	cfg         Config
	client      kubernetes.Interface
	informers   [kinds]cache.SharedIndexInformer
	synced      [kinds]cache.InformerSynced // all that was there first has been noted as a change
	changed     chan struct{}
	events      typedcorev1.EventsGetter
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
	daemonSet   atomic.Pointer[daemonSet] // nil until it is known
	retry       wait.Backoff              // while the API server cannot be reached

	mu      sync.Mutex
	content *pods.Content
	stale   [kinds]bool // changed since content was made
	outages [kinds]outage
	// selectsNone is set while DefaultNamespaces selects no namespace.
	selectsNone bool
	// reported has the last Event of each pod, by the pod's UID.
	reported map[types.UID]string
}

var _ pods.Source = (*Source)(nil)

// kind is one of the watched resources.
type kind int

const (
	podKind kind = iota
	namespaceKind
	policyKind
	kinds
)

func (k kind) String() string {
	return [kinds]string{podKind: "pods", namespaceKind: "namespaces", policyKind: "networkpolicies"}[k]
}

// Open returns a Source that knows nothing until Run runs. Whatever client-go logs
// in this process goes to the Config's logger from then on.
func Open(cfg Config) (*Source, error) {
	connection, err := connect(cfg.Kubeconfig)
	if err != nil {
		return nil, err
	}
	connection.UserAgent = cfg.UserAgent
	connection.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	// Two clients, each with a rate limiter, so that a watch never waits behind
	// Events.
	var clients [2]*kubernetes.Clientset
	for i := range clients {
		if clients[i], err = kubernetes.NewForConfig(connection); err != nil {
			return nil, fmt.Errorf("make a client of the API server: %w", err)
		}
	}
	klog.SetSlogLogger(cfg.Log)
	return newSource(cfg, clients[0], clients[1])
}

func connect(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		connection, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("find the API server: %w: outside of a cluster's pod --kubeconfig is required", err)
		}
		return connection, nil
	}
	connection, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
	}
	return connection, nil
}

func newSource(cfg Config, client, events kubernetes.Interface) (*Source, error) {
	s := &Source{
		cfg:         cfg,
		client:      client,
		changed:     make(chan struct{}, 1),
		events:      events.CoreV1(),
		broadcaster: record.NewBroadcaster(),
		stale:       [kinds]bool{true, true, true},
		reported:    map[types.UID]string{},
		retry:       wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Steps: 10, Cap: 5 * time.Second, Jitter: 1},
	}
	s.recorder = s.broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "podshunt", Host: cfg.NodeName})

	ofNode := fields.OneTermEqualSelector("spec.nodeName", cfg.NodeName).String()
	ours := client.CoreV1().Pods(metav1.NamespaceAll)
	namespaces := client.CoreV1().Namespaces()
	policies := client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll)
	for k, resource := range [kinds]struct {
		object runtime.Object
		list   cache.ListWithContextFunc
		watch  cache.WatchFuncWithContext
	}{
		podKind: {
			&corev1.Pod{},
			func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = ofNode
				return ours.List(ctx, o)
			},
			func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = ofNode
				return ours.Watch(ctx, o)
			},
		},
		namespaceKind: {
			&corev1.Namespace{},
			func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return namespaces.List(ctx, o)
			},
			namespaces.Watch,
		},
		policyKind: {
			&networkingv1.NetworkPolicy{},
			func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return policies.List(ctx, o) },
			policies.Watch,
		},
	} {
		k := kind(k)
		lw := s.observe(k, resource.list, resource.watch)
		informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, client), resource.object, 0, cache.Indexers{})
		if err := s.prepare(k, informer); err != nil {
			return nil, fmt.Errorf("prepare informer of %s: %w", k, err)
		}
		s.informers[k] = informer
	}
	return s, nil
}

func (s *Source) prepare(k kind, informer cache.SharedIndexInformer) error {
	change := func() {
		s.mu.Lock()
		s.stale[k] = true
		s.mu.Unlock()
		s.notify()
	}
	handler, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { change() },
		UpdateFunc: func(any, any) { change() },
		DeleteFunc: func(any) { change() },
	})
	if err != nil {
		return err
	}
	s.synced[k] = handler.HasSynced
	return errors.Join(informer.SetTransform(trim),
		informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			// If it lasts, Content returns it.
			s.cfg.Log.Debug("watch ended", "resource", k.String(), "err", err)
		}))
}

// notify makes a receive from Changed succeed.
func (s *Source) notify() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Run watches the API server and sends Events until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	defer s.broadcaster.Shutdown()
	s.broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: s.events.Events(metav1.NamespaceAll)})
	s.reportNode()
	var running sync.WaitGroup
	defer running.Wait()
	for _, informer := range s.informers {
		running.Go(func() { informer.RunWithContext(ctx) })
	}
	running.Go(func() { s.followDaemonSet(ctx) })
	if cache.WaitForCacheSync(ctx.Done(), s.synced[:]...) {
		// A kind without objects causes no other notification.
		s.notify()
	}
	<-ctx.Done()
	return nil
}

// Changed returns a channel that receives after each change of what Content returns,
// its error included.
func (s *Source) Changed() <-chan struct{} { return s.changed }

func (s *Source) String() string { return "the API server" }

// Content returns what the API server last said, or nil until it has said everything
// once. It returns an error, beside the content, while a kind of objects cannot be
// watched.
func (s *Source) Content() (*pods.Content, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ready := true
	for _, synced := range s.synced {
		ready = ready && synced()
	}
	if ready && slices.Contains(s.stale[:], true) {
		s.content = s.read(s.content)
		s.stale = [kinds]bool{}
	}
	var first outage
	for _, o := range s.outages {
		if o.err != nil && (first.err == nil || o.since.Before(first.since)) {
			first = o
		}
	}
	if first.err != nil {
		return s.content, fmt.Errorf("not up to date since %s: %w", first.since.UTC().Format(time.RFC3339), first.err)
	}
	return s.content, nil
}

// read makes content from the caches, and reuses the parts of the last one that are
// not stale.
func (s *Source) read(last *pods.Content) *pods.Content {
	next := &pods.Content{Unlisted: "not known to the API server"}
	if last != nil {
		*next = *last
	}
	if s.stale[namespaceKind] {
		next.Cluster.Namespaces = map[string]map[string]string{}
		for _, namespace := range objects[*corev1.Namespace](s, namespaceKind) {
			next.Cluster.Namespaces[namespace.Name] = namespace.Labels
		}
		s.checkDefaults(next.Cluster.Namespaces)
	}
	if s.stale[policyKind] {
		next.Cluster.Policies = objects[*networkingv1.NetworkPolicy](s, policyKind)
		slices.SortFunc(next.Cluster.Policies, func(a, b *networkingv1.NetworkPolicy) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
		})
	}
	if s.stale[podKind] || s.stale[namespaceKind] {
		next.Pods = map[string]pods.Intent{}
		for _, pod := range objects[*corev1.Pod](s, podKind) {
			var defaults map[string]string
			if namespace, ok := object[*corev1.Namespace](s, namespaceKind, pod.Namespace); ok {
				defaults = s.cfg.DefaultNamespaces.optIn(namespace)
			}
			next.Pods[pod.Namespace+"/"+pod.Name] = intent(pod, defaults, s.cfg.SandboxedRuntimeClasses)
		}
	}
	return next
}

// object returns an object of a kind from its cache, by its key.
func object[T any](s *Source, k kind, key string) (T, bool) {
	o, _, _ := s.informers[k].GetIndexer().GetByKey(key) // no error of an informer's cache
	typed, ok := o.(T)
	return typed, ok
}

// objects returns all objects of a kind from its cache.
func objects[T any](s *Source, k kind) []T {
	var all []T
	for _, object := range s.informers[k].GetIndexer().List() {
		if o, ok := object.(T); ok {
			all = append(all, o)
		}
	}
	return all
}

// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

const hash = "0123456789abcdef0123456789abcdef"

// newPod returns an opted-in pod of the namespace shop.
func newPod(name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "shop", Name: name, UID: "uid-1",
		Annotations: map[string]string{api.AnnotationShortcut: "enabled"},
	}}
	if change != nil {
		change(p)
	}
	return p
}

// mirror makes a pod the mirror of a static pod, as a kubelet does.
func mirror(p *corev1.Pod) {
	p.Spec.NodeName = "node"
	p.Annotations[annotationConfigHash], p.Annotations[annotationConfigMirror] = hash, hash
	p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "node", UID: "n", Controller: ptr(true)}}
}

func ptr[T any](v T) *T { return &v }

func mustTrim[T any](t testing.TB, object T) T {
	t.Helper()
	trimmed, err := trim(object)
	if err != nil {
		t.Fatal(err)
	}
	return trimmed.(T)
}

func TestWish(t *testing.T) {
	tcp := func(name string, number int32) corev1.ContainerPort {
		return corev1.ContainerPort{Name: name, ContainerPort: number, Protocol: corev1.ProtocolTCP}
	}
	class := func(name string) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Spec.RuntimeClassName = ptr(name) }
	}
	sandboxed := func(name string) func(*pods.Intent) {
		return func(w *pods.Intent) {
			w.Excluded = &pods.Standing{
				State: api.PodRefused, Reason: api.PodSandboxedRuntime,
				Message: "its sockets are not in the node's kernel: runtime class " + name + " is one of --sandboxed-runtime-classes",
			}
		}
	}
	finished := func(w *pods.Intent) {
		w.Excluded = &pods.Standing{State: api.PodOut, Reason: api.PodFinished, Message: "it has finished"}
	}
	end := time.Date(2026, 1, 31, 18, 0, 0, 0, time.UTC)
	for _, tc := range []struct {
		name      string
		change    func(*corev1.Pod)
		namespace map[string]string
		want      func(*pods.Intent)
		wantErr   []string
	}{
		{name: "opted in"},
		{
			name:   "not opted in",
			change: func(p *corev1.Pod) { p.Annotations = nil },
			want:   func(w *pods.Intent) { w.Settings = api.Settings{} },
		},
		{
			name:      "by its namespace",
			change:    func(p *corev1.Pod) { p.Annotations = nil },
			namespace: map[string]string{api.AnnotationShortcut: "enabled", "other": "x"},
		},
		{
			name:      "its own annotation wins",
			change:    func(p *corev1.Pod) { p.Annotations = map[string]string{api.AnnotationShortcut: "disabled"} },
			namespace: map[string]string{api.AnnotationShortcut: "enabled"},
			want:      func(w *pods.Intent) { w.Settings = api.Settings{} },
		},
		{
			name:   "key by key",
			change: func(p *corev1.Pod) { p.Annotations[api.AnnotationPorts] = "80" },
			namespace: map[string]string{
				api.AnnotationShortcut: "disabled", api.AnnotationPorts: "22", api.AnnotationPausedUntil: end.Format(time.RFC3339),
			},
			want: func(w *pods.Intent) {
				w.Settings.Ports = []api.PortRange{{First: 80, Last: 80}}
				w.Settings.PausedUntil = end
			},
		},
		{
			name:      "blocking sockets by its namespace",
			namespace: map[string]string{api.AnnotationBlockingSockets: "accept"},
			want:      func(w *pods.Intent) { w.Settings.AcceptBlocking = true },
		},
		{
			name:      "blocking sockets refused against its namespace",
			change:    func(p *corev1.Pod) { p.Annotations[api.AnnotationBlockingSockets] = "refuse" },
			namespace: map[string]string{api.AnnotationBlockingSockets: "accept"},
		},
		{
			name:    "blocking sockets by a word that is not accepted",
			change:  func(p *corev1.Pod) { p.Annotations[api.AnnotationBlockingSockets] = "yes" },
			want:    func(w *pods.Intent) { w.Settings = api.Settings{} },
			wantErr: []string{`annotation podshunt.io/blocking-sockets="yes": accepted are "accept" and "refuse"`},
		},
		{
			name:      "bad annotations of both",
			change:    func(p *corev1.Pod) { p.Annotations[api.AnnotationPorts] = "http" },
			namespace: map[string]string{api.AnnotationExcludePorts: "x", "podshunt.io/y": "z"},
			want:      func(w *pods.Intent) { w.Settings = api.Settings{} },
			wantErr: []string{
				`annotation podshunt.io/ports="http"`, `namespace shop: annotation podshunt.io/exclude-ports="x"`, `podshunt.io/y="z": unknown`,
			},
		},
		{
			name:      "a bad annotation of the namespace that is overridden",
			namespace: map[string]string{api.AnnotationShortcut: "yes"},
		},
		{
			name:   "succeeded",
			change: func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded },
			want:   finished,
		},
		{
			name:   "failed",
			change: func(p *corev1.Pod) { p.Status.Phase, p.Spec.HostNetwork = corev1.PodFailed, true },
			want:   finished,
		},
		{
			name: "being deleted",
			change: func(p *corev1.Pod) {
				p.DeletionTimestamp, p.Status.Phase = &metav1.Time{Time: end}, corev1.PodRunning
			},
		},
		{
			name:   "hostNetwork",
			change: func(p *corev1.Pod) { p.Spec.HostNetwork = true },
			want: func(w *pods.Intent) {
				hostNetwork := pods.HostNetwork()
				w.Excluded = &hostNetwork
			},
		},
		{name: "runtime class of runc", change: class("nvidia")},
		{name: "gVisor", change: class("gvisor"), want: sandboxed("gvisor")},
		{name: "Kata", change: class("kata-qemu"), want: sandboxed("kata-qemu")},
		{
			name:   "static pod",
			change: mirror,
			want:   func(w *pods.Intent) { w.UIDs = append(w.UIDs, hash) },
		},
		{
			name: "a UID where the hash belongs",
			change: func(p *corev1.Pod) {
				mirror(p)
				const uid = "11111111-1111-4111-8111-111111111111"
				p.Annotations[annotationConfigHash], p.Annotations[annotationConfigMirror] = uid, uid
			},
		},
		{
			name:   "a hash without a mirror",
			change: func(p *corev1.Pod) { mirror(p); delete(p.Annotations, annotationConfigMirror) },
		},
		{
			name:   "the mirror of another pod",
			change: func(p *corev1.Pod) { mirror(p); p.Annotations[annotationConfigMirror] = strings.Repeat("f", 32) },
		},
		{
			name:   "a mirror of nobody",
			change: func(p *corev1.Pod) { mirror(p); p.OwnerReferences = nil },
		},
		{
			name:   "the mirror of another node",
			change: func(p *corev1.Pod) { mirror(p); p.Spec.NodeName = "other" },
		},
		{
			name:   "the mirror of what is called as the node",
			change: func(p *corev1.Pod) { mirror(p); p.OwnerReferences[0].Kind = "ReplicaSet" },
		},
		{
			name:   "the node is no controller",
			change: func(p *corev1.Pod) { mirror(p); p.OwnerReferences[0].Controller = nil },
		},
		{
			name: "dual stack",
			change: func(p *corev1.Pod) {
				p.Status.PodIP = "10.0.0.1"
				p.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}, {IP: "nonsense"}}
			},
			want: func(w *pods.Intent) {
				w.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
			},
		},
		{
			name:   "one address",
			change: func(p *corev1.Pod) { p.Status.PodIP = "10.0.0.1" },
			want:   func(w *pods.Intent) { w.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.1")} },
		},
		{
			name: "named ports of containers and sidecars",
			change: func(p *corev1.Pod) {
				p.Spec.Containers = []corev1.Container{
					{Ports: []corev1.ContainerPort{tcp("http", 80), {Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP}, {ContainerPort: 1}}},
					{Ports: []corev1.ContainerPort{{Name: "plain", ContainerPort: 8080}}},
				}
				p.Spec.InitContainers = []corev1.Container{
					{Ports: []corev1.ContainerPort{tcp("init", 81)}},
					{Ports: []corev1.ContainerPort{tcp("sidecar", 82)}, RestartPolicy: ptr(corev1.ContainerRestartPolicyAlways)},
				}
			},
			want: func(w *pods.Intent) {
				w.Ports = []policy.NamedPort{{Name: "http", Number: 80}, {Name: "plain", Number: 8080}, {Name: "sidecar", Number: 82}}
			},
		},
		{
			name:   "egress bandwidth",
			change: func(p *corev1.Pod) { p.Annotations[annotationEgressBandwidth] = "1M" },
			want:   func(w *pods.Intent) { w.Bandwidth = annotationEgressBandwidth },
		},
		{
			name: "both bandwidths",
			change: func(p *corev1.Pod) {
				p.Annotations[annotationEgressBandwidth], p.Annotations[annotationIngressBandwidth] = "1M", "1M"
			},
			want: func(w *pods.Intent) { w.Bandwidth = annotationIngressBandwidth },
		},
		{
			name:   "labels",
			change: func(p *corev1.Pod) { p.Labels = map[string]string{"app": "web"} },
			want:   func(w *pods.Intent) { w.Labels = map[string]string{"app": "web"} },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := mustTrim(t, newPod("web", tc.change))
			namespace := mustTrim(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Annotations: tc.namespace}})
			got := intent(pod, namespace.Annotations, []string{"gvisor", "kata*"})
			want := pods.Intent{UIDs: []string{"uid-1"}, Settings: api.Settings{Enabled: true}}
			if tc.want != nil {
				tc.want(&want)
			}
			for _, part := range tc.wantErr {
				if got.Err == nil || !strings.Contains(got.Err.Error(), part) {
					t.Errorf("got error %v, want %q in it", got.Err, part)
				}
			}
			if tc.wantErr == nil && got.Err != nil {
				t.Errorf("got error %v, want none", got.Err)
			}
			got.Err = nil
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("intent (-want +got)\n%s", diff)
			}
		})
	}
}

func TestTrim(t *testing.T) {
	meta := metav1.ObjectMeta{
		Namespace: "shop", Name: "web", UID: "u", ResourceVersion: "7", Generation: 3, GenerateName: "web-",
		Labels:            map[string]string{"app": "web"},
		Annotations:       map[string]string{"podshunt.io/shortcut": "enabled", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
		CreationTimestamp: metav1.Now(), Finalizers: []string{"x"}, OwnerReferences: []metav1.OwnerReference{{Name: "rs"}},
		ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubectl"}},
	}
	trimmedMeta := metav1.ObjectMeta{
		Namespace: "shop", Name: "web", UID: "u", ResourceVersion: "7",
		Labels: meta.Labels, Annotations: map[string]string{"podshunt.io/shortcut": "enabled"},
	}
	unlabelled := trimmedMeta
	unlabelled.Labels = nil
	port := corev1.ContainerPort{Name: "http", ContainerPort: 80, HostPort: 8080, Protocol: corev1.ProtocolTCP, HostIP: "::"}
	spec := networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: meta.Labels},
		Ingress:     []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Port: ptr(intstr.FromString("http"))}}}},
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
	}
	for _, tc := range []struct {
		name string
		from any
		want any
	}{
		{
			name: "pod",
			from: &corev1.Pod{
				ObjectMeta: meta,
				Spec: corev1.PodSpec{
					NodeName: "n", RuntimeClassName: ptr("runc"), Volumes: []corev1.Volume{{Name: "v"}}, ServiceAccountName: "s",
					Containers: []corev1.Container{
						{Name: "web", Image: "i", Env: []corev1.EnvVar{{Name: "PASSWORD", Value: "secret"}}, Ports: []corev1.ContainerPort{port}},
						{Name: "no ports", Image: "i"},
					},
					InitContainers: []corev1.Container{{Name: "init", Ports: []corev1.ContainerPort{port}}},
				},
				Status: corev1.PodStatus{
					Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}, HostIP: "10.1.1.1",
					Conditions: []corev1.PodCondition{{Type: corev1.PodReady}}, ContainerStatuses: []corev1.ContainerStatus{{Name: "web"}},
				},
			},
			want: &corev1.Pod{
				ObjectMeta: trimmedMeta,
				Spec: corev1.PodSpec{
					NodeName:         "n",
					RuntimeClassName: ptr("runc"),
					Containers:       []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}}}},
				},
				Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}},
			},
		},
		{
			name: "namespace",
			from: &corev1.Namespace{ObjectMeta: meta, Spec: corev1.NamespaceSpec{Finalizers: []corev1.FinalizerName{"kubernetes"}}},
			want: &corev1.Namespace{ObjectMeta: trimmedMeta},
		},
		{
			name: "network policy",
			from: &networkingv1.NetworkPolicy{ObjectMeta: meta, Spec: spec},
			want: &networkingv1.NetworkPolicy{ObjectMeta: unlabelled, Spec: spec},
		},
		{name: "another", from: &corev1.Node{ObjectMeta: meta}, want: &corev1.Node{ObjectMeta: meta}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := mustTrim(t, tc.from)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("trimmed (-want +got)\n%s", diff)
			}
			if diff := cmp.Diff(tc.want, mustTrim(t, got)); diff != "" {
				t.Errorf("trimmed twice (-want +got)\n%s", diff)
			}
		})
	}
}

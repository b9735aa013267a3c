// SPDX-License-Identifier: Apache-2.0

// What a pod asks for, by its annotations and its namespace's.

package kube

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

const (
	annotationConfigHash       = "kubernetes.io/config.hash"
	annotationConfigMirror     = "kubernetes.io/config.mirror"
	annotationIngressBandwidth = "kubernetes.io/ingress-bandwidth"
	annotationEgressBandwidth  = "kubernetes.io/egress-bandwidth"
)

// configHash matches the UID that a kubelet gives a static pod: the hash of its
// manifest. UIDs that the API server makes look different.
var configHash = regexp.MustCompile(`^[0-9a-f]{32}$`)

// trim returns an object with only those parts that intent and the policy need, to
// keep the caches small.
func trim(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Pod:
		trimmed := &corev1.Pod{ObjectMeta: trimMeta(o.ObjectMeta)}
		trimmed.Spec.NodeName = o.Spec.NodeName
		trimmed.Spec.HostNetwork = o.Spec.HostNetwork
		trimmed.Spec.RuntimeClassName = o.Spec.RuntimeClassName
		trimmed.Spec.Containers = trimContainers(o.Spec.Containers, isContainer)
		trimmed.Spec.InitContainers = trimContainers(o.Spec.InitContainers, isSidecar)
		trimmed.Status.Phase = o.Status.Phase
		trimmed.Status.PodIP = o.Status.PodIP
		trimmed.Status.PodIPs = o.Status.PodIPs
		return trimmed, nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: trimMeta(o.ObjectMeta)}, nil
	case *networkingv1.NetworkPolicy:
		trimmed := &networkingv1.NetworkPolicy{ObjectMeta: trimMeta(o.ObjectMeta), Spec: o.Spec}
		trimmed.Labels = nil
		return trimmed, nil
	}
	return object, nil
}

// trimMeta keeps, among others, the resource version, by which informers see
// changes, an owner that is a node, for staticUID, and what Removed looks at.
func trimMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	trimmed := metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: m.Labels,
		DeletionTimestamp: m.DeletionTimestamp,
	}
	for _, owner := range m.OwnerReferences {
		if isNode(owner) || isDaemonSet(owner) {
			trimmed.OwnerReferences = append(trimmed.OwnerReferences, owner)
		}
	}
	for name, value := range m.Annotations {
		switch {
		case strings.HasPrefix(name, api.AnnotationPrefix):
		case name == annotationConfigHash, name == annotationConfigMirror, name == annotationIngressBandwidth, name == annotationEgressBandwidth:
		default:
			continue
		}
		if trimmed.Annotations == nil {
			trimmed.Annotations = map[string]string{}
		}
		trimmed.Annotations[name] = value
	}
	return trimmed
}

// trimContainers keeps containers' named TCP ports, and of the init containers only
// sidecars, which run as long as the pod.
func trimContainers(containers []corev1.Container, keep func(corev1.Container) bool) []corev1.Container {
	var trimmed []corev1.Container
	for _, c := range containers {
		if !keep(c) {
			continue
		}
		named := corev1.Container{RestartPolicy: c.RestartPolicy}
		for _, p := range c.Ports {
			// An empty protocol is TCP.
			if p.Name != "" && (p.Protocol == corev1.ProtocolTCP || p.Protocol == "") {
				named.Ports = append(named.Ports, corev1.ContainerPort{Name: p.Name, ContainerPort: p.ContainerPort})
			}
		}
		if named.Ports != nil {
			trimmed = append(trimmed, named)
		}
	}
	return trimmed
}

func isContainer(corev1.Container) bool { return true }

func isSidecar(c corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// intent returns what a trimmed pod asks for, by its own and its namespace's
// annotations. A pod that is being deleted takes part until it has ended.
func intent(pod *corev1.Pod, namespace map[string]string, sandboxed []string) pods.Intent {
	w := pods.Intent{UIDs: []string{string(pod.UID)}, Labels: pod.Labels}
	if hash := staticUID(pod); hash != "" {
		w.UIDs = append(w.UIDs, hash)
	}
	w.Settings, w.Err = settings(pod, namespace)
	w.Excluded = exclusion(pod, sandboxed)
	for _, ip := range podIPs(pod) {
		if address, err := netip.ParseAddr(ip); err == nil {
			w.Addresses = append(w.Addresses, address.Unmap())
		}
	}
	for _, c := range slices.Concat(pod.Spec.Containers, pod.Spec.InitContainers) {
		for _, p := range c.Ports {
			w.Ports = append(w.Ports, policy.NamedPort{Name: p.Name, Number: uint16(p.ContainerPort)})
		}
	}
	for _, name := range []string{annotationIngressBandwidth, annotationEgressBandwidth} {
		if _, ok := pod.Annotations[name]; ok && w.Bandwidth == "" {
			w.Bandwidth = name
		}
	}
	return w
}

// staticUID returns the UID that the kubelet has for a static pod whose mirror pod this
// is, or "". Anybody can write the annotations, so the owner has to be this node, too. A
// pod with a forged owner is deleted by the kubelet, and until then two pods claim the
// UID, which pods.Content notices.
func staticUID(pod *corev1.Pod) string {
	hash := pod.Annotations[annotationConfigHash]
	ours := func(owner metav1.OwnerReference) bool { return isNode(owner) && owner.Name == pod.Spec.NodeName }
	if !configHash.MatchString(hash) || pod.Annotations[annotationConfigMirror] != hash ||
		!slices.ContainsFunc(pod.OwnerReferences, ours) {
		return ""
	}
	return hash
}

func isNode(owner metav1.OwnerReference) bool {
	return owner.APIVersion == "v1" && owner.Kind == "Node" && owner.Controller != nil && *owner.Controller
}

// settings parses the pod's annotations; one that the pod does not have comes from
// its namespace. An error says whose annotation it is.
func settings(pod *corev1.Pod, namespace map[string]string) (api.Settings, error) {
	defaults := map[string]string{}
	for name, value := range namespace {
		if _, ok := pod.Annotations[name]; !ok {
			defaults[name] = value
		}
	}
	_, err1 := api.ParseAnnotations(pod.Annotations)
	_, err2 := api.ParseAnnotations(defaults)
	if err2 != nil {
		err2 = fmt.Errorf("namespace %s: %w", pod.Namespace, err2)
	}
	if err := errors.Join(err1, err2); err != nil {
		return api.Settings{}, err
	}
	maps.Copy(defaults, pod.Annotations)
	return api.ParseAnnotations(defaults)
}

// exclusion returns what becomes of the pod whatever it asks for, or nil.
func exclusion(pod *corev1.Pod, sandboxed []string) *pods.Standing {
	if phase := pod.Status.Phase; phase == corev1.PodSucceeded || phase == corev1.PodFailed {
		return &pods.Standing{State: api.PodOut, Reason: api.PodFinished, Message: "it has finished"}
	}
	if pod.Spec.HostNetwork {
		standing := pods.HostNetwork()
		return &standing
	}
	if class := pod.Spec.RuntimeClassName; class != nil {
		for _, pattern := range sandboxed {
			if ok, _ := path.Match(pattern, *class); ok {
				return &pods.Standing{
					State: api.PodRefused, Reason: api.PodSandboxedRuntime,
					Message: fmt.Sprintf("its sockets are not in the node's kernel: runtime class %s is one of --sandboxed-runtime-classes", *class),
				}
			}
		}
	}
	return nil
}

func podIPs(pod *corev1.Pod) []string {
	if len(pod.Status.PodIPs) == 0 && pod.Status.PodIP != "" {
		return []string{pod.Status.PodIP}
	}
	var ips []string
	for _, ip := range pod.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	return ips
}

// SPDX-License-Identifier: Apache-2.0

// Events on pods and on the node.

package kube

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/api"
)

// Report sends an Event for each pod that wants to take part and cannot, once for
// each reason. It is pods.Config's Report.
func (s *Source) Report(all []pods.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	reported := map[types.UID]string{}
	for _, p := range all {
		if p.State != api.PodRefused {
			continue
		}
		pod, ok := object[*corev1.Pod](s, podKind, p.Pod.String())
		if !ok {
			continue
		}
		message := "stays on TCP: " + p.Message + advice(p.Reason)
		told := fmt.Sprint(p.Reason, " ", message)
		reported[pod.UID] = told
		if s.reported[pod.UID] != told {
			// The runtime's UID of a static pod is not that of the API server.
			s.warn(corev1.ObjectReference{
				Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID,
			}, p.Reason, message)
		}
	}
	s.reported = reported
}

// advice returns what to do, for reasons whose message does not say it.
func advice(reason api.PodReason) string {
	switch reason {
	case api.PodHostNetwork:
		return ": run it without hostNetwork, or annotate it with " + api.AnnotationShortcut + "=disabled"
	case api.PodSandboxedRuntime:
		return ": if that is wrong, change the patterns; else annotate it with " + api.AnnotationShortcut + "=disabled"
	}
	return ""
}

// reportNode sends an Event for the node if its kernel is refused.
func (s *Source) reportNode() {
	if s.cfg.Refusal == "" {
		return
	}
	// The kubelet gives its node's name as the UID, and kubectl describe looks for that.
	s.warn(corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: s.cfg.NodeName, UID: types.UID(s.cfg.NodeName)},
		api.PodKernelRefused, "no pod takes part: "+s.cfg.Refusal)
}

// mostOfEvent bounds the length of a message in bytes; the API accepts 1024.
const mostOfEvent = 1000

// warn sends an Event. It does not block: the recorder sends later, drops
// repetitions, and limits the rate per object.
func (s *Source) warn(object corev1.ObjectReference, reason api.PodReason, message string) {
	s.recorder.Event(&object, corev1.EventTypeWarning, camel(reason), api.Shorten(message, mostOfEvent))
}

// camel spells a reason as Events do: InvalidAnnotation for invalid_annotation.
func camel(reason api.PodReason) string {
	var b strings.Builder
	for word := range strings.SplitSeq(string(reason), "_") {
		b.WriteString(strings.ToUpper(word[:1]) + word[1:])
	}
	return b.String()
}

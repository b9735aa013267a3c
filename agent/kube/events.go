// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/api"
)

// Report tells by an Event of each pod that wants to take part and cannot, once
// for each reason. It is for pods.Config.
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

// advice says what to do where the reason does not.
func advice(reason api.PodReason) string {
	switch reason {
	case api.PodHostNetwork:
		return ": run it without hostNetwork, or annotate it with " + api.AnnotationShortcut + "=disabled"
	case api.PodSandboxedRuntime:
		return ": if that is wrong, change the patterns; else annotate it with " + api.AnnotationShortcut + "=disabled"
	}
	return ""
}

// reportNode tells by an Event that the kernel is refused.
func (s *Source) reportNode() {
	if s.cfg.Refusal == "" {
		return
	}
	// The kubelet gives its node's name as the UID, and kubectl describe looks for that.
	s.warn(corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: s.cfg.NodeName, UID: types.UID(s.cfg.NodeName)},
		api.PodKernelRefused, "no pod takes part: "+s.cfg.Refusal)
}

// mostOfEvent is how long a message may be; the API accepts 1024 bytes.
const mostOfEvent = 1000

// warn does not block: the recorder sends later, drops what it has sent a moment
// ago, and limits the rate per object.
func (s *Source) warn(object corev1.ObjectReference, reason api.PodReason, message string) {
	s.recorder.Event(&object, corev1.EventTypeWarning, camel(reason), api.Shorten(message, mostOfEvent))
}

// camel spells a reason as those of Events are: InvalidAnnotation.
func camel(reason api.PodReason) string {
	var b strings.Builder
	for word := range strings.SplitSeq(string(reason), "_") {
		b.WriteString(strings.ToUpper(word[:1]) + word[1:])
	}
	return b.String()
}

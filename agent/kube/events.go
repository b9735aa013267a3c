// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"fmt"

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
		if p.Problem == "" {
			continue
		}
		pod, ok := object[*corev1.Pod](s, podKind, p.Pod.String())
		if !ok {
			continue
		}
		message := "stays on TCP: " + p.Reason + advice(p.Problem)
		told := fmt.Sprint(p.Problem, " ", message)
		reported[pod.UID] = told
		if s.reported[pod.UID] != told {
			// The runtime's UID of a static pod is not that of the API server.
			s.warn(corev1.ObjectReference{
				Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID,
			}, p.Problem, message)
		}
	}
	s.reported = reported
}

// advice says what to do where the reason does not.
func advice(problem pods.Problem) string {
	switch problem {
	case pods.HostNetwork:
		return ": run it without hostNetwork, or annotate it with " + api.AnnotationShortcut + "=disabled"
	case pods.SandboxedRuntime:
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
		pods.KernelRefused, "no pod takes part: "+s.cfg.Refusal)
}

// mostOfEvent is how long a message may be; the API accepts 1024 bytes.
const mostOfEvent = 1000

// warn does not block: the recorder sends later, drops what it has sent a moment
// ago, and limits the rate per object.
func (s *Source) warn(object corev1.ObjectReference, problem pods.Problem, message string) {
	s.recorder.Event(&object, corev1.EventTypeWarning, string(problem), api.Shorten(message, mostOfEvent))
}

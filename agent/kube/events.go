// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podshunt/podshunt/agent/pods"
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
		object, ok, err := s.informers[podKind].GetIndexer().GetByKey(p.Pod.String())
		pod, isPod := object.(*corev1.Pod)
		if err != nil || !ok || !isPod {
			continue
		}
		message := "stays on TCP: " + p.Reason
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

// reportNode tells by an Event that the kernel is refused.
func (s *Source) reportNode() {
	if s.cfg.Refusal == "" {
		return
	}
	// The kubelet gives its node's name as the UID, and kubectl describe looks for that.
	s.warn(corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: s.cfg.NodeName, UID: types.UID(s.cfg.NodeName)},
		pods.KernelRefused, "no pod takes part: "+s.cfg.Refusal)
}

// warn does not block: the recorder sends later, drops what it has sent a moment
// ago, and limits the rate per object.
func (s *Source) warn(object corev1.ObjectReference, problem pods.Problem, message string) {
	s.recorder.Event(&object, corev1.EventTypeWarning, string(problem), message)
}

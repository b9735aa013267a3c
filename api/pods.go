// SPDX-License-Identifier: Apache-2.0

// The state of a pod, and the codes that say why.

package api

import (
	"net/netip"
)

// PodStatus is one attachment as the agent sees it.
type PodStatus struct {
	Pod         PodRef       `json:"pod"`
	ContainerID string       `json:"containerID"`
	Netns       string       `json:"netns"`
	Addresses   []netip.Addr `json:"addresses,omitempty"`
	// NetnsCookie is the kernel's identity of the pod's network namespace; 0 if it could not be read.
	NetnsCookie uint64   `json:"netnsCookie,omitempty"`
	State       PodState `json:"state"`
	// Enrolled is true in the states PodEnrolled and PodHeld.
	Enrolled bool `json:"enrolled"`
	// Reason is the code that says why it has that state; empty for PodEnrolled. Message
	// says it to people; no code depends on it.
	Reason  PodReason `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"`
	// AcceptBlocking is true if the pod lets its sockets in blocking mode take part, where
	// the pod at the other end does so, too.
	AcceptBlocking bool `json:"acceptBlocking,omitempty"`
}

// PodState says whether a pod takes part.
type PodState string

// The states of a pod.
const (
	// PodOut stays on TCP, and does not ask to take part: it has not opted in or
	// has finished. After an unload, all pods have this state.
	PodOut PodState = "out"
	// PodRefused asks to take part and cannot.
	PodRefused PodState = "refused"
	// PodWaiting stays on TCP until something is known: what it asks for, or where its
	// network namespace is.
	PodWaiting PodState = "waiting"
	// PodWanted will be enrolled next.
	PodWanted PodState = "wanted"
	// PodEnrolled takes part: its new connections are paired where the policy allows it.
	PodEnrolled PodState = "enrolled"
	// PodHeld takes part, and all its messages go by TCP while it is paused.
	PodHeld PodState = "held"
)

// PodStates lists all states.
func PodStates() []PodState {
	return []PodState{PodOut, PodRefused, PodWaiting, PodWanted, PodEnrolled, PodHeld}
}

// PodReason says why a pod has its state. A pod that is PodRefused has an Event with
// the same reason in another spelling: InvalidAnnotation for invalid_annotation.
type PodReason string

// The reasons, grouped by the state that they lead to.
const (
	// PodOut.
	PodNotOptedIn PodReason = "not_opted_in"
	PodFinished   PodReason = "finished"
	PodUnloaded   PodReason = "unloaded"

	// PodRefused, and PodOut where the pod does not ask to take part.
	PodHostNetwork   PodReason = "host_network"
	PodKernelRefused PodReason = "kernel_refused"
	// PodRefused.
	PodInvalidAnnotation PodReason = "invalid_annotation"
	PodSandboxedRuntime  PodReason = "sandboxed_runtime"
	PodEnrolFailed       PodReason = "enrol_failed"
	PodSharedNetwork     PodReason = "shared_network"
	PodClaimedTwice      PodReason = "claimed_twice"

	// PodWaiting.
	PodSourceUnknown  PodReason = "source_unknown"
	PodReplaced       PodReason = "replaced"
	PodNetnsUnknown   PodReason = "netns_unknown"
	PodNoProcess      PodReason = "no_process"
	PodWithoutAddress PodReason = "no_address"

	// PodHeld.
	PodPaused PodReason = "paused"
)

// PodReasons lists all reasons.
func PodReasons() []PodReason {
	return []PodReason{
		PodNotOptedIn, PodFinished, PodUnloaded, PodHostNetwork, PodKernelRefused, PodInvalidAnnotation, PodSandboxedRuntime,
		PodEnrolFailed, PodSharedNetwork, PodClaimedTwice, PodSourceUnknown, PodReplaced, PodNetnsUnknown, PodNoProcess,
		PodWithoutAddress, PodPaused,
	}
}

// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

// Routes of the agent's HTTP service on its unix socket. Bodies are JSON; a
// failure is answered with a status of 400 or above and an Error.
const (
	// PathAttachments: PUT an Attachment (answer: Admission), DELETE an AttachmentID.
	PathAttachments = "/v1/attachments"
	// PathGC: POST a GCRequest; every attachment of its network that is not listed is dropped.
	PathGC = "/v1/gc"
	// PathStatus: GET a Status.
	PathStatus = "/v1/status"
	// PathFlows: GET a FlowList. The query parameters are as for PathForget.
	PathFlows = "/v1/flows"
	// PathForget: POST; answer: ForgetResult. The query parameters "pod" and "port" are those of a Selector.
	PathForget = "/v1/forget"
	// PathUnload: POST; answer: UnloadResult. The query parameter "timeout" is a Go
	// duration; with "force" as "true", connections that take longer are reset.
	PathUnload = "/v1/unload"
	// PathUninstall: as PathUnload, after our entry has been taken out of the CNI configuration.
	PathUninstall = "/v1/uninstall"
)

// Version is the apiVersion of all that the commands print as JSON. While it stays, no
// field, state or reason goes or changes its meaning; some may come.
const Version = "podshunt.io/v1"

// TypeMeta says what a JSON document is.
type TypeMeta struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

// The kinds of documents.
const (
	KindStatus       = "Status"
	KindFlowList     = "FlowList"
	KindKernelReport = "KernelReport"
)

// FlowList is the answer to PathFlows.
type FlowList struct {
	TypeMeta
	Items []Flow `json:"items"`
}

// Error is the body of every failed request.
type Error struct {
	Error string `json:"error"`
}

// PodRef names a pod. UID may be empty where the runtime does not give it.
type PodRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
}

// String returns namespace/name.
func (p PodRef) String() string { return p.Namespace + "/" + p.Name }

// AttachmentID is what the CNI specification calls an attachment: one
// interface of one container (a pod sandbox) on one network.
type AttachmentID struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// Attachment is what a CNI ADD tells of a pod sandbox.
type Attachment struct {
	AttachmentID
	// Netns is the path of the pod's network namespace, as the runtime gave it.
	Netns     string       `json:"netns"`
	Pod       PodRef       `json:"pod"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
}

// Admission answers an ADD. The pod starts in either case.
type Admission struct {
	// Enrolled tells whether the pod takes part from its first connection on.
	Enrolled bool `json:"enrolled"`
	// Message says why it does not.
	Message string `json:"message,omitempty"`
}

// GCRequest lists the attachments of Network that are still valid. The network
// of each entry in Valid is Network, whatever the entry says.
type GCRequest struct {
	Network string         `json:"network"`
	Valid   []AttachmentID `json:"valid"`
}

// Status is the state of the agent, its kernel objects and its pods.
type Status struct {
	TypeMeta
	Version string `json:"version"`
	// Kernel is the running kernel's release.
	Kernel string `json:"kernel"`
	// Unloaded is set after an unload: nothing is shortcut until the agent starts again.
	Unloaded bool `json:"unloaded,omitempty"`
	// Observer is how reads of applications are seen: "fexit" or "tracepoint".
	Observer string   `json:"observer"`
	Cgroup   string   `json:"cgroup"`
	PinDir   string   `json:"pinDir"`
	Hazards  []Hazard `json:"hazards"`
	// HazardsAccepted is true with --kernel-hazards=accept.
	HazardsAccepted bool `json:"hazardsAccepted"`
	// Guards are those attached at present; there are none while no pod takes part.
	Guards []string    `json:"guards,omitempty"`
	Pods   []PodStatus `json:"pods"`
	// UnsupportedPorts are the server ports whose new connections are not paired.
	UnsupportedPorts []UnsupportedPort `json:"unsupportedPorts,omitempty"`
	// SourceError is why the source of pod annotations cannot be read at present; the last good content stays in force.
	SourceError string `json:"sourceError,omitempty"`
	// PolicyError is why the kernel's policy map is not complete; what is missing stays on TCP.
	PolicyError string `json:"policyError,omitempty"`
	// Lease is until when the policy is trusted; nil is for ever.
	Lease *Lease `json:"lease,omitempty"`
	// CNI is the state of the plugin's installation; nil if the agent was told not to install it.
	CNI  *CNIStatus `json:"cni,omitempty"`
	Maps []MapUsage `json:"maps"`
	// Outcomes counts every decision the kernel programs have taken since they were loaded.
	Outcomes []Outcome `json:"outcomes"`
}

// Lease is how long the policy in the kernel is trusted. After that all connections
// go by TCP.
type Lease struct {
	Until time.Time `json:"until"`
	// Error is why it is not renewed at present.
	Error string `json:"error,omitempty"`
}

// CNIStatus tells whether the runtime runs the plugin for new pods.
type CNIStatus struct {
	// Conflist is the file of the runtime that has the plugin's entry, "" if there is none.
	Conflist string `json:"conflist,omitempty"`
	// Installed is true if the entry is in the network that the runtime uses, and the binary in place.
	Installed bool `json:"installed"`
	// Error is what is not as wanted. The agent goes on trying.
	Error string `json:"error,omitempty"`
	// Since is when all of the above became so.
	Since time.Time `json:"since"`
}

// Hazard is one way in which this kernel serves sockets of the shortcut
// differently from plain TCP, as measured on it.
type Hazard struct {
	Name    string `json:"name"`
	Present bool   `json:"present"`
	// Detail is what was observed, or why the test could not be run.
	Detail string `json:"detail"`
	// Consequence is who notices it, and Action what podshunt does about it.
	Consequence string `json:"consequence"`
	Action      string `json:"action"`
	// Guard names the guard that makes it harmless on this kernel, if one does.
	Guard string `json:"guard,omitempty"`
	// Fatal hazards keep every pod on TCP unless they are accepted.
	Fatal bool `json:"fatal"`
}

// KernelReport is what a kernel was found to be like.
type KernelReport struct {
	TypeMeta
	Version string `json:"version"`
	Kernel  string `json:"kernel"`
	// Hazards is empty if the kernel lacks what measuring them needs.
	Hazards []Hazard `json:"hazards,omitempty"`
	// HazardsAccepted is true with --kernel-hazards=accept.
	HazardsAccepted bool `json:"hazardsAccepted"`
	// TakesPart reports whether pods would take part. Reason and Message say why they would not.
	TakesPart bool         `json:"takesPart"`
	Reason    KernelReason `json:"reason,omitempty"`
	Message   string       `json:"message,omitempty"`
}

// KernelReason is why no pod takes part on a kernel.
type KernelReason string

// The reasons. With the first the agent does not run.
const (
	KernelLacksFeatures KernelReason = "lacks_features"
	KernelFatalHazards  KernelReason = "fatal_hazards"
)

// KernelReasons returns all of them.
func KernelReasons() []KernelReason { return []KernelReason{KernelLacksFeatures, KernelFatalHazards} }

// UnsupportedPort is a server port of a pod with a connection that used what the shortcut
// does not serve.
type UnsupportedPort struct {
	// Pod is the zero PodRef for a pod that has gone.
	Pod PodRef `json:"pod"`
	// Client is the pod whose connections alone are concerned, as it was the one that
	// used it; nil if it was the server.
	Client *PodRef `json:"client,omitempty"`
	Port   uint16  `json:"port"`
	// Reasons are codes of what was used: "splice", for example.
	Reasons []string  `json:"reasons"`
	Since   time.Time `json:"since"`
}

// Selector chooses by a pod and a server port: flows, or what is remembered of ports.
type Selector struct {
	// Pod is namespace/name, at either end; empty means all pods.
	Pod string
	// Port is a server port, for a flow also that which its client has connected to; 0 means all.
	Port uint16
}

// Query returns the selector as the parameters "pod" and "port" of a request.
func (s Selector) Query() string {
	return url.Values{"pod": {s.Pod}, "port": {strconv.Itoa(int(s.Port))}}.Encode()
}

// ParseSelector reads what Query has written; what is missing is zero.
func ParseSelector(query url.Values) (Selector, error) {
	s := Selector{Pod: query.Get("pod")}
	if text := query.Get("port"); text != "" {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return s, errors.New("query parameter port: accepted are 0 (all) to 65535")
		}
		s.Port = uint16(port)
	}
	return s, nil
}

// Chooses returns true for the flows that are chosen.
func (s Selector) Chooses(f Flow) bool {
	return (s.Pod == "" || f.Client.Pod.String() == s.Pod || f.Server.Pod.String() == s.Pod) &&
		(s.Port == 0 || f.Server.Address.Port() == s.Port || f.OrigDst.Port() == s.Port)
}

// ForgetResult tells how many unsupported ports were forgotten.
type ForgetResult struct {
	Forgotten int `json:"forgotten"`
}

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
	// Reason is why it has that state; empty for PodEnrolled. Message says it to people;
	// nothing goes by it.
	Reason  PodReason `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"`
}

// PodState says what has become of a pod.
type PodState string

// The states of a pod.
const (
	// PodOut stays on TCP, and does not ask for more: it has not opted in or has
	// finished, or podshunt was unloaded.
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

// PodReason is why a pod has its state. That of a PodRefused, in another spelling, is
// the reason of its Event: InvalidAnnotation.
type PodReason string

// The reasons, by the state that they lead to.
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

// MapUsage is how full a kernel map is.
type MapUsage struct {
	Name    string `json:"name"`
	Entries int    `json:"entries"`
	Max     int    `json:"max"`
}

// What an Outcome counts.
const (
	OutcomeMessage    = "message"
	OutcomeConnection = "connection"
	OutcomeSocket     = "socket"
)

// Outcome is one counter of the kernel programs.
type Outcome struct {
	// Kind is what is counted: OutcomeMessage, OutcomeConnection or OutcomeSocket.
	Kind string `json:"kind"`
	// Code is the label of the metric, and the reason of a flow's direction.
	Code  string `json:"code"`
	Count uint64 `json:"count"`
	// Bytes are those of the messages.
	Bytes uint64 `json:"bytes,omitempty"`
}

// String returns "message_budget", for example.
func (o Outcome) String() string { return o.Kind + "_" + o.Code }

// Flow is one TCP connection of an opted-in pod. Client is the end that
// connected.
type Flow struct {
	Client FlowEnd `json:"client"`
	Server FlowEnd `json:"server"`
	// OrigDst is where the client connected to; it differs from the server's
	// own address when a Service or another NAT lies between.
	OrigDst netip.AddrPort `json:"originalDestination"`
	// Paired is false for a connection that podshunt left alone; Reason then says why, as
	// for a Direction.
	Paired  bool     `json:"paired"`
	Reason  string   `json:"reason,omitempty"`
	Details []string `json:"details,omitempty"`
	Message string   `json:"message,omitempty"`
	// Since is when the connection was paired.
	Since time.Time `json:"since,omitzero"`
	// ToServer and ToClient are the two directions of a paired connection.
	ToServer *Direction `json:"toServer,omitempty"`
	ToClient *Direction `json:"toClient,omitempty"`
}

// FlowEnd is one end of a connection. Pod is the zero PodRef when unknown.
type FlowEnd struct {
	Pod     PodRef         `json:"pod"`
	Address netip.AddrPort `json:"address"`
}

// Direction is the state of one direction of a paired connection.
type Direction struct {
	// Shortcut tells how the last message went.
	Shortcut bool `json:"shortcut"`
	// Reason is the code of why the last message that went by TCP did so, and Details are
	// those of what is behind it: "not_allowed" and "client_paused", for example. Message
	// says both to people; nothing goes by it.
	Reason  string   `json:"reason,omitempty"`
	Details []string `json:"details,omitempty"`
	Message string   `json:"message,omitempty"`
	// ShortcutBytes and TCPBytes count what the sender wrote.
	ShortcutBytes uint64 `json:"shortcutBytes"`
	TCPBytes      uint64 `json:"tcpBytes"`
	// UnreadBytes is what the receiver has not been seen to read yet.
	UnreadBytes uint64 `json:"unreadBytes"`
	// Switches counts changes from TCP to the shortcut.
	Switches uint32 `json:"switches"`
}

// UnloadResult tells how an unload ended.
type UnloadResult struct {
	// Done is true when nothing is left in the kernel but what Left needs.
	Done bool `json:"done"`
	// Waiting lists connections whose receiver still has redirected data to
	// read; nothing is deleted while there are any.
	Waiting []Flow `json:"waiting,omitempty"`
	// Reset lists the connections that a force has reset.
	Reset []Flow `json:"reset,omitempty"`
	// ResetError is why it has not reset those that are waited for.
	ResetError string `json:"resetError,omitempty"`
	// Left counts sockets of closed connections that have something to read yet, or
	// may have: what that takes goes from the kernel when their programs close them.
	Left int `json:"left,omitempty"`
	// Remarks is what an uninstall leaves for a person to look at, such as files of others that name the plugin still.
	Remarks []string `json:"remarks,omitempty"`
}

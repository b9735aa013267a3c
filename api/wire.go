// SPDX-License-Identifier: Apache-2.0

// The agent's HTTP service: its routes, requests and answers.

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
	// PathForget: POST; answer: ForgetResult. The query parameters "pod" and "port" are the fields of a
	// Selector.
	PathForget = "/v1/forget"
	// PathUnload: POST; answer: UnloadResult. The query parameter "timeout" is a Go
	// duration; with "force" as "true", connections that take longer are reset.
	PathUnload = "/v1/unload"
	// PathUninstall: as PathUnload, after our entry has been taken out of the CNI configuration.
	PathUninstall = "/v1/uninstall"
)

// Version is the apiVersion of all JSON that the commands print. While it stays, no
// field, state or reason is removed or changes its meaning; new ones may be added.
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

// AttachmentID identifies an attachment, as the CNI specification calls it: one
// interface of one container (a pod sandbox) on one network.
type AttachmentID struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// Attachment has what a CNI ADD says about a pod sandbox.
type Attachment struct {
	AttachmentID
	// Netns is the path of the pod's network namespace, as the runtime gave it.
	Netns     string       `json:"netns"`
	Pod       PodRef       `json:"pod"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
}

// Admission answers an ADD. The pod starts in either case.
type Admission struct {
	// Enrolled is true if the pod takes part from its first connection on.
	Enrolled bool `json:"enrolled"`
	// Message says why the pod does not take part.
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
	// Replacing says what the agent waits for before it loads: that connections read what was
	// sent by the shortcut of kernel objects with another layout or size. Empty: nothing.
	Replacing string `json:"replacing,omitempty"`
	// Observer is the program that counts what applications read: "fexit" or
	// "tracepoint".
	Observer string   `json:"observer"`
	Cgroup   string   `json:"cgroup"`
	PinDir   string   `json:"pinDir"`
	Hazards  []Hazard `json:"hazards"`
	// AcceptedHazards has the names of the hazards that --accept-hazards accepts, whether this
	// kernel has them or not.
	AcceptedHazards []string `json:"acceptedHazards,omitempty"`
	// NewConnections says when new connections join.
	NewConnections NewConnections `json:"newConnections"`
	// OpenConnections says what becomes of connections that are older than the opt-in.
	OpenConnections OpenConnections `json:"openConnections"`
	// Guards names the attached guards; none are while no pod takes part and no flow is left.
	Guards []string `json:"guards,omitempty"`
	// Untraced says why the kernel does not call them, or the observer: all messages go by TCP.
	Untraced string      `json:"untraced,omitempty"`
	Pods     []PodStatus `json:"pods"`
	// UnsupportedPorts are the server ports whose new connections are not paired.
	UnsupportedPorts []UnsupportedPort `json:"unsupportedPorts,omitempty"`
	// JoinPorts are the server ports whose new connections join sooner or later than others.
	JoinPorts []JoinPort `json:"joinPorts,omitempty"`
	// SourceError says why the source of pod annotations cannot be read; the last good content stays in force.
	SourceError string `json:"sourceError,omitempty"`
	// PolicyError says why the kernel's policy map is not complete; what is missing stays on
	// TCP.
	PolicyError string `json:"policyError,omitempty"`
	// Lease says until when the policy is trusted; nil means for ever.
	Lease *Lease `json:"lease,omitempty"`
	// CNI is the state of the plugin's installation; nil if the agent was told not to install it.
	CNI *CNIStatus `json:"cni,omitempty"`
	// Runtime is the node's container runtime.
	Runtime *Runtime   `json:"runtime,omitempty"`
	Node    NodeReport `json:"node"`
	Maps    []MapUsage `json:"maps"`
	// Outcomes counts every decision the kernel programs have taken since they were loaded.
	Outcomes []Outcome `json:"outcomes"`
}

// NewConnections says when new connections join.
type NewConnections struct {
	// Watched is true if they join once they have earned it, and false if they join at
	// their handshake.
	Watched bool `json:"watched"`
	// Message says why they join at their handshake, if this kernel is the reason.
	Message string `json:"message,omitempty"`
}

// OpenConnections says what becomes of connections that are open when both of their pods
// begin to be allowed to use the shortcut.
type OpenConnections struct {
	// Join is false on a kernel where only new connections are paired.
	Join bool `json:"join"`
	// Message says why.
	Message string `json:"message,omitempty"`
}

// Lease says how long the policy in the kernel is trusted. After that all
// connections go by TCP.
type Lease struct {
	Until time.Time `json:"until"`
	// Error says why it is not renewed at present.
	Error string `json:"error,omitempty"`
}

// CNIStatus says whether the runtime runs the plugin for new pods.
type CNIStatus struct {
	// Conflist is the file of the runtime that has the plugin's entry, "" if there is none.
	Conflist string `json:"conflist,omitempty"`
	// Installed is true if the entry is in the network that the runtime uses, and the binary in place.
	Installed bool `json:"installed"`
	// Error says what is wrong. The agent goes on trying.
	Error string `json:"error,omitempty"`
	// Since is the time since when all of the above has been so.
	Since time.Time `json:"since"`
}

// Hazard is one way in which this kernel serves sockets of the shortcut
// differently from plain TCP, as measured on it.
type Hazard struct {
	Name    string `json:"name"`
	Present bool   `json:"present"`
	// Detail says what was observed, or why the test could not be run.
	Detail string `json:"detail"`
	// Consequence says who notices it, and Action what podshunt does about it.
	Consequence string `json:"consequence"`
	Action      string `json:"action"`
	// Guard names the guard that makes it harmless on this kernel, if one does.
	Guard string `json:"guard,omitempty"`
	// Fatal hazards keep every pod on TCP unless they are accepted.
	Fatal bool `json:"fatal"`
}

// KernelReport has what was measured of a kernel.
type KernelReport struct {
	TypeMeta
	Version string `json:"version"`
	Kernel  string `json:"kernel"`
	// Hazards is empty if the kernel lacks what the tests for them need.
	Hazards []Hazard `json:"hazards,omitempty"`
	// AcceptedHazards is as in Status.
	AcceptedHazards []string        `json:"acceptedHazards,omitempty"`
	NewConnections  NewConnections  `json:"newConnections"`
	OpenConnections OpenConnections `json:"openConnections"`
	// TakesPart reports whether pods would take part. If not, Reason and Message say why.
	TakesPart bool `json:"takesPart"`
	// Runtime is the node's container runtime.
	Runtime *Runtime     `json:"runtime,omitempty"`
	Node    NodeReport   `json:"node"`
	Reason  KernelReason `json:"reason,omitempty"`
	Message string       `json:"message,omitempty"`
}

// KernelReason says why no pod takes part on a node.
type KernelReason string

// The reasons. With the first and the last the agent does not run.
const (
	KernelLacksFeatures KernelReason = "lacks_features"
	KernelFatalHazards  KernelReason = "fatal_hazards"
	NodeNoCgroup2       KernelReason = "no_cgroup2"
)

// KernelReasons lists all reasons.
func KernelReasons() []KernelReason {
	return []KernelReason{KernelLacksFeatures, KernelFatalHazards, NodeNoCgroup2}
}

// JoinPort is a server port of a pod: when its connections join.
type JoinPort struct {
	// Pod is the zero PodRef for a pod that has gone.
	Pod  PodRef `json:"pod"`
	Port uint16 `json:"port"`
	// JoinAfter is how many segments of data they have to exchange first; 0: they join at their handshake.
	JoinAfter uint32 `json:"joinAfter"`
}

// UnsupportedPort is a server port of a pod to which new connections are not paired,
// because one has used a call or option that does not work on the shortcut.
type UnsupportedPort struct {
	// Pod is the zero PodRef for a pod that has gone.
	Pod PodRef `json:"pod"`
	// Client is the pod that used the call, whose own connections alone are not
	// paired; nil if the server used it, and nobody's are.
	Client *PodRef `json:"client,omitempty"`
	Port   uint16  `json:"port"`
	// Reasons has the codes of what was used: "splice", for example.
	Reasons []string  `json:"reasons"`
	Since   time.Time `json:"since"`
}

// Selector chooses by a pod and a server port: flows, or what is remembered of ports.
type Selector struct {
	// Pod is namespace/name, at either end; empty means all pods.
	Pod string
	// Port is a server port, and for a flow also the port that its client connected to; 0 means
	// all.
	Port uint16
}

// Query returns the selector as the parameters "pod" and "port" of a request.
func (s Selector) Query() string {
	return url.Values{"pod": {s.Pod}, "port": {strconv.Itoa(int(s.Port))}}.Encode()
}

// ParseSelector parses what Query returns; missing parameters are zero.
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

// Chooses reports whether the selector chooses a flow.
func (s Selector) Chooses(f Flow) bool {
	return (s.Pod == "" || f.Client.Pod.String() == s.Pod || f.Server.Pod.String() == s.Pod) &&
		(s.Port == 0 || f.Server.Address.Port() == s.Port || f.OrigDst.Port() == s.Port)
}

// ForgetResult says how many unsupported ports were forgotten.
type ForgetResult struct {
	Forgotten int `json:"forgotten"`
}

// MapUsage says how full a kernel map is.
type MapUsage struct {
	Name    string `json:"name"`
	Entries int    `json:"entries"`
	Max     int    `json:"max"`
}

// Kinds of Outcomes: what they count.
const (
	OutcomeMessage    = "message"
	OutcomeConnection = "connection"
	OutcomeSocket     = "socket"
)

// Outcome is one counter of the kernel programs.
type Outcome struct {
	// Kind says what is counted: OutcomeMessage, OutcomeConnection or
	// OutcomeSocket.
	Kind string `json:"kind"`
	// Code is the label of the metric; the codes of messages are the reasons of
	// a flow's directions, too.
	Code  string `json:"code"`
	Count uint64 `json:"count"`
	// Bytes counts the bytes of messages; 0 for other kinds.
	Bytes uint64 `json:"bytes,omitempty"`
}

// String returns "message_budget", for example.
func (o Outcome) String() string { return o.Kind + "_" + o.Code }

// Flow is one TCP connection of an opted-in pod. Client is the end that
// connected.
type Flow struct {
	Client FlowEnd `json:"client"`
	Server FlowEnd `json:"server"`
	// OrigDst is the address that the client connected to. It differs from the
	// server's own address if a Service or another NAT lies between.
	OrigDst netip.AddrPort `json:"originalDestination"`
	// Paired is false for a connection that podshunt left alone; Reason then says why, as
	// for a Direction.
	Paired  bool     `json:"paired"`
	Reason  string   `json:"reason,omitempty"`
	Details []string `json:"details,omitempty"`
	Message string   `json:"message,omitempty"`
	// Since is the time when the connection was paired.
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
	// Shortcut is true if the last message went by the shortcut.
	Shortcut bool `json:"shortcut"`
	// Reason is the code that says why the last message that went by TCP did, and Details
	// has codes that say more: "not_allowed" and "client_paused", for example. Message
	// says both to people; no code depends on it.
	Reason  string   `json:"reason,omitempty"`
	Details []string `json:"details,omitempty"`
	Message string   `json:"message,omitempty"`
	// ShortcutBytes and TCPBytes count what the sender wrote.
	ShortcutBytes uint64 `json:"shortcutBytes"`
	TCPBytes      uint64 `json:"tcpBytes"`
	// UnreadBytes counts the bytes that the receiver has not been seen to read
	// yet.
	UnreadBytes uint64 `json:"unreadBytes"`
	// Switches counts changes from TCP to the shortcut.
	Switches uint32 `json:"switches"`
}

// UnloadResult says how an unload ended.
type UnloadResult struct {
	// Done is true if nothing is left in the kernel but what the sockets of Left
	// need.
	Done bool `json:"done"`
	// Waiting lists connections whose receiver still has redirected data to
	// read; nothing is deleted while there are any.
	Waiting []Flow `json:"waiting,omitempty"`
	// Reset lists the connections that were reset, with force.
	Reset []Flow `json:"reset,omitempty"`
	// ResetError says why the connections in Waiting were not reset, with force.
	ResetError string `json:"resetError,omitempty"`
	// Left counts sockets of ended connections that have, or may have, something to
	// read. What they need leaves the kernel when their programs close them.
	Left int `json:"left,omitempty"`
	// Remarks lists what an uninstall leaves for a person to look at, such as files that still name the plugin.
	Remarks []string `json:"remarks,omitempty"`
}

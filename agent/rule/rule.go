// SPDX-License-Identifier: Apache-2.0

// Package rule has the types in which policy is handed over: agent/policy makes
// rules of what pods ask for, and agent/datapath writes them into the kernel.
package rule

// Verdict says what becomes of a connection.
type Verdict uint32

// The verdicts, with the numbers of enum verdict in bpf/flow.h.
const (
	// Refuse leaves new connections alone and turns paired ones back to TCP. It is also
	// the answer where the kernel has no rule.
	Refuse Verdict = iota
	// Allow pairs new connections and lets both directions be shortcut.
	Allow
	// Hold pairs new connections but keeps them on TCP, for a refusal that is known to
	// end (a pause): no new connection is needed then.
	Hold
)

// Rule holds for connections from the pod Client to the server ports First to Last of
// the pod Server.
type Rule struct {
	// Client and Server are cookies of network namespaces.
	Client, Server uint64
	// First and Last are in host byte order; both are included.
	First, Last uint16
	Verdict     Verdict
	// Blocking lets sockets in blocking mode take part: both pods accept what follows.
	Blocking bool
	// Reason is a number that the kernel keeps beside the verdict and returns with
	// each flow. policy.Reason has the meanings.
	Reason uint32
}

// PairRules are all rules of the connections from the pod Client to the pod Server,
// by cookies of network namespaces. A port without a rule is refused. A rule over all
// ports, 0 to 65535, is the base of the pair and comes first; narrower ones override it
// and do not overlap each other. For example, 0-65535 Allow and 22-22 Refuse allow
// every port but 22.
type PairRules struct {
	Client, Server uint64
	Rules          []Rule
}

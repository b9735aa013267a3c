// SPDX-License-Identifier: Apache-2.0

// What matters of a node beside its kernel's version.

package api

// NodeReport has what matters of a node beside its kernel's version.
type NodeReport struct {
	// Lockdown is the kernel's lockdown: none, integrity, confidentiality, or "" if that is
	// not known.
	Lockdown string `json:"lockdown,omitempty"`
	// Cgroups says which cgroup versions the node has: v2, v1, hybrid for both, or "" if that
	// is not known.
	Cgroups string `json:"cgroups,omitempty"`
	// Cgroup2 is where the node has mounted cgroup2.
	Cgroup2 string `json:"cgroup2,omitempty"`
	// Warnings has what keeps podshunt from working, wholly or in part.
	Warnings []Warning `json:"warnings,omitempty"`
}

// The cgroup versions of a node.
const (
	CgroupsV1     = "v1"
	CgroupsV2     = "v2"
	CgroupsHybrid = "hybrid"
)

// LockdownConfidentiality is the lockdown that forbids BPF programs to read the kernel's memory.
const LockdownConfidentiality = "confidentiality"

// Warning is something to mend on a node. Its message is for people, and says what to do.
type Warning struct {
	Code    WarningCode `json:"code"`
	Message string      `json:"message"`
}

// WarningCode names a Warning.
type WarningCode string

// The codes.
const (
	WarningLockdown    WarningCode = "lockdown"
	WarningNoCgroup2   WarningCode = "no_cgroup2"
	WarningReadOnlyDir WarningCode = "read_only_dir"
)

// SPDX-License-Identifier: Apache-2.0

// What matters of a node beside its kernel's version: lockdown, cgroup versions, and
// directories that are read-only.

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/agent/proc"
	"github.com/podshunt/podshunt/api"
)

const lockdownAdvice = "the kernel is locked down (confidentiality), which forbids BPF programs to read its memory: boot the node with lockdown=integrity or none"

// nodeReport looks at the node whose procfs is at procfs. What it may not look at it leaves
// out. Without a runtime's directories, or with an error of the runtime's, it does not look
// at them.
func nodeReport(procfs string, runtime api.Runtime) api.NodeReport {
	root := nodefs.Root(proc.Path(procfs, 1, "root"))
	r := api.NodeReport{Lockdown: lockdown(root)}
	mounts, _ := os.ReadFile(proc.Path(procfs, 1, "mounts"))
	r.Cgroups, r.Cgroup2 = cgroups(string(mounts))
	warn := func(code api.WarningCode, message string) {
		if message != "" {
			r.Warnings = append(r.Warnings, api.Warning{Code: code, Message: message})
		}
	}
	if r.Lockdown == api.LockdownConfidentiality {
		warn(api.WarningLockdown, lockdownAdvice)
	}
	if r.Cgroups == api.CgroupsV1 {
		warn(api.WarningNoCgroup2, cgroupAdvice(r))
	}
	if runtime.Name != "" && runtime.Error == "" {
		warn(api.WarningReadOnlyDir, readOnlyDirs(root, runtime))
	}
	return r
}

// lockdown returns the kernel's lockdown, or "". A container has no securityfs of its own.
func lockdown(root nodefs.Root) string {
	text, err := root.ReadFile("/sys/kernel/security/lockdown")
	if err != nil {
		return ""
	}
	// Such as: none [integrity] confidentiality
	_, rest, _ := strings.Cut(string(text), "[")
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}

// cgroups returns which cgroup versions are mounted by the text of /proc/PID/mounts, and
// where cgroup2 is. Some programs, such as Calico, mount another cgroup2 for themselves.
func cgroups(mounts string) (versions, cgroup2 string) {
	v1 := false
	for line := range strings.Lines(mounts) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		switch at := fields[1]; {
		case fields[2] == "cgroup2" && (cgroup2 == "" || strings.HasPrefix(at, "/sys/fs/cgroup")):
			cgroup2 = at
		case fields[2] == "cgroup" && strings.HasPrefix(at, "/sys/fs/cgroup/"):
			v1 = true
		}
	}
	switch {
	case v1 && cgroup2 != "":
		return api.CgroupsHybrid, cgroup2
	case v1:
		return api.CgroupsV1, ""
	case cgroup2 != "":
		return api.CgroupsV2, cgroup2
	}
	return "", ""
}

// cgroupAdvice says what to do on a node where the given directory is in no cgroup2.
func cgroupAdvice(node api.NodeReport) string {
	switch node.Cgroups {
	case api.CgroupsHybrid:
		return "the node has both cgroup versions: give --cgroup (in the chart: agent.cgroup) the directory of cgroup2, " + node.Cgroup2
	case api.CgroupsV1:
		return "the node has cgroup v1 only, and podshunt needs cgroup2: boot it with systemd.unified_cgroup_hierarchy=1"
	}
	return ""
}

// readOnlyDirs says what to do if the runtime's directories of CNI cannot be written to, or
// returns "". Of several directories of plugins one is enough.
func readOnlyDirs(root nodefs.Root, runtime api.Runtime) string {
	isReadOnly := func(dir string) bool { return readOnly(root, dir) }
	var dirs []string
	if isReadOnly(runtime.ConfDir) {
		dirs = append(dirs, runtime.ConfDir)
	}
	if !slices.ContainsFunc(runtime.BinDirs, func(dir string) bool { return !isReadOnly(dir) }) {
		dirs = append(dirs, runtime.BinDirs...)
	}
	if len(dirs) == 0 {
		return ""
	}
	return fmt.Sprintf("%s: %s uses this for CNI, and the file system is read-only, so that the plugin cannot be installed: "+
		"give the runtime a directory that can be written to, or leave out --cni-conf-dir and --cni-bin-dir (in the chart: agent.cniConfDir and agent.cniBinDir empty); pods then take part from shortly after their start on",
		strings.Join(dirs, " and "), runtime.Name)
}

// readOnly reports whether a directory, or what is there of the path to it, is on a
// read-only file system.
func readOnly(root nodefs.Root, dir string) bool {
	for {
		is, err := root.ReadOnly(dir)
		if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return err == nil && is
		}
		dir = filepath.Dir(dir)
	}
}

// withNode adds what is known of the node to a report, and what of it keeps pods on TCP.
func withNode(e api.KernelReport, node api.NodeReport) api.KernelReport {
	e.Node = node
	switch {
	case e.Reason == api.KernelLacksFeatures && node.Lockdown == api.LockdownConfidentiality:
		e.Message = lockdownAdvice + "; " + e.Message
	case e.Reason != api.KernelLacksFeatures && node.Cgroups == api.CgroupsV1:
		e.TakesPart, e.Reason, e.Message = false, api.NodeNoCgroup2, cgroupAdvice(node)
	}
	return e
}

// withCgroupAdvice adds what to do to an error of the datapath that found no cgroup2.
func withCgroupAdvice(err error, node api.NodeReport) error {
	advice := cgroupAdvice(node)
	if advice == "" || !errors.Is(err, datapath.ErrNoCgroup2) {
		return err
	}
	return fmt.Errorf("%w: %s", err, advice)
}

func writeNodeReport(t *table, node api.NodeReport) {
	if node.Lockdown != "" {
		text := node.Lockdown
		if text == "integrity" {
			text += ", which changes nothing for podshunt"
		}
		t.row("lockdown", text)
	}
	if node.Cgroups != "" {
		text := node.Cgroups
		if text == api.CgroupsHybrid {
			text += ": --cgroup (in the chart: agent.cgroup) has to be " + node.Cgroup2
		}
		t.row("cgroups", text)
	}
	for _, w := range node.Warnings {
		t.row("warning", w.Message)
	}
}

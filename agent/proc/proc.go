// SPDX-License-Identifier: Apache-2.0

// Package proc finds the network namespaces of pods among the processes of the
// node: the kubelet runs the processes of a pod in a cgroup that is named after
// its UID. It serves pods that no CNI request tells of, because they are older
// than the plugin's entry in the conflist. It only reads.
package proc

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// podCgroup matches the part of a cgroup's path that is a pod's. The cgroupfs
// driver of the kubelet writes pod<uid>, its systemd driver
// kubepods-burstable-pod<uid>.slice with underscores in the UID, and a runtime
// that is not told of systemd takes that with its own suffix for a name. The UID
// of a static pod may be a hash.
var podCgroup = regexp.MustCompile(
	`^(?:.*-)?pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice(?::.*)?)?$`)

// Finder looks through the processes of a node.
type Finder struct {
	// Root is where the procfs of the node's PID namespace is mounted.
	Root string
	// HostNetns are cookies of network namespaces that are the node's own. A
	// runtime may run helpers there that belong to the cgroup of a pod.
	HostNetns []uint64
	// NetnsCookie reads the cookie of the network namespace at a path.
	NetnsCookie func(path string) (uint64, error)
}

// Netns is a network namespace.
type Netns struct {
	// Path is that of the process it was found by, and leads to the namespace as
	// long as this process lives. After that it may lead to another one, which the
	// cookie tells.
	Path   string
	Cookie uint64
}

// process is one of a pod.
type process struct {
	pid   int
	start uint64 // in clock ticks after boot
}

// Find returns the network namespaces of those pods that have a process, by UID.
// It takes the namespace of the oldest process, which is that of the sandbox:
// those that follow may have made one of their own.
func (f Finder) Find(uids map[string]bool) (map[string]Netns, error) {
	pids, err := f.pids()
	if err != nil {
		return nil, err
	}
	processes := map[string][]process{}
	for _, pid := range pids {
		uid := f.pod(pid)
		if !uids[uid] {
			continue
		}
		if start, err := f.start(pid); err == nil {
			processes[uid] = append(processes[uid], process{pid, start})
		}
	}
	found := map[string]Netns{}
	for uid, list := range processes {
		slices.SortFunc(list, func(a, b process) int {
			return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.pid, b.pid))
		})
		for _, p := range list {
			path := f.path(p.pid, "ns", "net")
			cookie, err := f.NetnsCookie(path)
			// The process may have ended meanwhile, and another one have its number.
			if err != nil || f.pod(p.pid) != uid || slices.Contains(f.HostNetns, cookie) {
				continue
			}
			found[uid] = Netns{Path: path, Cookie: cookie}
			break
		}
	}
	return found, nil
}

func (f Finder) path(pid int, file ...string) string {
	return filepath.Join(append([]string{f.Root, strconv.Itoa(pid)}, file...)...)
}

func (f Finder) pids() ([]int, error) {
	dir, err := os.Open(f.Root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// pod returns the UID of the pod that a process belongs to, or "".
func (f Finder) pod(pid int) string {
	data, err := os.ReadFile(f.path(pid, "cgroup"))
	if err != nil {
		return ""
	}
	return podUID(string(data))
}

// podUID returns the UID of the pod in the content of a cgroup file, or "". Each
// line is a hierarchy, "0::/path" that of cgroup2. The outermost match counts: a
// container that may make cgroups can name them as it likes, but only below its own.
func podUID(content string) string {
	for line := range strings.Lines(content) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), "/")
		for part := range strings.SplitSeq(path, "/") {
			if match := podCgroup.FindStringSubmatch(part); match != nil {
				return strings.ReplaceAll(match[1], "_", "-")
			}
		}
	}
	return ""
}

// start returns when a process was started.
func (f Finder) start(pid int) (uint64, error) {
	data, err := os.ReadFile(f.path(pid, "stat"))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold anything. The start is the 20th field after it.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("decode %s: got %d fields after the name, want 20", f.path(pid, "stat"), len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

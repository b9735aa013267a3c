// SPDX-License-Identifier: Apache-2.0

// Package proc finds the network namespaces of pods among the processes of the node:
// the kubelet runs the processes of a pod in a cgroup that is named after its UID.
// It is for pods without a CNI request, because they are older than the plugin's
// entry in the conflist. A cgroup counts only where nobody but root can have made
// it. It only reads.
package proc

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Finder looks through the processes of a node.
type Finder struct {
	// Root is the path where the procfs of the node's PID namespace is mounted.
	Root string
	// HostNetns are the cookies of the node's own network namespaces, which are
	// never a pod's: a runtime may run helpers there in the cgroup of a pod.
	HostNetns []uint64
	// NetnsCookie reads the cookie of the network namespace at a path.
	NetnsCookie func(path string) (uint64, error)
}

// Netns is a network namespace.
type Netns struct {
	// Path leads to the namespace as long as the process lives by which it was
	// found. Later it may lead to another one: compare the cookie.
	Path   string
	Cookie uint64
}

// process is a process of a pod.
type process struct {
	pid   int
	start uint64 // in clock ticks after boot
}

// Find returns the network namespaces of pods that have a process, by UID. It takes
// the namespace of the pod's oldest process, the sandbox: later ones may have made
// namespaces of their own. For a pod that it has not found, refused may say why a
// process in a cgroup of the pod's name does not count.
func (f Finder) Find(uids map[string]bool) (found map[string]Netns, refused map[string]error, err error) {
	err = f.inNode(func() error {
		found, refused, err = f.find(uids)
		return err
	})
	return found, refused, err
}

func (f Finder) find(uids map[string]bool) (found map[string]Netns, refused map[string]error, err error) {
	pids, err := PIDs(f.Root)
	if err != nil {
		return nil, nil, err
	}
	cgroups := f.readMounts()
	pod := func(pid int) (string, error) {
		data, err := os.ReadFile(f.path(pid, "cgroup"))
		if err != nil {
			return "", nil // the process has ended
		}
		return cgroups.pod(string(data), uids)
	}
	processes := map[string][]process{}
	refused = map[string]error{}
	for _, pid := range pids {
		uid, err := pod(pid)
		if uid == "" {
			continue
		}
		if err != nil {
			refused[uid] = cmp.Or(refused[uid], err)
			continue
		}
		if stat, err := ReadStat(f.Root, pid); err == nil {
			processes[uid] = append(processes[uid], process{pid, stat.Start})
		}
	}
	found = map[string]Netns{}
	for uid, list := range processes {
		slices.SortFunc(list, func(a, b process) int {
			return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.pid, b.pid))
		})
		for _, p := range list {
			path := f.path(p.pid, "ns", "net")
			cookie, err := f.NetnsCookie(path)
			// The process may have ended meanwhile, and another one got its number.
			if now, refusal := pod(p.pid); err != nil || now != uid || refusal != nil || slices.Contains(f.HostNetns, cookie) {
				continue
			}
			found[uid] = Netns{Path: path, Cookie: cookie}
			delete(refused, uid)
			break
		}
	}
	return found, refused, nil
}

func (f Finder) path(pid int, file ...string) string { return Path(f.Root, pid, file...) }

// Path returns the path of a file of a process in the procfs at root.
func Path(root string, pid int, file ...string) string {
	return filepath.Join(append([]string{root, strconv.Itoa(pid)}, file...)...)
}

// Self returns the number that this process has in the procfs at root, which may be that
// of a PID namespace above its own.
func Self(root string) (int, error) {
	target, err := os.Readlink(filepath.Join(root, "self"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(target)
}

// PIDs returns the numbers of all processes in the procfs at root, in no order.
func PIDs(root string) ([]int, error) {
	dir, err := os.Open(root)
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

// Stat is what a procfs tells of a process.
type Stat struct {
	Parent int
	Start  uint64 // in clock ticks after boot: no later process with the number has the same
}

// ReadStat reads it from the procfs at root.
func ReadStat(root string, pid int) (Stat, error) {
	path := Path(root, pid, "stat")
	data, err := os.ReadFile(path)
	if err != nil {
		return Stat{}, err
	}
	// The name, in parentheses, may contain anything. The parent is the second field after
	// it, and the start the 20th.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return Stat{}, fmt.Errorf("decode %s: got %d fields after the name, want 20", path, len(fields))
	}
	parent, err1 := strconv.Atoi(fields[1])
	start, err2 := strconv.ParseUint(fields[19], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return Stat{}, fmt.Errorf("decode %s: %w", path, err)
	}
	return Stat{parent, start}, nil
}

// SPDX-License-Identifier: Apache-2.0

package proc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// podCgroup matches the part of a cgroup's path that is a pod's. The cgroupfs
// driver of the kubelet writes pod<uid>, its systemd driver
// kubepods-burstable-pod<uid>.slice with underscores in the UID, and a runtime
// that is not told of systemd takes that with its own suffix for a name. The UID
// of a static pod may be a hash.
var podCgroup = regexp.MustCompile(
	`^(?:.*-)?pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice(?::.*)?)?$`)

// podPart returns the UID of the pod that a cgroup's path names, and the path above
// that part; "" if it names none. The outermost match counts: a container that may
// make cgroups can name them as it likes, but only below its own.
func podPart(path string) (uid, parent string) {
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if match := podCgroup.FindStringSubmatch(part); match != nil {
			return strings.ReplaceAll(match[1], "_", "-"), strings.Join(parts[:i], "/")
		}
	}
	return "", ""
}

// mount is a mount of a hierarchy of cgroups.
type mount struct {
	// root is the cgroup that is to be seen at dir.
	root, dir string
	version1  bool
	// options are those of the hierarchy; they name the controllers of one of version 1.
	options []string
}

// mounts are those of the agent and of the node.
type mounts []mount

// unescape undoes what the kernel does to paths in mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// readMounts reads the agent's own mounts, and those of the node's first process: a
// container need not have all hierarchies. What cannot be read shows nothing.
func (f Finder) readMounts() mounts {
	var all mounts
	for _, process := range []string{"self", "1"} {
		data, _ := os.ReadFile(filepath.Join(f.Root, process, "mountinfo"))
		for line := range strings.Lines(string(data)) {
			// There may be optional fields before the dash.
			first, second, _ := strings.Cut(line, " - ")
			own, super := strings.Fields(first), strings.Fields(second)
			if len(own) < 5 || len(super) < 3 || super[0] != "cgroup" && super[0] != "cgroup2" {
				continue
			}
			all = append(all, mount{
				root:     unescape.Replace(own[3]),
				dir:      filepath.Join(f.Root, process, "root", unescape.Replace(own[4])),
				version1: super[0] == "cgroup",
				options:  strings.Split(super[2], ","),
			})
		}
	}
	return all
}

// shows tells whether the hierarchy with these controllers, in the words of a
// process' cgroup file, is the one that is mounted.
func (m mount) shows(controllers string) bool {
	if controllers == "" || !m.version1 {
		return controllers == "" && !m.version1
	}
	for name := range strings.SplitSeq(controllers, ",") {
		if !slices.Contains(m.options, name) {
			return false
		}
	}
	return true
}

// dirs returns the directories from that of the mount down to the cgroup's. A cgroup
// that is not below the mount's root has none.
func (m mount) dirs(cgroup string) []string {
	rest, ok := cgroup, true
	if m.root != "/" {
		rest, ok = strings.CutPrefix(cgroup, m.root)
	}
	if !ok || rest != "" && rest[0] != '/' {
		return nil
	}
	dirs := []string{m.dir}
	for part := range strings.SplitSeq(strings.TrimPrefix(rest, "/"), "/") {
		// The names of cgroups above the root of the namespace are not told.
		if part == ".." {
			return nil
		}
		if part != "" {
			dirs = append(dirs, filepath.Join(dirs[len(dirs)-1], part))
		}
	}
	return dirs
}

// checkMaker returns an error unless root alone can have made what is in the cgroup.
// A user of the node may have a part of the hierarchy, such as that of his systemd,
// and names what he makes there as he likes; its directory is his, or open to others
// by its mode. What a kubelet makes lies below root's alone. The pod's own cgroup
// does not matter: a runtime may give it to the user whom a container has for root.
//
// A cgroup that no mount shows does not count either: then the pod stays on TCP, where
// another one's process would have its network namespace enrolled.
func (all mounts) checkMaker(controllers, cgroup string) error {
	for _, m := range all {
		dirs := m.dirs(cgroup)
		if !m.shows(controllers) || dirs == nil {
			continue
		}
		// Another mount may cover this one, or the agent have no access.
		if refusal, err := checkOwners(dirs); err == nil {
			return refusal
		}
	}
	return fmt.Errorf("no mount shows who made cgroup %q", cgroup)
}

// checkOwners returns why others than root may make directories in one of dirs. An error
// means that this is not known.
func checkOwners(dirs []string) (refusal, err error) {
	for _, dir := range dirs {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return nil, err
		}
		// The agent is root.
		if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
			refusal = fmt.Errorf("others than root may make cgroups in %s: its owner is %d, its mode %#o", dir, st.Uid, st.Mode&0o7777)
			break
		}
	}
	return refusal, nil
}

// pod returns that of the wanted pods that a process belongs to by the content of its
// cgroup file, or "". Each line is a hierarchy, "0::/path" that of cgroup2. With an error
// the process is in a cgroup of the pod's name, which is not the pod's.
func (all mounts) pod(content string, wanted map[string]bool) (uid string, err error) {
	for line := range strings.Lines(content) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) < 3 {
			continue
		}
		named, parent := podPart(fields[2])
		if !wanted[named] {
			continue
		}
		if err = all.checkMaker(fields[1], parent); err == nil {
			return named, nil
		}
		uid = named
	}
	return uid, err
}

// inNode calls do in the cgroup namespace of the node's first process: the kernel tells
// paths of cgroups as the reader's namespace sees them, and a container's has no names
// for what is above its own cgroup. Where the node's cannot be entered, do is called in
// the own one: that may be the same, and if not, no mount shows such a path.
func (f Finder) inNode(do func() error) (err error) {
	node, err := os.Open(f.path(1, "ns", "cgroup"))
	if err != nil {
		return do()
	}
	defer node.Close()
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/cgroup")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if unix.Setns(int(node.Fd()), unix.CLONE_NEWCGROUP) != nil {
		runtime.UnlockOSThread()
		return do()
	}
	defer func() {
		if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWCGROUP); back != nil {
			// The thread stays locked, so that nobody else meets the namespace.
			err = errors.Join(err, fmt.Errorf("return to the own cgroup namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return do()
}

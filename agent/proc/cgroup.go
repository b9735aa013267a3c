// SPDX-License-Identifier: Apache-2.0

// Which pod a cgroup belongs to, and whether the kubelet has made it.

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

// podCgroup matches the part of a cgroup's path that names a pod. The cgroupfs
// driver of the kubelet writes pod<uid>, its systemd driver
// kubepods-burstable-pod<uid>.slice with underscores in the UID, and a runtime that
// does not know of the systemd driver uses the latter as a directory name, with a
// suffix of its own. The UID of a static pod may be a hash.
var podCgroup = regexp.MustCompile(
	`^(?:.*-)?pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice(?::.*)?)?$`)

// podPart returns the UID of the pod that a cgroup's path names, and the path above
// that part, or "" if it names none. The outermost match counts: a container that
// may make cgroups can name them as it likes, but only below its own.
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
	// root is the cgroup that is mounted at dir.
	root, dir string
	version1  bool
	// options are the hierarchy's mount options; for version 1 they name its
	// controllers.
	options []string
}

// mounts are the cgroup mounts of the agent and of the node.
type mounts []mount

// unescape undoes the kernel's escapes of paths in mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// readMounts reads the agent's own mounts and those of the node's first process,
// since a container need not have all hierarchies. It skips what cannot be read.
func (f Finder) readMounts() mounts {
	var all mounts
	for _, process := range []string{"self", "1"} {
		data, _ := os.ReadFile(filepath.Join(f.Root, process, "mountinfo"))
		for line := range strings.Lines(string(data)) {
			// Optional fields may come before the dash.
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

// shows reports whether this is a mount of the hierarchy with these controllers, as
// a process's cgroup file lists them.
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

// dirs returns the directories from the mount point down to the cgroup's, or none if
// the cgroup is not below the mount's root.
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
		// The kernel does not show the names of cgroups above the root of
		// the namespace.
		if part == ".." {
			return nil
		}
		if part != "" {
			dirs = append(dirs, filepath.Join(dirs[len(dirs)-1], part))
		}
	}
	return dirs
}

// checkMaker returns an error unless only root can have made the cgroup. Hazard: a
// user of the node may own a part of the hierarchy, such as that of his systemd, and
// name a cgroup there like a pod's. Rule: all directories above the cgroup must
// belong to root and be writable for nobody else, as above those that a kubelet
// makes. The pod's own directory does not matter: a runtime may give it to the user
// that is root in a container.
//
// A cgroup that no mount shows does not count either. The pod then stays on TCP, which
// is better than to enrol the network namespace of a foreign process.
func (all mounts) checkMaker(controllers, cgroup string) error {
	for _, m := range all {
		dirs := m.dirs(cgroup)
		if !m.shows(controllers) || dirs == nil {
			continue
		}
		// Try the next mount: another one may cover this one, or the agent
		// have no access.
		if refusal, err := checkOwners(dirs); err == nil {
			return refusal
		}
	}
	return fmt.Errorf("no mount shows who made cgroup %q", cgroup)
}

// checkOwners returns a refusal if others than root may make directories in one of dirs,
// and an error if it cannot find out.
func checkOwners(dirs []string) (refusal, err error) {
	for _, dir := range dirs {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return nil, err
		}
		// The agent runs as root.
		if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
			refusal = fmt.Errorf("others than root may make cgroups in %s: its owner is %d, its mode %#o", dir, st.Uid, st.Mode&0o7777)
			break
		}
	}
	return refusal, nil
}

// pod returns the UID of the wanted pod that a process belongs to, by the content of its
// cgroup file, or "". Each line is a hierarchy; "0::/path" is cgroup2. With an error, the
// process is in a cgroup that has the pod's name but does not count.
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

// inNode calls do in the cgroup namespace of the node's first process. The kernel shows
// paths of cgroups relative to the reader's namespace, and a container's has no names
// for what is above its own cgroup. If the node's cannot be entered, do runs in this
// process's own: that may be the same, and if it is not, no mount shows such a path.
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
			// The thread stays locked, so that no other goroutine runs in the
			// namespace.
			err = errors.Join(err, fmt.Errorf("return to the own cgroup namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return do()
}

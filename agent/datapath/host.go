// SPDX-License-Identifier: Apache-2.0

// What the host has to offer: a cgroup2, a bpffs, cookies of network namespaces.

package datapath

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
)

// ErrNoCgroup2 says that a directory is in no cgroup2, or that there is none.
var ErrNoCgroup2 = errors.New("no cgroup2 file system")

// findCgroup returns dir if it is in a cgroup2, and the first cgroup2 mount of
// /proc/mounts where dir is empty.
func findCgroup(dir string) (string, error) {
	if dir == "" {
		mounts, err := os.Open("/proc/mounts")
		if err != nil {
			return "", fmt.Errorf("look for cgroup2: %w", err)
		}
		defer mounts.Close()
		for lines := bufio.NewScanner(mounts); lines.Scan(); {
			if fields := strings.Fields(lines.Text()); len(fields) > 2 && fields[2] == "cgroup2" {
				return fields[1], nil
			}
		}
		return "", fmt.Errorf("look for cgroup2 in /proc/mounts: %w: mount one or name a directory of it", ErrNoCgroup2)
	}
	if magic, err := filesystem(dir); err != nil {
		return "", fmt.Errorf("look at cgroup %s: %w", dir, err)
	} else if magic != unix.CGROUP2_SUPER_MAGIC {
		return "", fmt.Errorf("cgroup %s: %w; /proc/mounts says where one is", dir, ErrNoCgroup2)
	}
	return dir, nil
}

// bpffsPlace is the directory of sysfs that is made for a bpffs.
const bpffsPlace = "/sys/fs/bpf"

// ensureBPFFS makes dir, mounts a bpffs on it unless it is in one, and reports
// whether it has mounted. A mount hides what is in the directory, so it is made only
// on bpffsPlace, or on an empty directory below that.
func ensureBPFFS(dir string) (mounted bool, err error) {
	dir = filepath.Clean(dir)
	there, err := isBPFFS(nearest(dir))
	if err != nil {
		return false, err
	}
	if !there && dir != bpffsPlace && !strings.HasPrefix(dir, bpffsPlace+"/") {
		return false, fmt.Errorf("mount a bpffs on %s: accepted are %s and empty directories below it, as a mount hides what is there: "+
			"give --pin-dir (in the chart: agent.pinDir) a directory there, such as %s, or mount a bpffs on %[1]s by other means", dir, bpffsPlace, api.PinDir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, fmt.Errorf("make %s: %w", dir, err)
	}
	if there, err := isBPFFS(dir); err != nil || there {
		return false, err
	}
	if target, err := filepath.EvalSymlinks(dir); err != nil || target != dir {
		return false, errors.Join(fmt.Errorf("mount a bpffs on %s: it is a link to %s, which is not in a bpffs; accepted is a directory", dir, target), err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, fmt.Errorf("mount a bpffs on %s: %w", dir, err)
	}
	if len(entries) > 0 {
		return false, fmt.Errorf("mount a bpffs on %s: accepted is an empty directory, and it holds %s, which would be hidden: "+
			"give --pin-dir (in the chart: agent.pinDir) another one", dir, entries[0].Name())
	}
	if err := unix.Mount("bpffs", dir, "bpf", 0, "mode=0700"); err != nil {
		return false, fmt.Errorf("mount a bpffs on %s: %w", dir, err)
	}
	return true, nil
}

// nearest returns dir, or the last directory above it that is there.
func nearest(dir string) string {
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func isBPFFS(dir string) (bool, error) {
	magic, err := filesystem(dir)
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", dir, err)
	}
	return magic == unix.BPF_FS_MAGIC, nil
}

// MountBPFFS makes sure that dir is in a bpffs in the mount namespace at the given
// path, such as /proc/1/ns/mnt, and reports whether it has mounted one. In a
// container's own namespace the mount, and all pins in it, would end with the
// container.
func MountBPFFS(namespace, dir string) (mounted bool, err error) {
	f, err := os.Open(namespace)
	if err != nil {
		return false, fmt.Errorf("open mount namespace: %w", err)
	}
	defer f.Close()
	onLostThread(func() {
		// A thread that shares its working directory with others cannot change its mount namespace.
		if err = unix.Unshare(unix.CLONE_FS); err != nil {
			err = fmt.Errorf("unshare the working directory: %w", err)
			return
		}
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNS); err != nil {
			err = fmt.Errorf("enter mount namespace %s: %w", namespace, err)
			return
		}
		mounted, err = ensureBPFFS(dir)
	})
	return mounted, err
}

// onLostThread runs f on a thread that ends with f, so that f may change its
// namespaces. It is never the main thread: Go does not end that one, and /proc/self
// shows its namespaces.
func onLostThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked, unless on the main thread
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			onLostThread(f)
			return
		}
		f()
	}()
	<-done
}

// filesystem returns the magic number of the file system that holds path.
func filesystem(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Clean(path), &st); err != nil {
		return 0, err
	}
	return int64(st.Type), nil // 32 bits wide on some architectures
}

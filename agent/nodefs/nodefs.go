// SPDX-License-Identifier: Apache-2.0

// Package nodefs reads files of the node by a path that leads to its root directory,
// such as /proc/1/root. It follows links as a process of the node does: one that begins
// with a slash starts at that root, and none leads out of it.
package nodefs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Root is a path that leads to a root directory.
type Root string

// MaxFile is how much ReadFile reads of a file, far above the size of any configuration.
const MaxFile = 4 << 20

// Open opens a file or a directory of the node. With unix.O_PATH it works for everything
// that is there, and the file can only be looked at.
func (r Root) Open(path string, flags int) (*os.File, error) {
	root, err := os.Open(string(r))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{
		Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// ReadFile returns the start of a file of the node, which is all of it up to MaxFile.
func (r Root) ReadFile(path string) ([]byte, error) {
	// A pipe must not block.
	f, err := r.Open(path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxFile))
}

// ReadDir returns the names in a directory of the node, sorted.
func (r Root) ReadDir(path string) ([]string, error) {
	f, err := r.Open(path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	slices.Sort(names)
	return names, nil
}

// Stat returns what is at a path of the node.
func (r Root) Stat(path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	f, err := r.Open(path, unix.O_PATH)
	if err != nil {
		return st, err
	}
	defer f.Close()
	return st, unix.Fstat(int(f.Fd()), &st)
}

// ReadOnly reports whether a path of the node is on a file system that is mounted
// read-only there.
func (r Root) ReadOnly(path string) (bool, error) {
	f, err := r.Open(path, unix.O_PATH)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, err
	}
	return st.Flags&unix.ST_RDONLY != 0, nil
}

// Resolve returns the path without links that leads to what is at a path of the node, for
// whoever sees the node at r.
func (r Root) Resolve(path string) (string, error) {
	root, err := os.Open(string(r))
	if err != nil {
		return "", err
	}
	defer root.Close()
	f, err := r.Open(path, unix.O_PATH)
	if err != nil {
		return "", err
	}
	defer f.Close()
	top, err1 := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", root.Fd()))
	at, err2 := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	return filepath.Join(string(r), strings.TrimPrefix(at, top)), nil
}

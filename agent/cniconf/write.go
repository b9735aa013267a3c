// SPDX-License-Identifier: Apache-2.0

// Files that are written in one step, and deleted.

package cniconf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// replace writes data to a file, unless that has changed since it was read.
func replace(f file, data []byte) error {
	if err := unchanged(f); err != nil {
		return err
	}
	path, err := linkTarget(f.path)
	if err != nil {
		return err
	}
	return write(path, data, path)
}

// linkTarget returns the path of the file that path leads to: path itself may be a symbolic
// link, which stays. The directories are left as they are: /proc/PID/root among them is a
// link to "/" for who reads it, and only the kernel follows it to another root.
func linkTarget(path string) (string, error) {
	const most = 40 // as the kernel (path_resolution(7))
	for range most {
		to, err := os.Readlink(path)
		switch {
		case errors.Is(err, unix.EINVAL):
			return path, nil
		case err != nil:
			return "", err
		case filepath.IsAbs(to):
			path = to
		default:
			path = filepath.Dir(path) + "/" + to // not cleaned: ".." is above what the directory leads to
		}
	}
	return "", fmt.Errorf("follow links of %s: %w", path, unix.ELOOP)
}

// unchanged returns an error if the file has changed since it was read. Call it
// right before the write: what its owner writes in between is lost, since there is
// no lock that owners know. A file that was not there has nil data.
func unchanged(f file) error {
	now, err := os.ReadFile(f.path)
	if f.data == nil && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && !bytes.Equal(now, f.data) {
		err = fmt.Errorf("%s was changed meanwhile", f.path)
	}
	return err
}

// write replaces or makes the file at path in one step, with the mode and the
// owner of the file at like. The temporary file has to be in the same directory
// not only for the rename: containerd (1.7) reads its configuration again when a
// name goes away from the directory, not when one appears in it.
func write(path string, data []byte, like string) error {
	return writeBy(path+tempExtension, path, data, like)
}

func writeBy(temp, path string, data []byte, like string) error {
	info, err := os.Stat(like)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && err == nil {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(info.Mode())
	}
	return publish(temp, finish(f, err), path)
}

// finish closes a file, whose data are on disk then unless err says that it is
// not complete.
func finish(f *os.File, err error) error {
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// publish renames a finished file to path, or deletes it after an error.
func publish(temp string, err error, path string) error {
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func syncDirIfThere(dir string) error {
	if _, err := os.Stat(dir); err != nil {
		return ignoreMissing(err)
	}
	return syncDir(dir)
}

// sweep deletes all files of a directory whose names end with the extension.
func sweep(dir, extension string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) == extension {
			err = errors.Join(err, removeIfThere(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

// Package overlay makes programs known to this process, and to all that it starts,
// that fetch.sh has unpacked, and an account for them. Both are mounts of the process's
// own mount namespace, which sandbox.Main gives it.
package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The account that programs run as: several of them refuse to be root, or would
// want users and directories that only an installation makes.
const (
	AccountName = "podshunt-apps"
	AccountID   = 64999
)

// Enter lays what is unpacked in the directories over the machine's own, where many
// programs know that they are installed: in the path, the first of them goes before the
// next. A directory that is missing has nothing. The caller calls leave at the end.
func Enter(roots ...string) (leave func() error, err error) {
	var covered []string
	uncover := func() (err error) {
		for _, dir := range covered {
			err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
		}
		return err
	}
	for _, dir := range []string{"/etc", "/usr"} {
		var layers []string
		for _, root := range roots {
			layer, err := filepath.Abs(root + dir)
			if err != nil {
				return nil, errors.Join(err, uncover())
			}
			if _, err := os.Stat(layer); !errors.Is(err, fs.ErrNotExist) {
				layers = append(layers, layer)
			}
		}
		if layers == nil {
			continue
		}
		lower := strings.Join(append(layers, dir), ":")
		if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+lower); err != nil {
			return nil, errors.Join(fmt.Errorf("lay %s over %s: %w: is the module overlay loaded?", strings.Join(layers, " and "), dir, err), uncover())
		}
		covered = append(covered, dir)
	}
	// The first two, as interpreters elsewhere lack what the unpacked ones have.
	dirs := []string{"/usr/sbin", "/usr/bin"}
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/lib/jvm/java-17-*/bin"} {
		found, _ := filepath.Glob(pattern) // the patterns are right
		dirs = append(dirs, found...)
	}
	if err := os.Setenv("PATH", strings.Join(append(dirs, os.Getenv("PATH")), ":")); err != nil {
		return nil, errors.Join(err, uncover())
	}
	remove, err := addAccount()
	if err != nil {
		return nil, errors.Join(err, uncover())
	}
	return func() error { return errors.Join(remove(), uncover()) }, nil
}

// addAccount adds the account to the /etc/passwd that this run sees.
func addAccount() (remove func() error, err error) {
	const passwd = "/etc/passwd"
	text, err := os.ReadFile(passwd)
	if err != nil {
		return nil, err
	}
	line := fmt.Sprintf("%s:x:%d:%d::/nonexistent:/bin/sh\n", AccountName, AccountID, AccountID)
	file, err := os.CreateTemp("", "podshunt-passwd-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(file.Name())) }()
	_, err = file.Write(append(bytes.TrimRight(text, "\n"), "\n"+line...))
	err = errors.Join(err, file.Chmod(0o644), file.Close())
	if err == nil {
		err = unix.Mount(file.Name(), passwd, "", unix.MS_BIND, "")
	}
	if err != nil {
		return nil, fmt.Errorf("add an account to %s: %w", passwd, err)
	}
	return func() error { return unix.Unmount(passwd, unix.MNT_DETACH) }, nil
}

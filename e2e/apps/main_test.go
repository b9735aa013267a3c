// SPDX-License-Identifier: Apache-2.0

// Package apps_test runs real programs between pods: first on plain TCP, then
// with the shortcut. Their answers have to be the same, and the agent's counters
// say which way the bytes took.
package apps_test

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// The account that programs run as: several of them refuse to be root, or would
// want users and directories that only an installation makes.
const (
	accountName = "podshunt-apps"
	accountID   = 64999
)

func TestMain(m *testing.M) {
	flag.Parse()
	if *list {
		printPrograms()
		os.Exit(0)
	}
	os.Exit(sandbox.Main(func() int {
		leave, err := prepare()
		if err != nil {
			fmt.Fprintln(os.Stderr, "apps:", err)
			return 1
		}
		status := m.Run()
		if err := leave(); err != nil {
			fmt.Fprintln(os.Stderr, "apps:", err)
			return 1
		}
		return status
	}))
}

// prepare makes the unpacked programs and the account known to all processes of
// this run. Both are mounts of the process's own, which end with it.
func prepare() (leave func() error, err error) {
	if os.Geteuid() != 0 {
		return func() error { return nil }, nil
	}
	root, err := filepath.Abs(cmp.Or(os.Getenv("PODSHUNT_APPS"), "../../.cache/apps"))
	if err != nil {
		return nil, err
	}
	// Many programs know where they are installed, so the unpacked ones lie over the
	// machine's own.
	var covered []string
	uncover := func() (err error) {
		for _, dir := range covered {
			err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
		}
		return err
	}
	for _, dir := range []string{"/etc", "/usr"} {
		if _, err := os.Stat(root + dir); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, fmt.Sprintf("lowerdir=%s%s:%[2]s", root, dir)); err != nil {
			return nil, errors.Join(fmt.Errorf("lay %s over %s: %w: is the module overlay loaded?", root, dir, err), uncover())
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
	line := fmt.Sprintf("%s:x:%d:%d::/nonexistent:/bin/sh\n", accountName, accountID, accountID)
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

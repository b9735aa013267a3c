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
// this run. Both end with it: the environment is the process's own, and so are
// the mounts.
func prepare() (leave func() error, err error) {
	if os.Geteuid() != 0 {
		return func() error { return nil }, nil
	}
	root, err := filepath.Abs(cmp.Or(os.Getenv("PODSHUNT_APPS"), "../../.cache/apps"))
	if err != nil {
		return nil, err
	}
	for variable, patterns := range map[string][]string{
		"PATH":            {root + "/usr/bin", root + "/usr/sbin", root + "/usr/lib/postgresql/*/bin", "/usr/sbin", "/usr/lib/postgresql/*/bin"},
		"LD_LIBRARY_PATH": {root + "/usr/lib/*-linux-gnu*", root + "/lib/*-linux-gnu*"},
	} {
		var dirs []string
		for _, pattern := range patterns {
			found, err := filepath.Glob(pattern)
			if err != nil {
				return nil, err
			}
			dirs = append(dirs, found...)
		}
		if value := os.Getenv(variable); value != "" {
			dirs = append(dirs, value)
		}
		if err := os.Setenv(variable, strings.Join(dirs, ":")); err != nil {
			return nil, err
		}
	}
	return addAccount()
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

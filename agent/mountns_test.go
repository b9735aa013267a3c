// SPDX-License-Identifier: Apache-2.0

package main

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// inMountNamespace calls f in a mount namespace of its own, where it may make directories
// read-only. The namespace ends with f's thread.
func inMountNamespace(t testing.TB, f func(mountReadOnly func(dir string) error) error) {
	t.Helper()
	err := onLostThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		return f(func(dir string) error {
			if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			return unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
		})
	})
	if err != nil {
		t.Error(err)
	}
}

// onLostThread runs f on a thread that ends with f, so that f may change what its thread has.
// It is never the main thread: Go does not end that one, and /proc/self shows what it has.
func onLostThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		defer close(done)      // also if f ends the test
		runtime.LockOSThread() // and never unlocked, unless on the main thread
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- onLostThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}

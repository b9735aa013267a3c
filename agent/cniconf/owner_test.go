// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestDirectoriesOfOthers: with exactly the capabilities of the chart, the agent installs in
// directories that belong to another user, and leaves that user its files.
func TestDirectoriesOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	capabilities := chartCapabilities(t)
	for _, mode := range []os.FileMode{0o700, 0o755} {
		t.Run(mode.String(), func(t *testing.T) {
			ins := newTestInstallerOf(t, mode)
			before := withoutTimes(snapshot(t, ins.cfg.ConfDir))
			withCapabilities(t, capabilities, func() {
				ins.Reconcile()
				wantState(t, ins, "10-a-podshunt.conflist", "")
			})
			after := withoutTimes(snapshot(t, ins.cfg.ConfDir))
			lone, made := before["10-a.conf"], after["10-a-podshunt.conflist"]
			if lone != after["10-a.conf"] || made.Uid != lone.Uid || made.Gid != lone.Gid || made.Mode != lone.Mode {
				t.Errorf("got %+v, want the list beside to be the owner's, as %+v", after, lone)
			}

			// The network's agent writes a list that comes first.
			own(t, ins.conf("05-b.conflist"), otherList)
			withList := withoutTimes(snapshot(t, ins.cfg.ConfDir))
			writeFile(t, ins.cfg.Plugin, testPlugin+"# new\n")
			withCapabilities(t, capabilities, func() {
				ins.Reconcile()
				wantState(t, ins, "05-b.conflist", "")
			})
			got := withoutTimes(snapshot(t, ins.cfg.ConfDir))["05-b.conflist"]
			want := withList["05-b.conflist"]
			want.Content = got.Content
			if got != want || !strings.Contains(got.Content, "podshunt") {
				t.Errorf("got %+v, want our entry in the owner's file, %+v", got, want)
			}

			withCapabilities(t, capabilities, func() {
				if _, err := ins.Uninstall(); err != nil {
					t.Error(err)
				}
			})
			delete(withList, "10-a-podshunt.conflist")
			if diff := cmp.Diff(withList, withoutTimes(snapshot(t, ins.cfg.ConfDir))); diff != "" {
				t.Errorf("uninstalled (-want +got):\n%s", diff)
			}
		})
	}
	// None of the three is there in vain.
	for _, name := range []string{"DAC_OVERRIDE", "CHOWN", "FOWNER"} {
		t.Run("without "+name, func(t *testing.T) {
			ins := newTestInstallerOf(t, 0o755)
			without := slices.DeleteFunc(slices.Clone(capabilities), func(c string) bool { return c == name })
			if len(without) != len(capabilities)-1 {
				t.Fatalf("the chart has %v, want %s among them", capabilities, name)
			}
			withCapabilities(t, without, func() { ins.Reconcile() })
			if state := ins.State(); state.Installed || !strings.Contains(state.Error, "denied") && !strings.Contains(state.Error, "not permitted") {
				t.Errorf("got state %+v, want an error", state)
			}
		})
	}
}

const otherUser = 998

// newTestInstallerOf has directories of another user, and a lone configuration.
func newTestInstallerOf(t *testing.T, mode os.FileMode) *Installer {
	t.Helper()
	ins := newTestInstaller(t)
	if err := os.Chmod(ins.cfg.Plugin, 0o755); err != nil {
		t.Fatal(err)
	}
	own(t, ins.conf("10-a.conf"), testLone)
	for _, dir := range []string{ins.cfg.ConfDir, ins.cfg.BinDir} {
		if err := errors.Join(os.Chown(dir, otherUser, otherUser), os.Chmod(dir, mode)); err != nil {
			t.Fatal(err)
		}
	}
	return ins
}

// own writes a file of the other user, with a mode that no umask makes.
func own(t testing.TB, path, content string) {
	t.Helper()
	writeFile(t, path, content)
	if err := errors.Join(os.Chown(path, otherUser, otherUser), os.Chmod(path, 0o604)); err != nil {
		t.Fatal(err)
	}
}

// chartCapabilities returns what the chart adds for the agent's container if it installs the
// plugin.
func chartCapabilities(t testing.TB) (names []string) {
	t.Helper()
	template, err := os.ReadFile(filepath.Join("../../charts/podshunt/templates/daemonset.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, agent, _ := strings.Cut(string(template), "- name: agent\n")
	_, added, _ := strings.Cut(agent, "add:\n")
	added, _, _ = strings.Cut(added, "resources:")
	for _, m := range regexp.MustCompile(`(?m)^ +- ([A-Z_]+) #`).FindAllStringSubmatch(added, -1) {
		names = append(names, m[1])
	}
	if len(names) == 0 {
		t.Fatal("found no capabilities in the chart")
	}
	return names
}

// withCapabilities calls f on a thread that has these capabilities only, and can get no
// other.
func withCapabilities(t testing.TB, names []string, f func()) {
	t.Helper()
	numbers := map[string]uint{
		"CHOWN": unix.CAP_CHOWN, "DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "FOWNER": unix.CAP_FOWNER,
		"NET_ADMIN": unix.CAP_NET_ADMIN, "SYS_PTRACE": unix.CAP_SYS_PTRACE, "SYS_ADMIN": unix.CAP_SYS_ADMIN,
		"PERFMON": unix.CAP_PERFMON, "BPF": unix.CAP_BPF,
	}
	var set uint64
	for _, name := range names {
		number, ok := numbers[name]
		if !ok {
			t.Fatalf("the test does not know the capability %s", name)
		}
		set |= 1 << number
	}
	err := onLostThread(func() error {
		for number := uintptr(0); number <= unix.CAP_LAST_CAP; number++ {
			if set&(1<<number) != 0 {
				continue
			}
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, number, 0, 0, 0); err != nil {
				return fmt.Errorf("drop capability %d: %w", number, err)
			}
		}
		data := [2]unix.CapUserData{
			{Effective: uint32(set), Permitted: uint32(set)},
			{Effective: uint32(set >> 32), Permitted: uint32(set >> 32)},
		}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
			return fmt.Errorf("set capabilities: %w", err)
		}
		f()
		return nil
	})
	if err != nil {
		t.Fatal(err)
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

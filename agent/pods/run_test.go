// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/agent/watch"
	"github.com/podshunt/podshunt/api"
)

// never is for what must not have happened by a pass.
const never = 24 * time.Hour

// mustRun runs the reconciler, and its source if that is a file, until the test ends.
func (f *fixture) mustRun(t testing.TB, interval time.Duration) {
	t.Helper()
	f.interval = interval
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	running := 1
	if file, ok := f.cfg.Source.(*File); ok {
		running++
		file.interval = interval
		go func() { done <- file.Run(ctx, f.cfg.Log) }()
	}
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		for range running {
			select {
			case err := <-done:
				wantDiff(t, "Run", nil, err)
			case <-time.After(time.Minute):
				t.Fatal("Run does not return")
			}
		}
	})
}

// waitFor waits until ok is true of the reconciler.
func (f *fixture) waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		f.mu.Lock()
		done := ok()
		f.mu.Unlock()
		if done {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not seen; pods are %v", what, f.states())
		}
	}
}

// waitStates waits for a pod's state as of states, "" for a pod that is not there.
func (f *fixture) waitState(t testing.TB, what, pod, want string) {
	t.Helper()
	f.waitFor(t, what, func() bool {
		got := ""
		for _, p := range f.pods {
			if p.Pod.Name == pod {
				got = string(p.State)
			}
		}
		return got == want
	})
}

// leave writes an attachment's file as the plugin does.
func (f *fixture) leave(t testing.TB, a api.Attachment) {
	t.Helper()
	data, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(f.cfg.Dir, a.FileName()), string(data))
}

// settled starts a fixture on the machine's clock whose reconciler has done all that there
// was to do, so that only an event makes it do more.
func settled(t testing.TB, interval time.Duration, change func(*Config, *fakeKernel)) *fixture {
	t.Helper()
	f := newFixture(t, func(cfg *Config, k *fakeKernel) {
		cfg.Now = time.Now
		if change != nil {
			change(cfg, k)
		}
	})
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	f.interval = interval
	f.Sync()
	f.mustRun(t, interval)
	return f
}

// Each change is in force by the event that tells of it.
func TestEvents(t *testing.T) {
	f := settled(t, never, nil)
	a := f.attachment(t, "a", 10)
	f.leave(t, a)
	f.waitState(t, "a file of the plugin", "a", "enrolled")

	write(t, f.podsFile, podsYAML("a shortcut=disabled"))
	f.waitState(t, "pods file replaced", "a", "out")
	if err := os.WriteFile(f.podsFile, []byte(podsYAML("a shortcut=enabled")), 0o600); err != nil {
		t.Fatal(err)
	}
	f.waitState(t, "pods file written in place", "a", "enrolled")
	if err := os.Remove(f.podsFile); err != nil {
		t.Fatal(err)
	}
	f.waitFor(t, "pods file deleted", func() bool { return errors.Is(f.sourceErr, os.ErrNotExist) })

	// As the kubelet keeps the files of a ConfigMap.
	dir := filepath.Dir(f.podsFile)
	for version, shortcut := range map[string]string{"1": "disabled", "2": "enabled"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version, "pods.yaml"), podsYAML("a shortcut="+shortcut))
	}
	point := func(version string) {
		t.Helper()
		if err := errors.Join(os.Symlink(version, filepath.Join(dir, "next")), os.Rename(filepath.Join(dir, "next"), filepath.Join(dir, "data"))); err != nil {
			t.Fatal(err)
		}
	}
	point("1")
	if err := os.Symlink("data/pods.yaml", f.podsFile); err != nil {
		t.Fatal(err)
	}
	f.waitState(t, "pods file behind a link", "a", "out")
	point("2")
	f.waitState(t, "link changed", "a", "enrolled")
	write(t, filepath.Join(dir, "2", "pods.yaml"), podsYAML("a shortcut=disabled"))
	f.waitState(t, "file behind the link changed", "a", "out")

	if err := os.Remove(filepath.Join(f.cfg.Dir, a.FileName())); err != nil {
		t.Fatal(err)
	}
	f.waitState(t, "file deleted", "a", "")
}

// What a source tells is in force at once.
func TestEventsOfSource(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	source.set(map[string]Intent{})
	f.mustPut(t, f.attachment(t, "a", 10))
	f.interval = never
	f.Sync()
	f.mustRun(t, never)
	source.set(map[string]Intent{"a": enabled(uid1)})
	f.waitState(t, "source", "a", "enrolled")
}

// The watch of a directory ends with it. It begins again when the directory is back.
func TestDirectoryReplaced(t *testing.T) {
	for _, tc := range []struct {
		name   string
		remove func(dir string) error
	}{
		{"deleted", os.RemoveAll},
		{"renamed", func(dir string) error { return os.Rename(dir, dir+".old") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := settled(t, never, nil)
			f.leave(t, f.attachment(t, "b", 11))
			f.waitState(t, "before", "b", "out")
			if err := tc.remove(f.cfg.Dir); err != nil {
				t.Fatal(err)
			}
			f.waitFor(t, "directory gone", func() bool { return f.faults["attachments"] != "" })
			if err := os.Mkdir(f.cfg.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
			f.leave(t, f.attachment(t, "a", 10))
			f.waitState(t, "after", "a", "enrolled")
			f.waitState(t, "after", "b", "")
			// And the new one is watched.
			f.waitFor(t, "directory back", func() bool { return f.faults["attachments"] == "" })
			f.leave(t, f.attachment(t, "c", 12))
			f.waitState(t, "in the new directory", "c", "out")
		})
	}
}

// Nothing tells that a directory above was replaced, or that a network namespace is
// gone: the next pass sees it, as it does what inotify had no room for.
func TestPass(t *testing.T) {
	f := settled(t, 20*time.Millisecond, func(cfg *Config, _ *fakeKernel) {
		cfg.Dir = filepath.Join(filepath.Dir(cfg.Dir), "run", "attachments")
	})
	f.leave(t, f.attachment(t, "b", 11))
	f.waitState(t, "watched", "b", "out")
	above := filepath.Dir(f.cfg.Dir)
	if err := errors.Join(os.Rename(above, above+".old"), os.MkdirAll(f.cfg.Dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	a := f.attachment(t, "a", 10)
	f.leave(t, a)
	f.waitState(t, "directory above replaced", "a", "enrolled")
	if err := os.Remove(a.Netns); err != nil {
		t.Fatal(err)
	}
	f.waitState(t, "network namespace gone", "a", "")
	f.mu.Lock()
	defer f.mu.Unlock()
	wantDiff(t, "enrolled", []uint64{}, f.kernel.enrolled)
}

// What is due at a time, or could not be done, needs neither an event nor a pass.
func TestOnTime(t *testing.T) {
	fault, redirects := errors.New("fault"), false
	f := settled(t, never, func(cfg *Config, k *fakeKernel) {
		k.enrolErr = fault
		cfg.Redirects = func(string) (bool, error) { return redirects, nil }
	})
	f.mustPut(t, f.attachment(t, "a", 10))
	f.waitState(t, "enrol fails", "a", "refused")
	f.mu.Lock()
	f.kernel.enrolErr = nil
	f.mu.Unlock()
	f.waitState(t, "tried again", "a", "enrolled")

	f.mu.Lock()
	redirects = true
	f.mu.Unlock()
	f.waitFor(t, "redirect seen", func() bool { return f.pods[0].Policy.Redirects })

	pause := func(d time.Duration) {
		write(t, f.podsFile, podsYAML("a shortcut=enabled paused-until="+time.Now().Add(d).Format(time.RFC3339Nano)))
	}
	pause(time.Hour)
	f.waitState(t, "pause", "a", "held")
	pause(time.Second)
	f.waitState(t, "end of the pause", "a", "enrolled")
	f.mu.Lock()
	defer f.mu.Unlock()
	wantDiff(t, "verdict", rule.Allow, f.kernel.rules[0].Verdict)
}

// A pod without an attachment is looked for until it is found.
func TestFoundOnTime(t *testing.T) {
	f, source := newClusterFixture(t, func(cfg *Config) { cfg.Now = time.Now })
	source.set(map[string]Intent{"a": enabled(uid1)})
	f.interval = never
	f.Sync()
	f.mustRun(t, never)
	f.process(t, 100, uid1, 10)
	f.waitState(t, "process", "a", "enrolled")
}

// Run rests as long as nothing is due.
func TestWait(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "a", 10))
	f.Sync()
	wantDiff(t, "nothing to do", passInterval, f.wait())

	write(t, f.podsFile, podsYAML("a shortcut=enabled paused-until=2026-01-31T18:00:03Z"))
	f.Sync()
	wantDiff(t, "paused", 3*time.Second, f.wait())
	f.now = f.now.Add(3 * time.Second)
	wantDiff(t, "overdue", watch.Settle, f.wait())
	f.onTime()
	wantDiff(t, "after the pause", f.interval, f.wait())

	f.kernel.enrolErr = errors.New("fault")
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b shortcut=enabled"))
	<-f.wake
	f.mustPut(t, f.attachment(t, "b", 11))
	wantDiff(t, "Run is told of a pod that needs it", 1, len(f.wake))
	var waits []time.Duration
	for range 7 {
		waits = append(waits, f.wait())
		f.now = f.now.Add(f.wait())
		f.onTime()
	}
	wantDiff(t, "tries", []time.Duration{
		tryAgain, 2 * tryAgain, 4 * tryAgain, 8 * tryAgain, 16 * tryAgain, 32 * tryAgain, passInterval,
	}, waits)
	f.kernel.enrolErr, f.kernel.policyErr = nil, errors.New("fault")
	f.Sync()
	wantDiff(t, "policy", policyRetry, f.wait())
	f.kernel.policyErr = nil
	f.now = f.now.Add(policyRetry)
	f.onTime()
	wantDiff(t, "all done", passInterval, f.wait())
	f.Stop("unloaded")
	wantDiff(t, "stopped", passInterval, f.wait())
}

// TestAlive: a Sync that does not end is seen, also by who does not wait for it.
func TestAlive(t *testing.T) {
	block, entered := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() { close(entered) })
	f := newFixture(t, func(c *Config, _ *fakeKernel) {
		c.NetnsCookie = func(path string) (uint64, error) {
			once()
			<-block
			return readCookie(path)
		}
	})
	f.Sync()
	alive := func(want bool) {
		t.Helper()
		if err := f.Alive(); (err == nil) != want {
			t.Errorf("got error %v, want alive %v", err, want)
		}
	}
	alive(true)
	f.now = f.now.Add(wedged)
	alive(true)
	f.now = f.now.Add(time.Second)
	alive(false)
	f.Sync()
	alive(true)

	a := f.attachment(t, "web", 100)
	go func() {
		// It hangs in the look at the network namespace, with the lock.
		if _, err := f.Put(a); err != nil {
			t.Error(err)
		}
	}()
	<-entered
	synced := make(chan struct{})
	go func() {
		f.Sync()
		close(synced)
	}()
	f.now = f.now.Add(wedged + time.Second)
	alive(false)
	close(block)
	select {
	case <-synced:
	case <-time.After(2 * time.Minute):
		t.Fatal("Sync does not end")
	}
	alive(true)
}

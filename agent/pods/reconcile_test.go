// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

func TestAdmission(t *testing.T) {
	const podsFile = "PODSFILE"
	for _, tc := range []struct {
		name     string
		podsFile string
		cookie   uint64
		change   func(*Config, *fakeKernel)
		want     api.Admission
		state    api.PodState
		calls    []string
	}{
		{
			name: "opted in", state: api.PodEnrolled, podsFile: podsYAML("web shortcut=enabled"),
			want: api.Admission{Enrolled: true}, calls: []string{"policy of 1", "enrol 10"},
		},
		{
			name: "paused", state: api.PodHeld, podsFile: podsYAML("web shortcut=enabled paused-until=2026-01-31T18:00:01Z"),
			want:  api.Admission{Enrolled: true, Message: "paused until 2026-01-31T18:00:01Z"},
			calls: []string{"policy of 1", "enrol 10"},
		},
		{
			name: "opted out", state: api.PodOut, podsFile: podsYAML("web shortcut=disabled"),
			want: api.Admission{Message: "not opted in by podshunt.io/shortcut"}, calls: []string{"policy of 0"},
		},
		{
			name: "not listed", state: api.PodOut, podsFile: podsYAML("other shortcut=enabled"),
			want: api.Admission{Message: "not opted in: no entry in " + podsFile}, calls: []string{"policy of 0"},
		},
		{
			name: "bad annotation", state: api.PodRefused, podsFile: podsYAML("web shortcut=yes"),
			want:  api.Admission{Message: `annotation podshunt.io/shortcut="yes": accepted are "enabled" and "disabled"`},
			calls: []string{"policy of 0"},
		},
		{
			name: "host network", state: api.PodRefused, podsFile: podsYAML("web shortcut=enabled"), cookie: 1,
			want:  api.Admission{Message: "it runs in the node's own network namespace (hostNetwork)"},
			calls: []string{"policy of 0"},
		},
		{
			name: "refused by hazard", state: api.PodRefused, podsFile: podsYAML("web shortcut=enabled"),
			change: func(cfg *Config, _ *fakeKernel) { cfg.Refused, cfg.Refusal = true, "hazard" },
			want:   api.Admission{Message: "hazard"}, calls: []string{"policy of 0"},
		},
		{
			name: "enrol fails", state: api.PodRefused, podsFile: podsYAML("web shortcut=enabled"),
			change: func(_ *Config, k *fakeKernel) { k.enrolErr = errors.New("map full") },
			want:   api.Admission{Message: "map full"}, calls: []string{"policy of 1", "policy of 0"},
		},
		{
			name: "no pods file yet", state: api.PodWaiting,
			want: api.Admission{Message: "waiting for the pods file: read pods file: stat " + podsFile + ": no such file or directory"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, tc.change)
			if tc.podsFile != "" {
				write(t, f.podsFile, tc.podsFile)
			}
			if tc.cookie == 0 {
				tc.cookie = 10
			}
			got := f.mustPut(t, f.attachment(t, "web", tc.cookie))
			got.Message = strings.ReplaceAll(got.Message, f.podsFile, podsFile)
			wantDiff(t, "admission", tc.want, got)
			wantDiff(t, "state", map[string]api.PodState{"web": tc.state}, f.codes())
			wantDiff(t, "calls", tc.calls, f.take())
		})
	}
}

// A connection is judged when it is made: the policy is there before the pod is enrolled.
// Where the pod cannot be enrolled, no policy stays, and none comes and goes with each
// try.
func TestPolicyComesBeforeThePod(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "a", 10))
	wantDiff(t, "calls", []string{"policy of 1", "enrol 10"}, f.take())

	f.kernel.enrolErr = errors.New("map full")
	f.mustPut(t, f.attachment(t, "b", 11))
	wantDiff(t, "calls of a pod that cannot be enrolled", []string{"policy of 4", "policy of 1"}, f.take())
	f.Sync()
	wantDiff(t, "calls of the next try", []string(nil), f.take())
	f.kernel.enrolErr = nil
	f.Sync()
	wantDiff(t, "calls when it can be", []string{"enrol 11", "policy of 4"}, f.take())
	wantDiff(t, "states", map[string]string{"a": "in", "b": "in"}, f.states())
}

// The cookie of a network namespace is read once. One that was replaced after that is
// seen all the same, and nobody is enrolled for it.
func TestNetnsReplacedBeforeEnrol(t *testing.T) {
	reads := 0
	f, source := newClusterFixture(t, func(cfg *Config) {
		cfg.NetnsCookie = func(path string) (uint64, error) {
			reads++
			return readCookie(path)
		}
	})
	source.set(map[string]Intent{"a": enabled(uid1)})
	f.mustPut(t, f.attachment(t, "a", 10))
	wantDiff(t, "reads of an ADD", 1, reads)
	f.take()

	// Nothing tells of the change; the pod asks for its part after that.
	source.set(map[string]Intent{"a": enabled(uid1), "b": {UIDs: []string{uid2}}})
	b := f.attachment(t, "b", 11)
	f.mustPut(t, b)
	f.cfg.Redirects = func(path string) (bool, error) {
		if path == b.Netns {
			write(t, b.Netns, "12")
		}
		return false, nil
	}
	source.set(map[string]Intent{"a": enabled(uid1), "b": enabled(uid2)})
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 4", "policy of 1"}, f.take())
	wantDiff(t, "states", map[string]string{
		"a": "in", "b": "out network namespace " + b.Netns + " was replaced meanwhile",
	}, f.states())
	f.Sync()
	wantDiff(t, "files after the next look", 1, f.files(t))
	wantDiff(t, "enrolled", []uint64{10}, f.kernel.enrolled)
}

func TestOptInAndOutAtRunTime(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML())
	f.mustPut(t, f.attachment(t, "client", 10))
	f.mustPut(t, f.attachment(t, "web", 11))
	f.take()

	write(t, f.podsFile, podsYAML("client shortcut=enabled", "web shortcut=enabled"))
	f.Sync()
	wantDiff(t, "states", map[string]string{"client": "in", "web": "in"}, f.states())
	calls := f.take()
	slices.Sort(calls[1:3])
	wantDiff(t, "calls", []string{"policy of 4", "enrol 10", "enrol 11"}, calls)

	f.Sync()
	wantDiff(t, "calls without a change", []string(nil), f.take())

	write(t, f.podsFile, podsYAML("client shortcut=enabled", "web shortcut=disabled"))
	f.Sync()
	wantDiff(t, "states", map[string]string{"client": "in", "web": "out not opted in by podshunt.io/shortcut"}, f.states())
	wantDiff(t, "calls: the policy is revoked before the release", []string{"policy of 1", "release 11"}, f.take())

	write(t, f.podsFile, podsYAML("client shortcut=enabled exclude-ports=80"))
	f.Sync()
	wantDiff(t, "calls after a change of ports", []string{"policy of 2"}, f.take())
}

func TestRestartKeepsPods(t *testing.T) {
	first := newFixture(t, nil)
	write(t, first.podsFile, podsYAML("client shortcut=enabled", "web shortcut=enabled"))
	first.mustPut(t, first.attachment(t, "client", 10))
	first.mustPut(t, first.attachment(t, "web", 11))

	f := newFixture(t, func(cfg *Config, k *fakeKernel) {
		cfg.Dir, cfg.Source = first.cfg.Dir, NewFile(first.podsFile)
		k.enrolled = []uint64{10, 11, 99}
	})
	f.Sync()
	calls := f.take()
	slices.Sort(calls[1:3])
	wantDiff(t, "calls", []string{"policy of 4", "enrol 10", "enrol 11", "release 99"}, calls)
	wantDiff(t, "states", map[string]string{"client": "in", "web": "in"}, f.states())
}

func TestRestartWithoutPodsFileKeepsAll(t *testing.T) {
	f := newFixture(t, func(_ *Config, k *fakeKernel) { k.enrolled = []uint64{10, 99} })
	f.mustPut(t, f.attachment(t, "web", 10))
	write(t, f.podsFile, "pods: {")
	f.Sync()
	wantDiff(t, "calls", []string(nil), f.take())
	if state := f.states()["web"]; !strings.HasPrefix(state, "in waiting for the pods file: ") || f.codes()["web"] != api.PodEnrolled {
		t.Errorf("got %q, want it enrolled and waiting", state)
	}
	if f.Snapshot().SourceError == nil {
		t.Error("got no source error, want one")
	}

	write(t, f.podsFile, podsYAML("web shortcut=enabled"))
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 1", "enrol 10", "release 99"}, f.take())
	wantDiff(t, "source error", nil, f.Snapshot().SourceError)
}

func TestFailedEnrolKeepsPodOfEarlierAgent(t *testing.T) {
	f := newFixture(t, func(_ *Config, k *fakeKernel) {
		k.enrolled = []uint64{10}
		k.enrolErr = errors.New("too many open files")
	})
	write(t, f.podsFile, podsYAML("web shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "web", 10))
	wantDiff(t, "calls", []string{"policy of 1"}, f.take())
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
	if !strings.Contains(f.log.String(), "too many open files") {
		t.Errorf("the log does not tell of the fault:\n%s", f.log.String())
	}
}

func TestRefusalReleasesPodsOfEarlierAgent(t *testing.T) {
	f := newFixture(t, func(cfg *Config, k *fakeKernel) {
		cfg.Refused, cfg.Refusal = true, "hazard"
		k.enrolled = []uint64{10}
	})
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 0", "release 10"}, f.take())
}

func TestBadPodsFileKeepsLastGood(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("web shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "web", 10))
	f.take()
	for _, tc := range []struct{ name, content, want string }{
		{"syntax", "pods: {", "yaml"},
		{"empty", "", `no key "pods"`},
		{"unknown key", "pods: []\nnodes: []\n", "nodes"},
		{"unknown key of a pod", "pods:\n- {namespace: a, name: b, labels: {}}\n", "labels"},
		{"duplicate key", "pods: []\npods: []\n", "pods"},
		{"no name", "pods:\n- {namespace: a}\n", "pods[0]: namespace and name are required"},
		{"duplicate pod", "pods:\n- {namespace: a, name: b}\n- {namespace: a, name: b}\n", "pods[1]: a/b is listed twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			write(t, f.podsFile, tc.content)
			f.Sync()
			if err := f.Snapshot().SourceError; err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got source error %v, want it to contain %q", err, tc.want)
			}
			wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
		})
	}
	if err := os.Remove(f.podsFile); err != nil {
		t.Fatal(err)
	}
	f.Sync()
	if err := f.Snapshot().SourceError; !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got source error %v, want %v", err, os.ErrNotExist)
	}
	wantDiff(t, "calls", []string(nil), f.take())
}

func TestPauseEnds(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("web shortcut=enabled paused-until=2026-01-31T18:00:01Z"))
	f.mustPut(t, f.attachment(t, "web", 10))
	wantDiff(t, "verdict", rule.Hold, f.kernel.rules[0].Verdict)
	f.take()

	f.now = f.now.Add(time.Second)
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 1"}, f.take())
	wantDiff(t, "verdict", rule.Allow, f.kernel.rules[0].Verdict)
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
	f.Sync()
	wantDiff(t, "calls after the pause", []string(nil), f.take())
}

func TestFaultsAreTriedAgain(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	fault := errors.New("fault")
	f.kernel.enrolErr = fault
	f.mustPut(t, f.attachment(t, "a", 10))
	f.take()
	wantDiff(t, "states", map[string]string{"a": "out fault"}, f.states())

	f.kernel.enrolErr, f.kernel.policyErr = nil, fault
	f.Sync()
	wantDiff(t, "calls", []string{"enrol 10"}, f.take())
	if err := f.Snapshot().PolicyError; !errors.Is(err, fault) {
		t.Errorf("got policy error %v, want %v", err, fault)
	}

	f.kernel.policyErr, f.kernel.releaseErr = nil, fault
	f.Sync()
	wantDiff(t, "calls before it is time", []string(nil), f.take())
	f.now = f.now.Add(policyRetry)
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 1"}, f.take())
	wantDiff(t, "policy error", nil, f.Snapshot().PolicyError)

	write(t, f.podsFile, podsYAML())
	f.Sync()
	f.Sync()
	if got := strings.Count(f.log.String(), "pod not released"); got != 1 {
		t.Errorf("a lasting fault is logged %d times, want once", got)
	}
	f.take()
	f.kernel.releaseErr = nil
	f.Sync()
	wantDiff(t, "calls", []string{"release 10"}, f.take())
}

func TestStop(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "a", 10))
	f.take()
	f.Stop("unloaded")
	write(t, f.podsFile, podsYAML())
	wantDiff(t, "admission", api.Admission{Message: "unloaded"}, f.mustPut(t, f.attachment(t, "b", 11)))
	wantDiff(t, "states", map[string]string{"a": "out unloaded", "b": "out unloaded"}, f.states())
	wantDiff(t, "codes", map[string]api.PodState{"a": api.PodOut, "b": api.PodOut}, f.codes())
	wantDiff(t, "calls", []string(nil), f.take())
}

// A full map: the whole policy is written less and less often, and changes are
// written all the same.
func TestPolicyBacksOff(t *testing.T) {
	f := newFixture(t, nil)
	f.kernel.policyErr = fmt.Errorf("the map is full: %w", unix.ENOSPC)
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "a", 10))
	const interval = time.Second
	poll := func(d time.Duration) {
		for end := f.now.Add(d); f.now.Before(end); f.now = f.now.Add(interval) {
			f.Sync()
		}
	}
	poll(10 * time.Minute)
	// After 0, 5, 15, 35, 75 s, and then every minute.
	wantDiff(t, "whole policies in ten minutes", 5+8, f.kernel.whole)

	// Some of it fits now: that is written at once, and the rest is not forgotten.
	f.kernel.policyErr, f.kernel.whole = nil, 0
	f.mustPut(t, f.attachment(t, "b", 11))
	wantDiff(t, "calls", []string{"enrol 10", "policy of 3", "enrol 11"}, f.take())
	wantDiff(t, "whole policies", 0, f.kernel.whole)
	if err := f.Snapshot().PolicyError; !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got error %v, want that of what is missing", err)
	}
	poll(time.Minute + interval)
	wantDiff(t, "calls", []string{"policy of 4"}, f.take())
	if err := f.Snapshot().PolicyError; err != nil {
		t.Errorf("got error %v, want none", err)
	}
	poll(10 * time.Minute)
	wantDiff(t, "whole policies", 1, f.kernel.whole)

	// Another fault is none that rest mends, and an update that fails is made good as soon.
	f.kernel.policyErr = errors.New("another")
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b"))
	f.kernel.whole = 0
	poll(time.Minute)
	wantDiff(t, "whole policies in a minute", 11, f.kernel.whole)
}

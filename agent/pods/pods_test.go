// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

// fakeKernel stands in for the datapath. Network namespaces are files that hold
// their cookie.
type fakeKernel struct {
	enrolled []uint64
	rules    []policy.Rule
	// calls are those since take was last called.
	calls []string

	enrolErr, releaseErr, policyErr error
}

func readCookie(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(data), 10, 64)
}

func (k *fakeKernel) Enrol(netns string) (uint64, error) {
	cookie, err := readCookie(netns)
	if err := errors.Join(err, k.enrolErr); err != nil {
		return 0, err
	}
	k.calls = append(k.calls, fmt.Sprint("enrol ", cookie))
	if !slices.Contains(k.enrolled, cookie) {
		k.enrolled = append(k.enrolled, cookie)
	}
	return cookie, nil
}

func (k *fakeKernel) Release(cookie uint64) error {
	if k.releaseErr != nil {
		return k.releaseErr
	}
	k.calls = append(k.calls, fmt.Sprint("release ", cookie))
	k.enrolled = slices.DeleteFunc(k.enrolled, func(c uint64) bool { return c == cookie })
	return nil
}

func (k *fakeKernel) Enrolled() ([]uint64, error) { return slices.Clone(k.enrolled), nil }

func (k *fakeKernel) SetPolicy(rules []policy.Rule) error {
	if k.policyErr != nil {
		return k.policyErr
	}
	k.calls = append(k.calls, fmt.Sprintf("policy of %d", len(rules)))
	k.rules = rules
	return nil
}

// UpdatePolicy is logged with the number of all rules, as SetPolicy.
func (k *fakeKernel) UpdatePolicy(changed []policy.PairRules) error {
	rules := slices.DeleteFunc(slices.Clone(k.rules), func(r policy.Rule) bool {
		return slices.ContainsFunc(changed, func(p policy.PairRules) bool { return p.Client == r.Client && p.Server == r.Server })
	})
	for _, pair := range changed {
		rules = append(rules, pair.Rules...)
	}
	return k.SetPolicy(rules)
}

// fixture is a registry on a fake kernel, with a clock that stands still.
type fixture struct {
	*Registry
	kernel   *fakeKernel
	dir      string
	podsFile string
	now      time.Time
	log      strings.Builder
}

func newFixture(t testing.TB, change func(*Config, *fakeKernel)) *fixture {
	t.Helper()
	f := &fixture{kernel: &fakeKernel{}, dir: t.TempDir(), now: time.Date(2026, 1, 31, 18, 0, 0, 0, time.UTC)}
	f.podsFile = filepath.Join(f.dir, "pods.yaml")
	cfg := Config{
		Dir:         filepath.Join(f.dir, "attachments"),
		Source:      NewFile(f.podsFile),
		Proc:        filepath.Join(f.dir, "proc"),
		HostNetns:   []uint64{1},
		Datapath:    f.kernel,
		NetnsCookie: readCookie,
		Now:         func() time.Time { return f.now },
		Log:         slog.New(slog.NewTextHandler(&f.log, nil)),
	}
	if change != nil {
		change(&cfg, f.kernel)
	}
	var err error
	if f.Registry, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	return f
}

// take returns the calls to the kernel since the last take.
func (f *fixture) take() []string {
	calls := f.kernel.calls
	f.kernel.calls = nil
	return calls
}

func write(t testing.TB, path, content string) {
	t.Helper()
	// A new inode each time, so that a change within one tick of the clock shows.
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// netns makes a network namespace.
func (f *fixture) netns(t testing.TB, cookie uint64) string {
	t.Helper()
	path := filepath.Join(f.dir, fmt.Sprint("netns", cookie))
	write(t, path, fmt.Sprint(cookie))
	return path
}

func (f *fixture) attachment(t testing.TB, pod string, cookie uint64) api.Attachment {
	t.Helper()
	return api.Attachment{
		AttachmentID: api.AttachmentID{Network: "net", ContainerID: "id-" + pod, IfName: "eth0"},
		Netns:        f.netns(t, cookie),
		Pod:          api.PodRef{Namespace: "default", Name: pod},
	}
}

func (f *fixture) mustPut(t testing.TB, a api.Attachment) api.Admission {
	t.Helper()
	admission, err := f.Put(a)
	if err != nil {
		t.Fatal(err)
	}
	return admission
}

// podsYAML returns a pods file; each line is "name annotation=value annotation=value".
func podsYAML(lines ...string) string {
	text := "pods: []\n"
	for i, line := range lines {
		if i == 0 {
			text = "pods:\n"
		}
		fields := strings.Fields(line)
		text += "- namespace: default\n  name: " + fields[0] + "\n  annotations:\n    unrelated/name: x\n"
		for _, f := range fields[1:] {
			name, value, _ := strings.Cut(f, "=")
			text += fmt.Sprintf("    podshunt.io/%s: %q\n", name, value)
		}
	}
	return text
}

// states returns pod name -> "in" or "out" and the reason.
func (f *fixture) states() map[string]string {
	states := map[string]string{}
	for _, p := range f.Snapshot().Pods {
		state := "out"
		if p.Enrolled {
			state = "in"
		}
		states[p.Pod.Name] = strings.TrimSpace(state + " " + p.Reason)
	}
	return states
}

func wantDiff(t testing.TB, what string, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got)\n%s", what, diff)
	}
}

func TestAdmission(t *testing.T) {
	const podsFile = "PODSFILE"
	for _, tc := range []struct {
		name     string
		podsFile string
		cookie   uint64
		change   func(*Config, *fakeKernel)
		want     api.Admission
		calls    []string
	}{
		{
			name: "opted in", podsFile: podsYAML("web shortcut=enabled"),
			want: api.Admission{Enrolled: true}, calls: []string{"enrol 10", "policy of 1"},
		},
		{
			name: "paused", podsFile: podsYAML("web shortcut=enabled paused-until=2026-01-31T18:00:01Z"),
			want:  api.Admission{Enrolled: true, Reason: "paused until 2026-01-31T18:00:01Z"},
			calls: []string{"enrol 10", "policy of 1"},
		},
		{
			name: "opted out", podsFile: podsYAML("web shortcut=disabled"),
			want: api.Admission{Reason: "not opted in by podshunt.io/shortcut"}, calls: []string{"policy of 0"},
		},
		{
			name: "not listed", podsFile: podsYAML("other shortcut=enabled"),
			want: api.Admission{Reason: "not opted in: no entry in " + podsFile}, calls: []string{"policy of 0"},
		},
		{
			name: "bad annotation", podsFile: podsYAML("web shortcut=yes"),
			want:  api.Admission{Reason: `annotation podshunt.io/shortcut="yes": accepted are "enabled" and "disabled"`},
			calls: []string{"policy of 0"},
		},
		{
			name: "host network", podsFile: podsYAML("web shortcut=enabled"), cookie: 1,
			want:  api.Admission{Reason: "it runs in the node's own network namespace (hostNetwork)"},
			calls: []string{"policy of 0"},
		},
		{
			name: "refused by hazard", podsFile: podsYAML("web shortcut=enabled"),
			change: func(cfg *Config, _ *fakeKernel) { cfg.Refusal = "hazard" },
			want:   api.Admission{Reason: "hazard"}, calls: []string{"policy of 0"},
		},
		{
			name: "enrol fails", podsFile: podsYAML("web shortcut=enabled"),
			change: func(_ *Config, k *fakeKernel) { k.enrolErr = errors.New("map full") },
			want:   api.Admission{Reason: "map full"}, calls: []string{"policy of 0"},
		},
		{
			name: "no pods file yet",
			want: api.Admission{Reason: "waiting for the pods file: read pods file: stat " + podsFile + ": no such file or directory"},
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
			got.Reason = strings.ReplaceAll(got.Reason, f.podsFile, podsFile)
			wantDiff(t, "admission", tc.want, got)
			wantDiff(t, "calls", tc.calls, f.take())
		})
	}
}

func TestMissingNetns(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("web shortcut=enabled"))
	a := f.attachment(t, "web", 10)
	a.Netns += "-gone"
	want := api.Admission{Reason: "network namespace " + a.Netns + " does not exist"}
	wantDiff(t, "admission", want, f.mustPut(t, a))
	wantDiff(t, "states", map[string]string{}, f.states())
	wantDiff(t, "files", 0, f.files(t))
}

// files counts what is in the directory of attachments.
func (f *fixture) files(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir(f.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
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
	slices.Sort(calls[:2])
	wantDiff(t, "calls", []string{"enrol 10", "enrol 11", "policy of 4"}, calls)

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
	slices.Sort(calls[:2])
	wantDiff(t, "calls", []string{"enrol 10", "enrol 11", "policy of 4", "release 99"}, calls)
	wantDiff(t, "states", map[string]string{"client": "in", "web": "in"}, f.states())
}

func TestRestartWithoutPodsFileKeepsAll(t *testing.T) {
	f := newFixture(t, func(_ *Config, k *fakeKernel) { k.enrolled = []uint64{10, 99} })
	f.mustPut(t, f.attachment(t, "web", 10))
	write(t, f.podsFile, "pods: {")
	f.Sync()
	wantDiff(t, "calls", []string(nil), f.take())
	if state := f.states()["web"]; !strings.HasPrefix(state, "in waiting for the pods file: ") {
		t.Errorf("got %q, want it enrolled and waiting", state)
	}
	if f.Snapshot().SourceError == nil {
		t.Error("got no source error, want one")
	}

	write(t, f.podsFile, podsYAML("web shortcut=enabled"))
	f.Sync()
	wantDiff(t, "calls", []string{"enrol 10", "policy of 1", "release 99"}, f.take())
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
		cfg.Refusal = "hazard"
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
	wantDiff(t, "verdict", policy.Hold, f.kernel.rules[0].Decision.Verdict)
	f.take()

	f.now = f.now.Add(time.Second)
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 1"}, f.take())
	wantDiff(t, "verdict", policy.Allow, f.kernel.rules[0].Decision.Verdict)
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
	f.Sync()
	wantDiff(t, "calls after the pause", []string(nil), f.take())
}

func TestAttachmentsComeAndGo(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b shortcut=enabled", "c shortcut=enabled"))
	a, b, c := f.attachment(t, "a", 10), f.attachment(t, "b", 11), f.attachment(t, "c", 12)
	other := f.attachment(t, "c", 12)
	other.Network = "other"
	f.mustPut(t, a)
	f.mustPut(t, c)
	f.mustPut(t, other)

	// The plugin leaves a file itself when the agent does not answer.
	data, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(f.cfg.Dir, b.FileName()), string(data))
	f.Sync()
	wantDiff(t, "states", map[string]string{"a": "in", "b": "in", "c": "in"}, f.states())
	f.take()

	steps := []struct {
		name   string
		do     func() error
		states map[string]string
		calls  []string
	}{
		{
			"DEL", func() error { return f.Remove(a.AttachmentID) },
			map[string]string{"b": "in", "c": "in"},
			[]string{"policy of 4", "release 10"},
		},
		{"DEL again", func() error { return f.Remove(a.AttachmentID) }, map[string]string{"b": "in", "c": "in"}, nil},
		{"GC of one network of two", func() error {
			// The network of a valid entry is that of the request.
			return f.Collect(api.GCRequest{Network: "net", Valid: []api.AttachmentID{
				{Network: "whatever", ContainerID: b.ContainerID, IfName: b.IfName},
			}})
		}, map[string]string{"b": "in", "c": "in"}, nil},
		{
			"GC of the other", func() error { return f.Collect(api.GCRequest{Network: "other"}) },
			map[string]string{"b": "in"},
			[]string{"policy of 1", "release 12"},
		},
		{
			"the plugin deletes its file", func() error { return os.Remove(filepath.Join(f.cfg.Dir, b.FileName())) },
			map[string]string{},
			[]string{"policy of 0", "release 11"},
		},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		f.Sync()
		wantDiff(t, step.name+": states", step.states, f.states())
		wantDiff(t, step.name+": calls", step.calls, f.take())
	}
	wantDiff(t, "files", 0, f.files(t))
}

func TestNetnsVanishes(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(t testing.TB, path string)
	}{
		{"path gone", func(t testing.TB, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"another namespace", func(t testing.TB, path string) { write(t, path, "77") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, nil)
			write(t, f.podsFile, podsYAML("a shortcut=enabled"))
			a := f.attachment(t, "a", 10)
			f.mustPut(t, a)
			f.take()
			tc.change(t, a.Netns)
			f.Sync()
			wantDiff(t, "states", map[string]string{}, f.states())
			wantDiff(t, "calls", []string{"policy of 0", "release 10"}, f.take())
			wantDiff(t, "files", 0, f.files(t))
		})
	}
}

func TestNetnsReplacedByPut(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	a := f.attachment(t, "a", 10)
	f.mustPut(t, a)
	f.take()
	a.Netns = f.netns(t, 20)
	wantDiff(t, "admission", api.Admission{Enrolled: true}, f.mustPut(t, a))
	wantDiff(t, "calls", []string{"enrol 20", "policy of 1", "release 10"}, f.take())
}

// A cookie that cannot be read for a moment must not cost the pod its shortcut.
func TestNetnsUnreadable(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b shortcut=enabled"))
	a := f.attachment(t, "a", 10)
	f.mustPut(t, a)
	f.take()
	write(t, a.Netns, "not a number")
	b := f.attachment(t, "b", 11)
	write(t, b.Netns, "neither")
	f.mustPut(t, b)
	wantDiff(t, "states", map[string]string{
		"a": "in", "b": `out strconv.ParseUint: parsing "neither": invalid syntax`,
	}, f.states())
	wantDiff(t, "calls", []string(nil), f.take())
	write(t, b.Netns, "11")
	f.Sync()
	wantDiff(t, "calls", []string{"enrol 11", "policy of 4"}, f.take())
}

func TestOnePodTwoInterfaces(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	a := f.attachment(t, "a", 10)
	b := a
	b.IfName = "eth1"
	f.mustPut(t, a)
	f.mustPut(t, b)
	wantDiff(t, "calls", []string{"enrol 10", "policy of 1"}, f.take())
	if err := f.Remove(a.AttachmentID); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "calls", []string(nil), f.take())
	wantDiff(t, "states", map[string]string{"a": "in"}, f.states())
}

func TestTwoPodsInOneNetns(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled", "b shortcut=enabled"))
	f.mustPut(t, f.attachment(t, "a", 10))
	f.mustPut(t, f.attachment(t, "b", 10))
	const reason = "out another pod is attached to the same network namespace"
	wantDiff(t, "states", map[string]string{"a": reason, "b": reason}, f.states())
	wantDiff(t, "enrolled", []uint64{}, f.kernel.enrolled)
}

func TestUnreadableFilesAreReportedOnce(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	for _, name := range []string{"broken.json", ".temporary.json", "README"} {
		write(t, filepath.Join(f.cfg.Dir, name), "{")
	}
	a := f.attachment(t, "a", 10)
	f.mustPut(t, a)
	data, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(f.cfg.Dir, "misnamed.json"), string(data))
	f.Sync()
	f.Sync()
	wantDiff(t, "states", map[string]string{"a": "in"}, f.states())
	for text, want := range map[string]int{"attachment ignored": 2, "broken.json": 1, "misnamed.json": 1} {
		if got := strings.Count(f.log.String(), text); got != want {
			t.Errorf("%q is logged %d times, want %d:\n%s", text, got, want, f.log.String())
		}
	}
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
	wantDiff(t, "admission", api.Admission{Reason: "unloaded"}, f.mustPut(t, f.attachment(t, "b", 11)))
	wantDiff(t, "states", map[string]string{"a": "out unloaded", "b": "out unloaded"}, f.states())
	wantDiff(t, "calls", []string(nil), f.take())
}

// A change of a file is taken up.
func TestRunTakesUpChanges(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML())
	f.mustPut(t, f.attachment(t, "a", 10))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	for deadline := time.Now().Add(10 * time.Second); f.states()["a"] != "in"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("got %v, want the pod in", f.states())
		}
	}
	cancel()
	select {
	case err := <-done:
		wantDiff(t, "Run", nil, err)
	case <-time.After(5 * time.Second):
		t.Fatal("Run did not return")
	}
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

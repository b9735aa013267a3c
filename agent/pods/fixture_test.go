// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// fakeKernel stands in for the datapath. Network namespaces are files that hold
// their cookie.
type fakeKernel struct {
	enrolled []uint64
	rules    []rule.Rule
	// calls are those since take was last called.
	calls []string

	enrolErr, releaseErr, policyErr error
	// whole counts the calls of SetPolicy, the failed ones, too.
	whole int
}

func readCookie(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(data), 10, 64)
}

func (k *fakeKernel) Enrol(cookie uint64) error {
	if k.enrolErr != nil {
		return k.enrolErr
	}
	k.calls = append(k.calls, fmt.Sprint("enrol ", cookie))
	if !slices.Contains(k.enrolled, cookie) {
		k.enrolled = append(k.enrolled, cookie)
	}
	return nil
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

func (k *fakeKernel) SetPolicy(rules []rule.Rule) error {
	k.whole++
	return k.write(rules)
}

func (k *fakeKernel) write(rules []rule.Rule) error {
	if k.policyErr != nil {
		return k.policyErr
	}
	k.calls = append(k.calls, fmt.Sprintf("policy of %d", len(rules)))
	k.rules = rules
	return nil
}

// UpdatePolicy is logged with the number of all rules, as SetPolicy.
func (k *fakeKernel) UpdatePolicy(changed []rule.PairRules) error {
	rules := slices.DeleteFunc(slices.Clone(k.rules), func(r rule.Rule) bool {
		return slices.ContainsFunc(changed, func(p rule.PairRules) bool { return p.Client == r.Client && p.Server == r.Server })
	})
	for _, pair := range changed {
		rules = append(rules, pair.Rules...)
	}
	return k.write(rules)
}

// fixture is a reconciler on a fake kernel, with a clock that stands still.
type fixture struct {
	*Reconciler
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
	if f.Reconciler, err = New(cfg); err != nil {
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
		states[p.Pod.Name] = strings.TrimSpace(state + " " + p.Message)
	}
	return states
}

// codes returns pod name -> state.
func (f *fixture) codes() map[string]api.PodState {
	codes := map[string]api.PodState{}
	for _, p := range f.Snapshot().Pods {
		codes[p.Pod.Name] = p.State
	}
	return codes
}

func wantDiff(t testing.TB, what string, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got)\n%s", what, diff)
	}
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

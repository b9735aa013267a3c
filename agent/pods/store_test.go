// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podshunt/podshunt/api"
)

func TestMissingNetns(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("web shortcut=enabled"))
	a := f.attachment(t, "web", 10)
	a.Netns += "-gone"
	want := api.Admission{Message: "network namespace " + a.Netns + " does not exist"}
	wantDiff(t, "admission", want, f.mustPut(t, a))
	wantDiff(t, "states", map[string]string{}, f.states())
	wantDiff(t, "files", 0, f.files(t))
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
	wantDiff(t, "calls", []string{"policy of 1", "enrol 20", "release 10"}, f.take())
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
	wantDiff(t, "calls", []string{"policy of 4", "enrol 11"}, f.take())
}

func TestOnePodTwoInterfaces(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	a := f.attachment(t, "a", 10)
	b := a
	b.IfName = "eth1"
	f.mustPut(t, a)
	f.mustPut(t, b)
	wantDiff(t, "calls", []string{"policy of 1", "enrol 10"}, f.take())
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
	wantDiff(t, "codes", map[string]api.PodState{"a": api.PodRefused, "b": api.PodRefused}, f.codes())
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

// What the reconciler has written itself is not read again; what somebody else has, is.
func TestWrittenThrough(t *testing.T) {
	f := newFixture(t, nil)
	write(t, f.podsFile, podsYAML("a shortcut=enabled"))
	a := f.attachment(t, "a", 10)
	f.mustPut(t, a)
	f.mustPut(t, f.attachment(t, "b", 11))
	refresh := func(want bool) {
		t.Helper()
		changed, err := f.store.refresh()
		wantDiff(t, "error", nil, err)
		wantDiff(t, "changed", want, changed)
	}
	refresh(false)
	f.leave(t, a)
	refresh(true)
	refresh(false)
	if err := f.Remove(a.AttachmentID); err != nil {
		t.Fatal(err)
	}
	refresh(false)
}

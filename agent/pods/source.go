// SPDX-License-Identifier: Apache-2.0

// What the pods ask for: the Source, its content, and the pods file as one.

package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

// Source says what the pods of this node ask for. It must be safe for concurrent
// use.
type Source interface {
	// Content returns what is known; nil until it is known for the first time, and
	// then what an earlier agent left stays in force. The error is why it is not up
	// to date. A Content is not changed after it was returned.
	Content() (*Content, error)
	// Changed receives after a change of what Content returns, the error included.
	Changed() <-chan struct{}
	// String names the source in texts: "waiting for ...".
	String() string
}

// Content is what a Source knows.
type Content struct {
	Pods map[string]Intent // by api.PodRef.String
	// Unlisted is why a pod that is not among Pods does not take part.
	Unlisted string
	Cluster  policy.Cluster
}

// contested returns the UIDs that more than one pod claims. They are nobody's: whose
// processes they name is not known.
func (c *Content) contested() map[string]bool {
	claimed, contested := map[string]bool{}, map[string]bool{}
	for _, w := range c.Pods {
		for _, uid := range w.UIDs {
			if claimed[uid] {
				contested[uid] = true
			}
			claimed[uid] = true
		}
	}
	return contested
}

// Intent is what a pod asks for.
type Intent struct {
	// UIDs are those by which a runtime may know the pod, its own first. Without any
	// the name is enough, and a pod that no attachment tells of is not looked for.
	UIDs     []string
	Settings api.Settings
	// Err is why the annotations are not accepted; Settings are zero then.
	Err error
	// Excluded is what becomes of the pod whatever it asks for; nil: what it asks for.
	Excluded *Standing
	// The rest is as in policy.Pod.
	Labels    map[string]string
	Addresses []netip.Addr
	Ports     []policy.NamedPort
	Bandwidth string
}

// matches tells whether the intent is that of the pod with the UID, which a runtime
// may not have given.
func (w *Intent) matches(uid string) bool {
	return len(w.UIDs) == 0 || uid == "" || slices.Contains(w.UIDs, uid)
}

// standing returns what becomes of the pod by its own intent and nature.
func (w *Intent) standing() Standing {
	switch {
	case w.Err != nil:
		return Standing{api.PodRefused, api.PodInvalidAnnotation, w.Err.Error()}
	case !w.Settings.Enabled:
		return Standing{api.PodOut, api.PodNotOptedIn, "not opted in by " + api.AnnotationShortcut}
	case w.Excluded != nil:
		return *w.Excluded
	}
	return Standing{State: api.PodWanted}
}

// File is a Source that needs no cluster: a YAML file with the annotations of the
// pods of a machine.
type File struct {
	path     string
	changed  chan struct{}
	interval time.Duration // passInterval, but for tests

	mu sync.Mutex
	// stamp is that of the content last read, accepted or not.
	stamp stamp
	// content is the last accepted one; nil before there was one.
	content *Content
	// err is why the present content is not in force.
	err error
}

var _ Source = (*File)(nil)

// NewFile returns a File that need not exist yet. Run watches it.
func NewFile(path string) *File {
	return &File{path: path, changed: make(chan struct{}, 1), interval: passInterval}
}

func (f *File) String() string { return "the pods file" }

// Changed receives after a change, while Run runs.
func (f *File) Changed() <-chan struct{} { return f.changed }

// Run watches the file until ctx ends.
func (f *File) Run(ctx context.Context, log *slog.Logger) error {
	watchDirs(ctx, f.dirs, f.interval, log, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		content, err := f.content, fmt.Sprint(f.err)
		f.read()
		if f.content != content || fmt.Sprint(f.err) != err {
			notify(f.changed)
		}
	})
	return nil
}

// dirs returns the directory of the file, and that of the file that it links to.
func (f *File) dirs() []string {
	dirs := []string{filepath.Dir(f.path)}
	if target, err := filepath.EvalSymlinks(f.path); err == nil && filepath.Dir(target) != dirs[0] {
		dirs = append(dirs, filepath.Dir(target))
	}
	return dirs
}

// Content takes up the file if it has changed.
func (f *File) Content() (*Content, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.read()
	return f.content, f.err
}

func (f *File) read() {
	now, err := readStamp(f.path)
	if err == nil && now == f.stamp {
		return
	}
	// The stamp is older than the content: a write in between is seen next time.
	f.stamp = now
	var data []byte
	if err == nil {
		data, err = os.ReadFile(f.path)
	}
	if err != nil {
		f.stamp, f.err = stamp{}, fmt.Errorf("read pods file: %w", err)
		return
	}
	pods, err := parsePods(data)
	if err != nil {
		f.err = fmt.Errorf("pods file %s: %w", f.path, err)
		return
	}
	f.content, f.err = &Content{Pods: pods, Unlisted: "not opted in: no entry in " + f.path}, nil
}

func parsePods(data []byte) (map[string]Intent, error) {
	var file struct {
		Pods []struct {
			Namespace   string            `json:"namespace"`
			Name        string            `json:"name"`
			Annotations map[string]string `json:"annotations"`
		} `json:"pods"`
	}
	if err := yaml.UnmarshalStrict(data, &file); err != nil {
		return nil, err
	}
	// An editor that truncates the file first must not opt everybody out for a moment.
	if file.Pods == nil {
		return nil, errors.New(`no key "pods"; for no pods write "pods: []"`)
	}
	pods := make(map[string]Intent, len(file.Pods))
	for i, p := range file.Pods {
		if p.Namespace == "" || p.Name == "" {
			return nil, fmt.Errorf("pods[%d]: namespace and name are required", i)
		}
		key := api.PodRef{Namespace: p.Namespace, Name: p.Name}.String()
		if _, ok := pods[key]; ok {
			return nil, fmt.Errorf("pods[%d]: %s is listed twice", i, key)
		}
		settings, err := api.ParseAnnotations(p.Annotations)
		pods[key] = Intent{Settings: settings, Err: err}
	}
	return pods, nil
}

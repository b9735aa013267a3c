// SPDX-License-Identifier: Apache-2.0

// This file has what pods ask for: the Source interface, its Content, and a Source
// that reads a file.

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
	// Content returns the last known content, or nil until something is known;
	// until then what an earlier agent left stays in force. The error says why the
	// content is not up to date. Nobody changes a Content once it was returned.
	Content() (*Content, error)
	// Changed returns a channel that receives after each change of what Content
	// returns, its error included.
	Changed() <-chan struct{}
	// String names the source in messages, such as "waiting for the API server".
	String() string
}

// Content holds what a Source knows.
type Content struct {
	Pods map[string]Intent // by api.PodRef.String
	// Unlisted is the message for a pod that is not among Pods.
	Unlisted string
	Cluster  policy.Cluster
}

// contested returns the UIDs that more than one pod claims. Such a UID identifies no
// pod: nobody knows whose processes it names.
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

// Intent holds what a pod asks for.
type Intent struct {
	// UIDs has the UIDs by which a runtime may know the pod, the pod's own first. If
	// it is empty the name is enough to match an attachment, and a pod without one
	// is not searched for.
	UIDs     []string
	Settings api.Settings
	// Err says why the annotations are not accepted; Settings are zero then.
	Err error
	// Excluded is the standing of a pod that cannot take part, whatever it asks for;
	// else nil.
	Excluded *Standing
	// The other fields are as in policy.Pod.
	Labels    map[string]string
	Addresses []netip.Addr
	Ports     []policy.NamedPort
	Bandwidth string
}

// matches reports whether the intent is that of the pod with the UID; an empty UID,
// from a runtime that gives none, always matches.
func (w *Intent) matches(uid string) bool {
	return len(w.UIDs) == 0 || uid == "" || slices.Contains(w.UIDs, uid)
}

// standing returns the standing that follows from the intent alone.
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
	// stamp is the file's stamp when it was last read, accepted or not.
	stamp stamp
	// content is the last accepted content; nil before there was one.
	content *Content
	// err says why the file's present content is not in force.
	err error
}

var _ Source = (*File)(nil)

// NewFile returns a File for the file at path, which need not exist yet. Run watches
// it.
func NewFile(path string) *File {
	return &File{path: path, changed: make(chan struct{}, 1), interval: passInterval}
}

func (f *File) String() string { return "the pods file" }

// Changed returns a channel that receives after each change of the file, while Run
// runs.
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

// dirs returns the directory of the file and, if that is a link, the directory of
// its target.
func (f *File) dirs() []string {
	dirs := []string{filepath.Dir(f.path)}
	if target, err := filepath.EvalSymlinks(f.path); err == nil && filepath.Dir(target) != dirs[0] {
		dirs = append(dirs, filepath.Dir(target))
	}
	return dirs
}

// Content reads the file if it has changed, and returns the last content that was
// accepted.
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
	// The stamp was read before the content, so a write in between is seen next
	// time.
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

// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"fmt"
	"os"

	"sigs.k8s.io/yaml"

	"github.com/podshunt/podshunt/api"
)

// source is the pods file: the annotations of the pods of a machine that has no
// cluster to ask.
type source struct {
	path string
	// stamp is that of the content last read, accepted or not.
	stamp stamp
	// pods is the last accepted content by api.PodRef.String; nil before there was one.
	pods map[string]wish
	// err is why the present content is not in force.
	err error
}

// wish is what the annotations of a pod ask for, or why that is not clear.
type wish struct {
	settings api.Settings
	err      error
}

// read takes up the file if it has changed.
func (s *source) read() {
	now, err := readStamp(s.path)
	if err == nil && now == s.stamp {
		return
	}
	// The stamp is older than the content: a write in between is seen next time.
	s.stamp = now
	var data []byte
	if err == nil {
		data, err = os.ReadFile(s.path)
	}
	if err != nil {
		s.stamp, s.err = stamp{}, fmt.Errorf("read pods file: %w", err)
		return
	}
	pods, err := parsePods(data)
	if err != nil {
		s.err = fmt.Errorf("pods file %s: %w", s.path, err)
		return
	}
	s.pods, s.err = pods, nil
}

func parsePods(data []byte) (map[string]wish, error) {
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
	pods := make(map[string]wish, len(file.Pods))
	for i, p := range file.Pods {
		if p.Namespace == "" || p.Name == "" {
			return nil, fmt.Errorf("pods[%d]: namespace and name are required", i)
		}
		key := api.PodRef{Namespace: p.Namespace, Name: p.Name}.String()
		if _, ok := pods[key]; ok {
			return nil, fmt.Errorf("pods[%d]: %s is listed twice", i, key)
		}
		settings, err := api.ParseAnnotations(p.Annotations)
		pods[key] = wish{settings, err}
	}
	return pods, nil
}

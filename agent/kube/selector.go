// SPDX-License-Identifier: Apache-2.0

// The labels of namespaces whose pods are opted in.

package kube

import (
	"fmt"
	"maps"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/podshunt/podshunt/api"
)

// Selector is a flag: a label selector as kubectl takes it, except that an empty one
// selects nothing.
type Selector struct {
	selector labels.Selector
}

var _ pflag.Value = (*Selector)(nil)

// String returns what Set accepts.
func (s *Selector) String() string {
	if s.selector == nil {
		return ""
	}
	return s.selector.String()
}

// Type is for the help of a flag.
func (s *Selector) Type() string { return "selector" }

// Set parses a selector.
func (s *Selector) Set(text string) error {
	s.selector = nil
	if text == "" {
		return nil
	}
	parsed, err := labels.Parse(text)
	if err != nil {
		return fmt.Errorf(`accepted is a label selector such as "env=prod,team in (a,b)": %w`, err)
	}
	s.selector = parsed
	return nil
}

// selectsNone reports whether the selector is there, but selects none of the namespaces,
// which are given by their labels.
func (s *Selector) selectsNone(namespaces map[string]map[string]string) bool {
	if s.selector == nil {
		return false
	}
	for _, of := range namespaces {
		if s.selector.Matches(labels.Set(of)) {
			return false
		}
	}
	return true
}

// checkDefaults warns when the last of the namespaces is gone that DefaultNamespaces selects,
// or none is there at first. The caller holds s.mu.
func (s *Source) checkDefaults(namespaces map[string]map[string]string) {
	none := s.cfg.DefaultNamespaces.selectsNone(namespaces)
	if none && !s.selectsNone {
		s.cfg.Log.Warn("no namespace is opted in by default, as none has such labels", "default_namespaces", s.cfg.DefaultNamespaces.String())
	}
	s.selectsNone = none
}

// optIn returns the annotations that a namespace gives its pods: its own, and the
// opt-in if the namespace is selected and has no such annotation itself.
func (s *Selector) optIn(namespace *corev1.Namespace) map[string]string {
	_, said := namespace.Annotations[api.AnnotationShortcut]
	if said || s.selector == nil || !s.selector.Matches(labels.Set(namespace.Labels)) {
		return namespace.Annotations
	}
	annotations := map[string]string{api.AnnotationShortcut: "enabled"}
	maps.Copy(annotations, namespace.Annotations)
	return annotations
}

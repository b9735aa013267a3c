// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

func TestSelector(t *testing.T) {
	enabled := map[string]string{api.AnnotationShortcut: "enabled"}
	disabled := map[string]string{api.AnnotationShortcut: "disabled"}
	for _, tc := range []struct {
		name, selector  string
		namespace, want map[string]string
	}{
		{name: "none"},
		{name: "selected", selector: "name in (shop, other)", want: enabled},
		{name: "all", selector: "name", want: enabled},
		{name: "not selected", selector: "name=other"},
		{name: "the namespace says no", selector: "name=shop", namespace: disabled, want: disabled},
		{name: "the namespace says yes", selector: "name!=shop", namespace: enabled, want: enabled},
		{
			name: "other annotations stay", selector: "name=shop", namespace: map[string]string{api.AnnotationPorts: "80"},
			want: map[string]string{api.AnnotationPorts: "80", api.AnnotationShortcut: "enabled"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var s Selector
			if err := s.Set(tc.selector); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, s.optIn(namespace("shop", tc.namespace))); diff != "" {
				t.Errorf("annotations (-want +got)\n%s", diff)
			}
		})
	}
	var s Selector
	if err := s.Set("name in shop"); err == nil {
		t.Error("got no error for a selector without parentheses")
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func TestCheck(t *testing.T) {
	const good = `# Source: comment only
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: d}
spec:
  template:
    spec:
      hostNetwork: true
      containers:
      - name: c
        resources: {requests: {cpu: 20m}}
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
spec: {podMetricsEndpoints: [{port: metrics, interval: 30s}]}
`
	for _, tc := range []struct{ name, old, new, want string }{
		{"good", "", "", ""},
		{"misspelled", "requests", "request", `object 1, kind DaemonSet: strict decoding error: unknown field "spec.template.spec.containers[0].resources.request"`},
		{"another type", "hostNetwork: true", "hostNetwork: 'yes'", "object 1, kind DaemonSet: json: cannot unmarshal string"},
		{"no quantity", "20m", "20 milli", "object 1, kind DaemonSet: quantities must match"},
		{"twice", "{name: d}", "{name: d, name: e}", `key "name" already set`},
		{"unknown kind", "kind: DaemonSet", "kind: Daemon", `no kind "Daemon" is registered`},
		{"unknown version", "apps/v1", "apps/v1beta7", `no kind "DaemonSet" is registered`},
		{"misspelled in a second object", "podMetricsEndpoints", "podMetricsEndpoint", `object 2, kind PodMonitor: strict decoding error: unknown field "spec.podMetricsEndpoint"`},
		{"no object", good, "# nothing", "no object in the input"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if !strings.Contains(good, tc.old) {
				t.Fatalf("%q is not in the manifests", tc.old)
			}
			err := check(strings.NewReader(strings.Replace(good, tc.old, tc.new, 1)))
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got error %v, want %q", err, tc.want)
			}
		})
	}
}

// TestValues sees that the files of values that hack/helm.sh renders beside the presets take
// the chart to both ends: one sets all that is empty or off by default, the other empties or
// switches off what a user may.
func TestValues(t *testing.T) {
	const chart = "../../../charts/podshunt/"
	defaults, everything := mustRead(t, chart+"values.yaml"), mustRead(t, chart+"tests/everything.yaml")
	var walk func(path string, value, set any)
	walk = func(path string, value, set any) {
		if inner, ok := value.(map[string]any); ok && len(inner) > 0 {
			others, _ := set.(map[string]any)
			for key, value := range inner {
				walk(path+"."+key, value, others[key])
			}
			return
		}
		if isEmpty(value) && isEmpty(set) {
			t.Errorf("tests/everything.yaml leaves %s empty", path[1:])
		}
	}
	walk("", defaults, everything)
}

func isEmpty(value any) bool {
	v := reflect.ValueOf(value)
	switch v.Kind() {
	case reflect.Map, reflect.Slice:
		return v.Len() == 0
	}
	return value == nil || v.IsZero()
}

func mustRead(t *testing.T, file string) (values map[string]any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, &values); err != nil {
		t.Fatal(err)
	}
	return values
}

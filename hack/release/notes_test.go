// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNotes(t *testing.T) {
	top := t.TempDir()
	changelog := "# Changelog\n\n## Unreleased\n\n- **New.** Not yet\n  ([docs](docs/new.md#part)).\n\n" +
		"## 1.2.0 (2026-12-01)\n\n- **Old.** `flag` works, see [this](https://example.com/a).\n- Another.\n\n## 1.1.0\n\n- First.\n"
	if err := os.WriteFile(filepath.Join(top, "CHANGELOG.md"), []byte(changelog), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		version string
		want    []string // of the chart's changes; none means an error
	}{
		{"1.2.0", []string{"Old. flag works, see this.", "Another."}},
		{"1.1.0", []string{"First."}},
		{"1.3.0", nil},
		{"1.3.0-rc.1", []string{"New. Not yet (docs)."}},
		{"0.0.0-gabc", []string{"New. Not yet (docs)."}},
	} {
		notes, err := build{top: top, version: tc.version}.notes()
		if (err == nil) != (tc.want != nil) {
			t.Errorf("%s: got error %v", tc.version, err)
		}
		if diff := cmp.Diff(tc.want, changesOf(notes)); diff != "" {
			t.Errorf("%s: changes (-want +got)\n%s", tc.version, diff)
		}
	}
	for version, want := range map[string]string{
		"1.3.0-rc.1": "[docs](https://github.com/podshunt/podshunt/blob/v1.3.0-rc.1/docs/new.md#part)",
		"1.2.0":      "[this](https://example.com/a)",
	} {
		notes, err := build{top: top, version: version}.releaseNotes()
		if err != nil || !strings.Contains(notes, want) || !strings.Contains(notes, "--version "+version+" ") {
			t.Errorf("%s: got error %v and notes without %q, or without the command that installs it:\n%s", version, err, want, notes)
		}
	}
}

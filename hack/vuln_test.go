// SPDX-License-Identifier: Apache-2.0

package hack_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestVuln: what is known of a module that a program calls fails, and a database that is
// not there is said to be so.
func TestVuln(t *testing.T) {
	database := func(id, module, entry string) string {
		dir := t.TempDir()
		index := "[]"
		if id != "" {
			index = `[{"path": "` + module + `", "vulns": [{"id": "` + id + `", "modified": "2026-01-02T03:04:05Z"}]}]`
		}
		for name, content := range map[string]string{
			"index/db.json": `{"modified": "2026-01-02T03:04:05Z"}`, "index/modules.json": index, "ID/" + id + ".json": entry,
		} {
			path := filepath.Join(dir, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		return "file://" + dir
	}
	const known = `{"schema_version": "1.3.1", "id": "GO-2026-9999", "modified": "2026-01-02T03:04:05Z", "published": "2026-01-02T03:04:05Z",
		"summary": "made for a test", "details": "made for a test", "affected": [{
			"package": {"name": "github.com/containernetworking/cni", "ecosystem": "Go"},
			"ranges": [{"type": "SEMVER", "events": [{"introduced": "0"}]}],
			"ecosystem_specific": {"imports": [{"path": "github.com/containernetworking/cni/pkg/skel", "symbols": ["PluginMainFuncs", "PluginMainFuncsWithError"]}]}
		}]}`
	// What it needs is downloaded here, if it is not there yet: below, that is out of reach.
	if out, err := exec.Command("go", "tool", "-modfile=tools/go.mod", "govulncheck", "-version").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, tc := range []struct {
		name, database, vuln string
		fails                bool
		says                 string
	}{
		{"known", database("GO-2026-9999", "github.com/containernetworking/cni", known), "", true, "GO-2026-9999"},
		{"nothing known", database("", "", ""), "required", false, "vuln: checked"},
		{"no database", "", "", false, "vuln: NOT CHECKED"},
		{"no database, required", "", "required", true, "vuln: NOT CHECKED"},
		{"no copy of it", "http://127.0.0.1:1", "", true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command("./vuln.sh", "./plugin")
			// Nothing but this machine can be reached.
			cmd.Env = append(os.Environ(), "GOVULNDB="+tc.database, "VULN="+tc.vuln, "HTTPS_PROXY=http://127.0.0.1:1")
			out, err := cmd.CombinedOutput()
			if (err != nil) != tc.fails || !strings.Contains(string(out), tc.says) {
				t.Errorf("got error %v, want one: %t, and the words %q in\n%s", err, tc.fails, tc.says, out)
			}
		})
	}
}

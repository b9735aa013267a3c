// SPDX-License-Identifier: Apache-2.0

// Package kernels_test tests the scripts in this directory.
package kernels_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestArchive(t *testing.T) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("this is about apt's sources, and there is no apt here")
	}
	const both = "Types: deb\nURIs: http://mirror.test/one\nSuites: bookworm bookworm-updates\nComponents: main\n\n" +
		"Types: deb deb-src\nURIs: https://mirror.test/two/\nSuites: bookworm-security\nComponents: main\n"
	for _, tc := range []struct {
		name, file, sources, variable string
		main, security                string
	}{
		{"deb822", "a.sources", both, "", "http://mirror.test/one", "https://mirror.test/two"},
		{
			"one-line", "a.list",
			"deb [arch=amd64] http://mirror.test/corp/debian/ trixie main contrib\ndeb http://mirror.test/corp/updates trixie-security main\n", "",
			"http://mirror.test/corp/debian", "http://mirror.test/corp/updates",
		},
		{"no security updates", "a.list", "deb http://mirror.test/debian sid main\n", "", "http://mirror.test/debian", "http://mirror.test/debian-security"},
		{"only security updates", "a.list", "deb http://mirror.test/debian-security/ stable-security main\n", "", "http://mirror.test/debian", "http://mirror.test/debian-security"},
		{"another's suite first", "a.list", "deb http://other.test/apt cloud-bookworm main\ndeb http://mirror.test/debian bookworm main\n", "", "http://mirror.test/debian", "http://mirror.test/debian-security"},
		{"variable", "a.sources", both, "http://variable.test/x/", "http://variable.test/x/debian", "http://variable.test/x/debian-security"},
		{"variable without sources", "a.list", "", "http://variable.test", "http://variable.test/debian", "http://variable.test/debian-security"},
		{"no sources", "a.list", "", "", "", ""},
		{"no suite of Debian's", "a.list", "deb http://mirror.test/ubuntu noble main\n", "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			conf := fmt.Sprintf("Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"%s/parts\";\nDir::State \"%[1]s\";\nDir::Cache \"%[1]s\";\n", dir)
			for name, text := range map[string]string{"conf": conf, "parts/" + tc.file: tc.sources, "lists/partial/x": "", "archives/partial/x": ""} {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for kind, want := range map[string]string{"": tc.main, "-security": tc.security} {
				cmd := exec.Command("bash", "-euc", ". ./apt.sh; archive "+kind)
				cmd.Env = append(os.Environ(), "APT_CONFIG="+dir+"/conf", "DEBIAN_MIRROR="+tc.variable)
				var stderr strings.Builder
				cmd.Stderr = &stderr
				out, err := cmd.Output()
				if got := strings.TrimSuffix(string(out), "\n"); got != want || (err == nil) != (want != "") {
					t.Errorf("archive %s: got %q, %v (%s), want %q", kind, got, err, &stderr, want)
				}
				if want == "" && !strings.Contains(stderr.String(), "set DEBIAN_MIRROR to") {
					t.Errorf("archive %s: got the error %q, want what to set", kind, &stderr)
				}
			}
		})
	}
}

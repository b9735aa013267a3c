// SPDX-License-Identifier: Apache-2.0

// Package hack_test tests scripts in this directory.
package hack_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mustApt makes directories and settings as a machine's apt has them, with a file
// of sources.
func mustApt(t *testing.T, name, sources string) (dir, conf string) {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("this is about apt, which is not here")
	}
	dir = t.TempDir()
	text := fmt.Sprintf(`Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "%s/parts"; Dir::State "%[1]s"; Dir::Cache "%[1]s";`, dir)
	for name, text := range map[string]string{"conf": text, "status": "", "parts/" + name: sources, "lists/partial/x": "", "archives/partial/x": ""} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, filepath.Join(dir, "conf")
}

// TestAptAlone updates lists and fetches while another apt has the machine's locked.
func TestAptAlone(t *testing.T) {
	archive := t.TempDir()
	if err := os.WriteFile(filepath.Join(archive, "Packages"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir, conf := mustApt(t, "a.list", fmt.Sprintf("deb [trusted=yes] copy:%s ./\n", archive))
	for _, name := range []string{"lists/lock", "archives/lock"} {
		lock, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
		if err := unix.FcntlFlock(lock.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
			t.Fatal(err)
		}
	}
	for script, want := range map[string]bool{"": false, ". ./apt.sh; apt_alone \"$1\";": true} {
		cmd := exec.Command("bash", "-euc", script+" apt-get update -q; apt-get install --download-only -qy", "-", t.TempDir())
		cmd.Env = append(os.Environ(), "APT_CONFIG="+conf)
		if out, err := cmd.CombinedOutput(); (err == nil) != want {
			t.Errorf("%q: got %v, want success %v: %s", script, err, want, out)
		}
	}
}

func TestArchive(t *testing.T) {
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
			_, conf := mustApt(t, tc.file, tc.sources)
			for kind, want := range map[string]string{"": tc.main, "-security": tc.security} {
				cmd := exec.Command("bash", "-euc", ". ./apt.sh; archive "+kind)
				cmd.Env = append(os.Environ(), "APT_CONFIG="+conf, "DEBIAN_MIRROR="+tc.variable)
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

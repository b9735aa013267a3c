// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx"
)

const (
	tag     = "v9.9.9-rc.1"
	version = "9.9.9-rc.1"
)

// mustOutput runs a command in a directory and returns what it prints.
func mustOutput(t testing.TB, dir string, env []string, command string, args ...string) string {
	t.Helper()
	cmd := exec.Command(command, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", command, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

// mustRepository makes a repository with the files of this one, as they are now, and a
// tag. Two of them have the same commit.
func mustRepository(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range strings.Split(mustOutput(t, "../..", nil, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"), "\x00") {
		content, err := os.ReadFile(filepath.Join("../..", name))
		if name == "" || errors.Is(err, os.ErrNotExist) {
			continue // deleted, and that is not committed
		}
		if err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if info, err := os.Stat(filepath.Join("../..", name)); err == nil {
			mode = info.Mode()
		}
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, content, mode)); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{
		"GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@localhost", "GIT_AUTHOR_DATE=2026-01-02T03:04:05Z",
		"GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@localhost", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z",
	}
	for _, args := range [][]string{
		{"init", "-q"},
		{"add", "--all"},
		{"commit", "-q", "--message=all"},
		{"tag", tag},
	} {
		mustOutput(t, dir, env, "git", args...)
	}
	return dir
}

func mustFile(t testing.TB, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// TestRelease makes a release in two places. The second one has another path, time, time
// zone, umask and flags for Go, and nothing that the first has compiled.
func TestRelease(t *testing.T) {
	first, second := mustRepository(t), mustRepository(t)
	keys := t.TempDir()
	cosign := func(args ...string) error {
		cmd := exec.Command("go", append([]string{"tool", "cosign"}, args...)...)
		cmd.Dir = "../cosign"
		cmd.Env = append(os.Environ(), "COSIGN_PASSWORD=secret")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cosign %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	for _, name := range []string{"ours", "other"} {
		if err := cosign("generate-key-pair", "--output-key-prefix="+filepath.Join(keys, name)); err != nil {
			t.Fatal(err)
		}
	}
	key := filepath.Join(keys, "ours.key")
	mustOutput(t, first, []string{"COSIGN_PASSWORD=secret", "TZ=UTC"}, "make", "release", "COSIGN_KEY="+key)
	mustOutput(t, second, []string{
		"GOCACHE=" + filepath.Join(t.TempDir(), "cache"), "TZ=Asia/Tokyo", "GOFLAGS=-buildvcs=true", "GOAMD64=v3", "LC_ALL=C",
	}, "sh", "-c", "umask 077 && make release")
	dist := filepath.Join(first, "bin", "dist")

	t.Run("reproducible", func(t *testing.T) {
		if diff := cmp.Diff(string(mustFile(t, filepath.Join(dist, checksums))), string(mustFile(t, filepath.Join(second, "bin", "dist", checksums)))); diff != "" {
			t.Errorf("checksums of two builds (-first +second)\n%s", diff)
		}
		mustOutput(t, dist, nil, "sha256sum", "--check", "--strict", checksums)
		sums := string(mustFile(t, filepath.Join(dist, checksums)))
		for _, name := range []string{
			"podshunt-" + version + "-linux-amd64.tar.gz", "podshunt-" + version + "-linux-arm64.tar.gz", "podshunt-" + version + ".tgz",
			"podshunt-" + version + ".spdx.json", "podshunt-chart-" + version + ".tar", "podshunt-image-" + version + ".tar", "release-notes.md",
		} {
			if !strings.Contains(sums, "  "+name+"\n") {
				t.Errorf("%s has no %s:\n%s", checksums, name, sums)
			}
		}
	})
	t.Run("signature", func(t *testing.T) {
		verify := func(key, file string) error {
			return cosign("verify-blob", "--key="+key, "--insecure-ignore-tlog", "--bundle="+filepath.Join(dist, checksums+".sigstore.json"), file)
		}
		ours, signed := filepath.Join(keys, "ours.pub"), filepath.Join(dist, checksums)
		if err := verify(ours, signed); err != nil {
			t.Error(err)
		}
		changed := filepath.Join(t.TempDir(), checksums)
		if err := os.WriteFile(changed, bytes.Replace(mustFile(t, signed), []byte("0"), []byte("1"), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		for name, err := range map[string]error{"a changed file": verify(ours, changed), "another key": verify(filepath.Join(keys, "other.pub"), signed)} {
			if err == nil || !strings.Contains(err.Error(), "invalid signature") {
				t.Errorf("%s: got error %v, want an invalid signature", name, err)
			}
		}
		if !bytes.Equal(mustFile(t, filepath.Join(dist, "cosign.pub")), mustFile(t, ours)) {
			t.Error("cosign.pub of the release is not the public half of the key")
		}
	})
	t.Run("machines", func(t *testing.T) { testMachines(t, dist) })
	t.Run("sbom", func(t *testing.T) { testSBOM(t, first, dist) })
	t.Run("push", func(t *testing.T) { testPush(t, dist) })
	t.Run("publish", func(t *testing.T) {
		server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
		defer server.Close()
		to := strings.TrimPrefix(server.URL, "http://") + "/podshunt"
		publish := func(key string) error {
			cmd := exec.Command("make", "publish", "REGISTRY="+to, "COSIGN_KEY="+filepath.Join(keys, key))
			cmd.Dir = first
			cmd.Env = append(os.Environ(), "COSIGN_PASSWORD=secret")
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("make publish: %w\n%s", err, out)
			}
			return nil
		}
		if err := publish("other.key"); err == nil || !strings.Contains(err.Error(), "invalid signature") {
			t.Errorf("with a key that did not sign the release: got error %v, want an invalid signature", err)
		}
		if err := publish("ours.key"); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"podshunt", "charts/podshunt"} {
			reference := to + "/" + name + ":" + version
			if err := cosign("verify", "--key="+filepath.Join(keys, "ours.pub"), "--insecure-ignore-tlog", reference); err != nil {
				t.Error(err)
			}
			if err := cosign("verify", "--key="+filepath.Join(keys, "other.pub"), "--insecure-ignore-tlog", reference); err == nil || !strings.Contains(err.Error(), "failed to verify signature") {
				t.Errorf("%s, with another key: got error %v, want a signature that does not hold", name, err)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		if err := os.WriteFile(filepath.Join(second, "new"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("make", "release")
		cmd.Dir = second
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "?? new") {
			t.Errorf("with a file that is not committed: got error %v and\n%s", err, out)
		}
		mustOutput(t, second, nil, "git", "tag", "--delete", tag)
		cmd = exec.Command("make", "release")
		cmd.Dir = second
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "HEAD has no tag") {
			t.Errorf("without a tag: got error %v and\n%s", err, out)
		}
	})
}

// testMachines: the programs of archive and image are of the architecture that it is named by.
func testMachines(t *testing.T, dist string) {
	for architecture, want := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		from, err := gzip.NewReader(bytes.NewReader(mustFile(t, filepath.Join(dist, "podshunt-"+version+"-linux-"+architecture+".tar.gz"))))
		if err != nil {
			t.Fatal(err)
		}
		files := mustFiles(t, from)
		for _, program := range programs {
			binary, err := elf.NewFile(strings.NewReader(files[program]))
			if err != nil {
				t.Errorf("%s for %s: %v", program, architecture, err)
				continue
			}
			if binary.Machine != want {
				t.Errorf("%s for %s: got machine %v, want %v", program, architecture, binary.Machine, want)
			}
		}
		if files["LICENSE"] == "" || files["LICENSE.GPL-2.0"] == "" || files["LICENSE.BSD-2-Clause"] == "" {
			t.Errorf("the archive for %s lacks a licence", architecture)
		}
	}
}

// testSBOM compares the modules with what go list says that the programs import.
func testSBOM(t *testing.T, repository, dist string) {
	document, err := spdxjson.Read(bytes.NewReader(mustFile(t, filepath.Join(dist, "podshunt-"+version+".spdx.json"))))
	if err != nil {
		t.Fatal(err)
	}
	if document.SPDXVersion != "SPDX-2.3" || document.CreationInfo.Created != "2026-01-02T03:04:05Z" {
		t.Errorf("got %s of %s, want SPDX-2.3 of the commit's time", document.SPDXVersion, document.CreationInfo.Created)
	}
	want := map[string]bool{"podshunt " + version: true, "stdlib " + strings.TrimPrefix(strings.TrimSpace(mustOutput(t, repository, nil, "go", "env", "GOVERSION")), "go"): true}
	for _, architecture := range []string{"amd64", "arm64"} {
		list := mustOutput(t, repository, []string{"GOARCH=" + architecture, "CGO_ENABLED=0"}, "go", "list", "-deps",
			"-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}", "./plugin", "./agent")
		for line := range strings.Lines(list) {
			if line = strings.TrimSpace(line); line != "" {
				want[line] = true
			}
		}
	}
	got := map[string]bool{}
	ids := map[spdx.ElementID]bool{"DOCUMENT": true}
	for _, p := range document.Packages {
		got[p.PackageName+" "+p.PackageVersion] = true
		ids[p.PackageSPDXIdentifier] = true
	}
	if diff := cmp.Diff(want, got); diff != "" || len(got) < 20 {
		t.Errorf("modules (-go list +SBOM)\n%s", diff)
	}
	var files []string
	for _, f := range document.Files {
		files = append(files, f.FileName)
		ids[f.FileSPDXIdentifier] = true
	}
	slices.Sort(files)
	if diff := cmp.Diff([]string{"./amd64/podshunt", "./amd64/podshunt-agent", "./arm64/podshunt", "./arm64/podshunt-agent"}, files); diff != "" {
		t.Errorf("files (-want +got)\n%s", diff)
	}
	for _, r := range document.Relationships {
		if !ids[r.RefA.ElementRefID] || !ids[r.RefB.ElementRefID] {
			t.Errorf("%v %s %v names what is not there", r.RefA, r.Relationship, r.RefB)
		}
	}
}

// testPush: what is pushed is what helm pulls, and no other build takes its name.
func testPush(t *testing.T, dist string) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	to := strings.TrimPrefix(server.URL, "http://") + "/podshunt"
	var once, again bytes.Buffer
	if err := errors.Join(push(&once, dist, to), push(&again, dist, to)); err != nil {
		t.Fatal(err)
	}
	if once.String() != again.String() || strings.Count(once.String(), "@sha256:") != 2 {
		t.Errorf("pushed %q, and then %q, want two digests, and the same again", once.String(), again.String())
	}
	pulled := t.TempDir()
	mustOutput(t, "../helm", nil, "go", "tool", "helm", "pull", "oci://"+to+"/charts/podshunt", "--version="+version, "--plain-http", "--destination="+pulled)
	name := "podshunt-" + version + ".tgz"
	if !bytes.Equal(mustFile(t, filepath.Join(pulled, name)), mustFile(t, filepath.Join(dist, name))) {
		t.Error("the chart that helm pulls is not that of the release")
	}
	manifests := mustOutput(t, "../helm", nil, "go", "tool", "helm", "template", "podshunt", filepath.Join(pulled, name), "--kube-version=1.34.0")
	if !strings.Contains(manifests, "ghcr.io/podshunt/podshunt:"+version) {
		t.Errorf("the chart does not ask for the image of the release")
	}
	other := build{top: "../..", version: version, created: time.Unix(1, 0), binaries: mustBinaries(t, time.Now(), "amd64").binaries}
	made := t.TempDir()
	chart, err := other.chart()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.writeImage(filepath.Join(made, "podshunt-image-"+version+".tar"), chart.image); err != nil {
		t.Fatal(err)
	}
	if err := push(io.Discard, made, to); err == nil || !strings.Contains(err.Error(), "not released twice") {
		t.Errorf("another build of the same version: got error %v", err)
	}
}

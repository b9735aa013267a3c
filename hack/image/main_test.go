// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// mustBinaries makes a directory of binaries with a time of modification.
func mustBinaries(t testing.TB, modified time.Time) config {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"podshunt", "podshunt-agent"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("program "+name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, modified, modified); err != nil {
			t.Fatal(err)
		}
	}
	return config{binaries: dir, name: "localhost/podshunt:test", architecture: "amd64"}
}

func mustWrite(t testing.TB, c config) (archive []byte, digest string) {
	t.Helper()
	var out bytes.Buffer
	digest, err := write(&out, c)
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), digest
}

// mustFiles returns the content of each file of a tar, or its kind.
func mustFiles(t testing.TB, from io.Reader) map[string]string {
	t.Helper()
	files := map[string]string{}
	for archive := tar.NewReader(from); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		if !header.ModTime.Equal(time.Unix(0, 0)) || header.Uid != 0 || header.Gid != 0 {
			t.Errorf("%s: got time %s and owner %d:%d, want 0", header.Name, header.ModTime, header.Uid, header.Gid)
		}
		files[header.Name] = string(content)
		if header.Typeflag == tar.TypeSymlink {
			files[header.Name] = "-> " + header.Linkname
		}
	}
}

func sum(content []byte) string {
	s := sha256.Sum256(content)
	return hex.EncodeToString(s[:])
}

func TestReproducible(t *testing.T) {
	first, digest := mustWrite(t, mustBinaries(t, time.Unix(1_000_000, 0)))
	second, again := mustWrite(t, mustBinaries(t, time.Now()))
	if !bytes.Equal(first, second) || digest != again {
		t.Errorf("the same binaries make different archives: %s and %s", digest, again)
	}
	changed := mustBinaries(t, time.Now())
	if err := os.WriteFile(filepath.Join(changed.binaries, "podshunt"), []byte("another"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, other := mustWrite(t, changed); other == digest {
		t.Errorf("other binaries make the same digest %s", digest)
	}
}

// TestLayout follows the references from the index to the programs.
func TestLayout(t *testing.T) {
	archive, digest := mustWrite(t, mustBinaries(t, time.Now()))
	files := mustFiles(t, bytes.NewReader(archive))
	if files["oci-layout"] == "" {
		t.Error("got no file oci-layout")
	}
	type reference struct {
		Digest string
		Size   int
	}
	get := func(r reference) string {
		t.Helper()
		content, ok := files["blobs/"+strings.Replace(r.Digest, ":", "/", 1)]
		if !ok || len(content) != r.Size || "sha256:"+sum([]byte(content)) != r.Digest {
			t.Fatalf("blob %s of %d bytes: got %d bytes, there %t", r.Digest, r.Size, len(content), ok)
		}
		return content
	}
	decode := func(text string, to any) {
		t.Helper()
		if err := json.Unmarshal([]byte(text), to); err != nil {
			t.Fatal(err)
		}
	}
	var index struct {
		Manifests []struct {
			reference
			Annotations map[string]string
		}
	}
	decode(files["index.json"], &index)
	if len(index.Manifests) != 1 || index.Manifests[0].Digest != digest || index.Manifests[0].Annotations["io.containerd.image.name"] != "localhost/podshunt:test" {
		t.Fatalf("got index %+v, want one manifest %s", index, digest)
	}
	var manifest struct {
		Config reference
		Layers []reference
	}
	decode(get(index.Manifests[0].reference), &manifest)
	type settings struct {
		Env, Entrypoint, Cmd []string
		Labels               map[string]string
	}
	var image struct {
		Architecture, OS string
		Created          time.Time
		Config           settings
		RootFS           struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	decode(get(manifest.Config), &image)
	if image.Architecture != "amd64" || image.OS != "linux" || !image.Created.Equal(time.Unix(0, 0)) {
		t.Errorf("got %s/%s of %s, want linux/amd64 of 1970", image.OS, image.Architecture, image.Created)
	}
	if diff := cmp.Diff(settings{
		Env: []string{"PATH=/bin"}, Entrypoint: []string{"podshunt-agent"}, Cmd: []string{"help"},
		Labels: map[string]string{"org.opencontainers.image.source": "https://github.com/podshunt/podshunt"},
	}, image.Config); diff != "" {
		t.Errorf("config (-want +got)\n%s", diff)
	}
	var docker []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	decode(files["manifest.json"], &docker)
	if len(docker) != 1 || files[docker[0].Config] != get(manifest.Config) || len(docker[0].Layers) != 1 ||
		files[docker[0].Layers[0]] != get(manifest.Layers[0]) || !slices.Equal(docker[0].RepoTags, []string{"localhost/podshunt:test"}) {
		t.Errorf("got %+v for docker, want the config and the layer of the image", docker)
	}
	layer, err := gzip.NewReader(strings.NewReader(get(manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	var content bytes.Buffer
	got := mustFiles(t, io.TeeReader(layer, &content))
	want := map[string]string{
		"bin/": "", "bin/podshunt": "program podshunt", "bin/podshunt-agent": "program podshunt-agent",
		"run/": "", "var/": "", "var/run": "-> /run",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("root file system (-want +got)\n%s", diff)
	}
	if _, err := io.Copy(&content, layer); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"sha256:" + sum(content.Bytes())}, image.RootFS.DiffIDs); diff != "" {
		t.Errorf("diff_ids (-want +got)\n%s", diff)
	}
}

func TestMissingBinary(t *testing.T) {
	if _, err := write(io.Discard, config{binaries: t.TempDir(), name: "localhost/podshunt:test"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got error %v, want %v", err, os.ErrNotExist)
	}
}

func TestName(t *testing.T) {
	for _, name := range []string{"", "localhost/podshunt", "localhost/podshunt:a b", "localhost/Podshunt:test"} {
		c := mustBinaries(t, time.Now())
		c.name = name
		if _, err := write(io.Discard, c); err == nil {
			t.Errorf("%q is taken for a name and a tag", name)
		}
	}
}

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
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// mustBinaries makes a directory of binaries with a time of modification.
func mustBinaries(t testing.TB, modified time.Time, architectures ...string) build {
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
	b := build{version: "1.2.3", created: time.Unix(0, 0), binaries: map[string]string{}}
	for _, architecture := range architectures {
		b.binaries[architecture] = dir
	}
	return b
}

func mustWrite(t testing.TB, b build) (archive []byte, digest string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	digest, err := b.writeImage(file, "localhost/podshunt:test")
	if err != nil {
		t.Fatal(err)
	}
	archive, err = os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return archive, digest
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
	first, digest := mustWrite(t, mustBinaries(t, time.Unix(1_000_000, 0), "amd64", "arm64"))
	second, again := mustWrite(t, mustBinaries(t, time.Now(), "amd64", "arm64"))
	if !bytes.Equal(first, second) || digest != again {
		t.Errorf("the same binaries make different archives: %s and %s", digest, again)
	}
	changed := mustBinaries(t, time.Now(), "amd64", "arm64")
	if err := os.WriteFile(filepath.Join(changed.binaries["amd64"], "podshunt"), []byte("another"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, other := mustWrite(t, changed); other == digest {
		t.Errorf("other binaries make the same digest %s", digest)
	}
}

// TestLayout follows the references from the index to the programs.
func TestLayout(t *testing.T) {
	b := mustBinaries(t, time.Now(), "amd64")
	archive, digest := mustWrite(t, b)
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
		Labels: b.labels(),
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

// TestIndex: what the name stands for has an image for each architecture, with its own binaries.
func TestIndex(t *testing.T) {
	b := mustBinaries(t, time.Now(), "amd64")
	b.binaries["arm64"] = mustBinaries(t, time.Now(), "arm64").binaries["arm64"]
	b.revision = "0123abc"
	if err := os.WriteFile(filepath.Join(b.binaries["arm64"], "podshunt"), []byte("for arm64"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	digest, err := b.writeImage(file, "localhost/podshunt:test")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unpack(file, dir); err != nil {
		t.Fatal(err)
	}
	outer, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := v1.NewHash(digest)
	if err != nil {
		t.Fatal(err)
	}
	index, err := outer.ImageIndex(hash)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.labels(), manifest.Annotations); diff != "" || manifest.Annotations["org.opencontainers.image.revision"] != "0123abc" {
		t.Errorf("annotations of the index (-want +got)\n%s", diff)
	}
	got := map[string]string{}
	for _, entry := range manifest.Manifests {
		image, err := index.Image(entry.Digest)
		if err != nil {
			t.Fatal(err)
		}
		config, err := image.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if config.Architecture != entry.Platform.Architecture || config.OS != "linux" || entry.Platform.OS != "linux" || entry.ArtifactType != "" {
			t.Errorf("got entry %+v for an image of %s/%s", entry, config.OS, config.Architecture)
		}
		got[config.Architecture] = mustFiles(t, mutate.Extract(image))["bin/podshunt"]
	}
	if diff := cmp.Diff(map[string]string{"amd64": "program podshunt", "arm64": "for arm64"}, got); diff != "" {
		t.Errorf("plugin of each architecture (-want +got)\n%s", diff)
	}
}

func TestMissingBinary(t *testing.T) {
	b := build{binaries: map[string]string{"amd64": t.TempDir()}}
	if _, err := b.writeImage(filepath.Join(t.TempDir(), "image.tar"), "localhost/podshunt:test"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got error %v, want %v", err, os.ErrNotExist)
	}
}

func TestName(t *testing.T) {
	for _, name := range []string{"", "localhost/podshunt", "localhost/podshunt:a b", "localhost/Podshunt:test"} {
		if _, err := mustBinaries(t, time.Now(), "amd64").writeImage(filepath.Join(t.TempDir(), "image.tar"), name); err == nil {
			t.Errorf("%q is taken for a name and a tag", name)
		}
	}
}

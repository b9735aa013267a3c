// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// imageName is the annotation by whose name containerd keeps what it imports.
const imageName = "io.containerd.image.name"

// writeImage writes an archive of the image, which is an OCI layout that `ctr images
// import`, podman and skopeo take, and returns the digest of what the name stands for:
// of the image, if there is one architecture, and else of an index. With one,
// `docker load` takes it, too.
func (b build) writeImage(file, image string) (digest string, err error) {
	if _, err := name.NewTag(image, name.StrictValidation); err != nil {
		return "", err
	}
	if len(b.binaries) == 0 {
		return "", errors.New("no -binaries")
	}
	return digest, writeLayout(file, func(path layout.Path) (err error) {
		digest, err = b.addImage(path, image)
		return err
	})
}

func (b build) addImage(path layout.Path, image string) (digest string, err error) {
	var images []mutate.IndexAddendum
	for _, architecture := range slices.Sorted(maps.Keys(b.binaries)) {
		img, err := b.image(architecture)
		if err != nil {
			return "", err
		}
		images = append(images, mutate.IndexAddendum{
			Add: runnable{img}, Descriptor: v1.Descriptor{Platform: &v1.Platform{Architecture: architecture, OS: "linux"}},
		})
	}
	var added partial.Describable
	if len(images) > 1 {
		index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), images...)
		index = mutate.Annotations(index, b.labels()).(v1.ImageIndex)
		if err := path.WriteIndex(index); err != nil {
			return "", err
		}
		added = index
	} else {
		img := images[0].Add.(runnable)
		docker, err := dockerManifest(img, image)
		if err != nil {
			return "", err
		}
		if err := errors.Join(path.WriteImage(img), path.WriteFile("manifest.json", docker, 0o644)); err != nil {
			return "", err
		}
		added = img
	}
	entry, err := partial.Descriptor(added)
	if err != nil {
		return "", err
	}
	entry.Annotations = map[string]string{imageName: image}
	if len(images) == 1 {
		entry.Platform = images[0].Platform
	}
	return entry.Digest.String(), path.AppendDescriptor(*entry)
}

// runnable is an image to run: without it the library names the type of the config in an
// index, as if it were something else.
type runnable struct{ v1.Image }

func (runnable) ArtifactType() (string, error) { return "", nil }

// writeLayout writes an archive of an OCI layout to a file.
func writeLayout(file string, fill func(layout.Path) error) (err error) {
	dir, err := os.MkdirTemp("", "podshunt-release-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := fill(path); err != nil {
		return err
	}
	files, err := filesOf(os.DirFS(dir))
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := writeTar(&archive, files); err != nil {
		return err
	}
	return os.WriteFile(file, archive.Bytes(), 0o644)
}

// labels are what registries and scanners show of the image.
func (b build) labels() map[string]string {
	labels := map[string]string{
		"org.opencontainers.image.source":      repository,
		"org.opencontainers.image.title":       "podshunt",
		"org.opencontainers.image.description": "TCP between two pods of one Kubernetes node skips the TCP/IP stack, safely",
		"org.opencontainers.image.licenses":    licence,
		"org.opencontainers.image.version":     b.version,
	}
	if b.revision != "" {
		labels["org.opencontainers.image.revision"] = b.revision
		labels["org.opencontainers.image.created"] = b.created.UTC().Format(time.RFC3339)
	}
	return labels
}

// image returns the image of an architecture, not yet written anywhere.
func (b build) image(architecture string) (v1.Image, error) {
	root, err := rootFiles(b.binaries[architecture])
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(root)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.DefaultCompression), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	base, err := empty.Image.ConfigFile()
	if err != nil {
		return nil, err
	}
	settings := base.DeepCopy()
	settings.Created = v1.Time{Time: b.created.UTC()}
	settings.OS, settings.Architecture = "linux", architecture
	settings.Config = v1.Config{
		Env:        []string{"PATH=/bin"},
		Entrypoint: []string{"podshunt-agent"},
		Cmd:        []string{"help"},
		Labels:     b.labels(),
	}
	img, err := mutate.ConfigFile(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), settings)
	if err != nil {
		return nil, err
	}
	return mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: settings.Created, CreatedBy: "hack/release"}})
}

// dockerManifest is for docker load before version 25, which does not know the layout.
func dockerManifest(img v1.Image, name string) ([]byte, error) {
	manifest, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	path := func(d v1.Descriptor) string { return "blobs/" + d.Digest.Algorithm + "/" + d.Digest.Hex }
	return json.Marshal(tarball.Manifest{{
		Config: path(manifest.Config), RepoTags: []string{name}, Layers: []string{path(manifest.Layers[0])},
	}})
}

// filesOf returns the files of a directory in the order of their paths.
func filesOf(dir fs.FS) ([]file, error) {
	var files []file
	err := fs.WalkDir(dir, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := fs.ReadFile(dir, path)
		files = append(files, file{name: path, content: content})
		return err
	})
	return files, err
}

// rootFiles returns the root file system as a tar.
func rootFiles(binaries string) ([]byte, error) {
	files := []file{{name: "bin/", mode: 0o755}}
	for _, name := range programs {
		content, err := os.ReadFile(filepath.Join(binaries, name))
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: "bin/" + name, mode: 0o755, content: content})
	}
	files = append(files,
		file{name: "run/", mode: 0o755},
		file{name: "var/", mode: 0o755},
		// Runtimes name network namespaces by either path; the agent has one mount.
		file{name: "var/run", link: "/run"})
	var out bytes.Buffer
	err := writeTar(&out, files)
	return out.Bytes(), err
}

// file is a directory if its name ends with a slash, and a symbolic link if it has a target.
type file struct {
	name, link string
	mode       int64 // 0 means 0o644
	content    []byte
}

// writeTar gives every file the time 0 and root as its owner.
func writeTar(w io.Writer, files []file) error {
	t := tar.NewWriter(w)
	for _, f := range files {
		header := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content)), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
		switch {
		case f.link != "":
			header.Typeflag, header.Linkname, header.Mode = tar.TypeSymlink, f.link, 0o777
		case f.name[len(f.name)-1] == '/':
			header.Typeflag = tar.TypeDir
		case f.mode == 0:
			header.Mode = 0o644
		}
		if err := t.WriteHeader(header); err != nil {
			return fmt.Errorf("add %s: %w", f.name, err)
		}
		if _, err := t.Write(f.content); err != nil {
			return fmt.Errorf("add %s: %w", f.name, err)
		}
	}
	return t.Close()
}

// SPDX-License-Identifier: Apache-2.0

// Image packs podshunt's container image without a container engine, as
// Dockerfile in the top directory describes it. The archive is an OCI layout that
// `ctr images import`, `docker load`, podman and skopeo take; the same binaries
// make the same bytes.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
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

func main() {
	var c config
	flag.StringVar(&c.binaries, "binaries", "bin", "`directory` of podshunt and podshunt-agent")
	flag.StringVar(&c.name, "name", "ghcr.io/podshunt/podshunt:devel", "name and tag of the image")
	flag.StringVar(&c.architecture, "architecture", runtime.GOARCH, "that of the binaries")
	output := flag.String("o", "bin/podshunt-image.tar", "`file` to write")
	flag.Parse()
	if err := run(c, *output); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

type config struct {
	binaries, name, architecture string
}

func run(c config, output string) error {
	var archive bytes.Buffer
	digest, err := write(&archive, c)
	if err != nil {
		return err
	}
	if err := os.WriteFile(output, archive.Bytes(), 0o644); err != nil {
		return err
	}
	_, err = fmt.Printf("%s: %s, %s\n", output, c.name, digest)
	return err
}

// write writes the archive to w and returns the digest of the manifest.
func write(w io.Writer, c config) (digest string, err error) {
	if _, err := name.NewTag(c.name, name.StrictValidation); err != nil {
		return "", err
	}
	img, err := image(c)
	if err != nil {
		return "", err
	}
	entry, err := partial.Descriptor(img)
	if err != nil {
		return "", err
	}
	// By this name containerd keeps what it imports.
	entry.Annotations = map[string]string{"io.containerd.image.name": c.name}
	entry.Platform = &v1.Platform{Architecture: c.architecture, OS: "linux"}
	// The library names the type of the config, as if this were no image to run.
	entry.ArtifactType = ""
	docker, err := dockerManifest(img, c.name)
	if err != nil {
		return "", err
	}

	dir, err := os.MkdirTemp("", "podshunt-image-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return "", err
	}
	if err := errors.Join(path.WriteImage(img), path.AppendDescriptor(*entry), path.WriteFile("manifest.json", docker, 0o644)); err != nil {
		return "", err
	}
	files, err := filesOf(os.DirFS(dir))
	if err != nil {
		return "", err
	}
	return entry.Digest.String(), writeTar(w, files)
}

// image returns the image, not yet written anywhere.
func image(c config) (v1.Image, error) {
	root, err := rootFiles(c.binaries)
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
	// One time for all builds: the same binaries make the same bytes.
	settings.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	settings.OS, settings.Architecture = "linux", c.architecture
	settings.Config = v1.Config{
		Env:        []string{"PATH=/bin"},
		Entrypoint: []string{"podshunt-agent"},
		Cmd:        []string{"help"},
		Labels:     map[string]string{"org.opencontainers.image.source": "https://github.com/podshunt/podshunt"},
	}
	img, err := mutate.ConfigFile(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), settings)
	if err != nil {
		return nil, err
	}
	return mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: settings.Created, CreatedBy: "hack/image"}})
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
	for _, name := range []string{"podshunt", "podshunt-agent"} {
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

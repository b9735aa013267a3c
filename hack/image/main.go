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
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
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

// object is a JSON object; its keys are written in order.
type object = map[string]any

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
	layer, err := layer(c.binaries)
	if err != nil {
		return "", err
	}
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped) // its header has no time unless one is set
	if _, err := z.Write(layer); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", err
	}

	var failed error
	encode := func(value any) []byte {
		text, err := json.Marshal(value)
		failed = errors.Join(failed, err)
		return text
	}
	var blobs []file
	blob := func(mediaType string, content []byte) object {
		blobs = append(blobs, file{name: "blobs/sha256/" + sum(content), content: content})
		return object{"mediaType": mediaType, "digest": "sha256:" + sum(content), "size": len(content)}
	}
	layerBlob := blob("application/vnd.oci.image.layer.v1.tar+gzip", zipped.Bytes())
	configBlob := blob("application/vnd.oci.image.config.v1+json", encode(object{
		"architecture": c.architecture,
		"os":           "linux",
		"config": object{
			"Env":        []string{"PATH=/bin"},
			"Entrypoint": []string{"podshunt-agent"},
			"Cmd":        []string{"help"},
			"Labels":     object{"org.opencontainers.image.source": "https://github.com/podshunt/podshunt"},
		},
		"rootfs": object{"type": "layers", "diff_ids": []string{"sha256:" + sum(layer)}},
	}))
	manifest := blob("application/vnd.oci.image.manifest.v1+json", encode(object{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.manifest.v1+json",
		"config":        configBlob,
		"layers":        []object{layerBlob},
	}))
	manifest["annotations"] = object{"io.containerd.image.name": c.name}
	manifest["platform"] = object{"architecture": c.architecture, "os": "linux"}
	digest = manifest["digest"].(string)

	path := func(o object) string { return "blobs/sha256/" + o["digest"].(string)[len("sha256:"):] }
	files := append([]file{
		{name: "oci-layout", content: encode(object{"imageLayoutVersion": "1.0.0"})},
		{name: "index.json", content: encode(object{"schemaVersion": 2, "manifests": []object{manifest}})},
		// For docker load before version 25, which does not know the layout.
		{name: "manifest.json", content: encode([]object{{
			"Config": path(configBlob), "RepoTags": []string{c.name}, "Layers": []string{path(layerBlob)},
		}})},
	}, blobs...)
	return digest, errors.Join(failed, writeTar(w, files))
}

// layer returns the root file system.
func layer(binaries string) ([]byte, error) {
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

func sum(content []byte) string {
	s := sha256.Sum256(content)
	return hex.EncodeToString(s[:])
}

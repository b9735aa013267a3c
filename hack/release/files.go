// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// checksums is the file that is signed: it stands for all the others.
const checksums = "checksums.txt"

// writeFiles makes all files of a release in a directory.
func (b build) writeFiles(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	path := func(format string, args ...any) string { return filepath.Join(dir, fmt.Sprintf(format, args...)) }
	chart, err := b.chart()
	if err != nil {
		return err
	}
	if err := os.WriteFile(path("%s", chart.file()), chart.archive, 0o644); err != nil {
		return err
	}
	if _, err := chart.writeOCI(path(chartArchive, b.version), b.created); err != nil {
		return err
	}
	if _, err := b.writeImage(path(imageArchive, b.version), chart.image); err != nil {
		return err
	}
	for _, architecture := range slices.Sorted(maps.Keys(b.binaries)) {
		archive, err := b.binaryArchive(architecture)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path("podshunt-%s-linux-%s.tar.gz", b.version, architecture), archive, 0o644); err != nil {
			return err
		}
	}
	sbom, err := b.sbom()
	if err != nil {
		return err
	}
	if err := os.WriteFile(path("podshunt-%s.spdx.json", b.version), sbom, 0o644); err != nil {
		return err
	}
	notes, err := b.releaseNotes()
	if err != nil {
		return err
	}
	if err := os.WriteFile(path("release-notes.md"), []byte(notes), 0o644); err != nil {
		return err
	}
	return writeChecksums(dir)
}

// binaryArchive returns the binaries of an architecture, with their licences.
func (b build) binaryArchive(architecture string) ([]byte, error) {
	var files []file
	for _, program := range programs {
		content, err := os.ReadFile(filepath.Join(b.binaries[architecture], program))
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: program, mode: 0o755, content: content})
	}
	for _, path := range []string{"LICENSE", "bpf/LICENSE.GPL-2.0", "bpf/LICENSE.BSD-2-Clause"} {
		content, err := os.ReadFile(filepath.Join(b.top, path))
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: filepath.Base(path), content: content})
	}
	return compressed(files)
}

func compressed(files []file) ([]byte, error) {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if err := writeTar(w, files); err != nil {
		return nil, err
	}
	err := w.Close()
	return out.Bytes(), err
}

// writeChecksums writes, for sha256sum --check, the sums of a directory's files.
func writeChecksums(dir string) error {
	files, err := filesOf(os.DirFS(dir))
	if err != nil {
		return err
	}
	var out bytes.Buffer
	for _, f := range files {
		if f.name != checksums {
			fmt.Fprintf(&out, "%x  %s\n", sha256.Sum256(f.content), f.name)
		}
	}
	return os.WriteFile(filepath.Join(dir, checksums), out.Bytes(), 0o644)
}

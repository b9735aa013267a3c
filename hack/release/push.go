// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// The archives of image and chart, by version.
const (
	imageArchive = "podshunt-image-%s.tar"
	chartArchive = "podshunt-chart-%s.tar"
)

// push copies a release's image to REGISTRY/podshunt and its chart to
// REGISTRY/charts/podshunt, byte by byte, and prints the name and digest of each. It
// writes over no other build of the same version.
func push(stdout io.Writer, from, to string) error {
	for _, archive := range []struct{ pattern, repository string }{
		{imageArchive, "podshunt"}, {chartArchive, "charts/podshunt"},
	} {
		found, err := filepath.Glob(filepath.Join(from, fmt.Sprintf(archive.pattern, "*")))
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return fmt.Errorf("%d files %s in %s, want one: run make release", len(found), fmt.Sprintf(archive.pattern, "VERSION"), from)
		}
		before, after, _ := strings.Cut(archive.pattern, "%s")
		version := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(found[0]), before), after)
		tag, err := name.NewTag(to+"/"+archive.repository+":"+version, name.StrictValidation)
		if err != nil {
			return err
		}
		digest, err := pushArchive(found[0], tag)
		if err != nil {
			return fmt.Errorf("push %s: %w", tag, err)
		}
		if _, err := fmt.Fprintf(stdout, "%s@%s\n", tag.Context(), digest); err != nil {
			return err
		}
	}
	return nil
}

func pushArchive(file string, tag name.Tag) (_ v1.Hash, err error) {
	dir, err := os.MkdirTemp("", "podshunt-push-")
	if err != nil {
		return v1.Hash{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := unpack(file, dir); err != nil {
		return v1.Hash{}, err
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return v1.Hash{}, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return v1.Hash{}, err
	}
	if len(manifest.Manifests) != 1 {
		return v1.Hash{}, fmt.Errorf("%s has %d manifests, want one", file, len(manifest.Manifests))
	}
	digest := manifest.Manifests[0].Digest
	options := []remote.Option{remote.WithAuthFromKeychain(authn.DefaultKeychain)}
	there, err := remote.Head(tag, options...)
	var refused *transport.Error
	switch {
	case err == nil && there.Digest != digest:
		return v1.Hash{}, fmt.Errorf("it is there already, with digest %s; a version is not released twice", there.Digest)
	case err == nil:
		return digest, nil
	case !errors.As(err, &refused) || refused.StatusCode != http.StatusNotFound:
		return v1.Hash{}, err
	}
	if manifest.Manifests[0].MediaType.IsIndex() {
		images, err := index.ImageIndex(digest)
		if err != nil {
			return v1.Hash{}, err
		}
		return digest, remote.WriteIndex(tag, images, options...)
	}
	image, err := index.Image(digest)
	if err != nil {
		return v1.Hash{}, err
	}
	return digest, remote.Write(tag, image, options...)
}

// unpack unpacks a tar of regular files.
func unpack(file, dir string) error {
	archive, err := os.Open(file)
	if err != nil {
		return err
	}
	defer archive.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for r := tar.NewReader(archive); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if err := root.MkdirAll(filepath.Dir(header.Name), 0o755); err != nil {
			return err
		}
		if err := root.WriteFile(header.Name, content, 0o644); err != nil {
			return err
		}
	}
}

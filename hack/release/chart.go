// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/Masterminds/semver/v3"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	helmregistry "helm.sh/helm/v3/pkg/registry"
	"sigs.k8s.io/yaml"
)

// chart is the packaged chart.
type chart struct {
	name, version string
	// image is what it installs.
	image   string
	archive []byte
}

func (c chart) file() string { return c.name + "-" + c.version + ".tgz" }

// chart packages the chart for the version, with what Artifact Hub shows of it.
func (b build) chart() (_ chart, err error) {
	version, err := semver.StrictNewVersion(b.version)
	if err != nil {
		return chart{}, fmt.Errorf("version %q: %w: helm takes 1.2.3 or 1.2.3-rc.1", b.version, err)
	}
	source, err := loader.LoadDir(filepath.Join(b.top, "charts", "podshunt"))
	if err != nil {
		return chart{}, err
	}
	values, _ := source.Values["image"].(map[string]any)
	image := fmt.Sprintf("%v:%s", values["repository"], b.version)
	if _, err := name.NewTag(image, name.StrictValidation); err != nil {
		return chart{}, fmt.Errorf("image.repository of the chart: %w", err)
	}
	notes, err := b.notes()
	if err != nil {
		return chart{}, err
	}
	images, err1 := yaml.Marshal([]map[string]any{{"name": "podshunt", "image": image, "platforms": []string{"linux/amd64", "linux/arm64"}}})
	changes, err2 := yaml.Marshal(changesOf(notes))
	if err := errors.Join(err1, err2); err != nil {
		return chart{}, err
	}
	source.Metadata.Version, source.Metadata.AppVersion = b.version, b.version
	if source.Metadata.Annotations == nil {
		source.Metadata.Annotations = map[string]string{}
	}
	for key, value := range map[string]string{
		"images":     string(images),
		"changes":    string(changes),
		"prerelease": strconv.FormatBool(version.Prerelease() != ""),
	} {
		source.Metadata.Annotations["artifacthub.io/"+key] = value
	}

	dir, err := os.MkdirTemp("", "podshunt-chart-")
	if err != nil {
		return chart{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path, err := chartutil.Save(source, dir)
	if err != nil {
		return chart{}, err
	}
	saved, err := os.ReadFile(path)
	if err != nil {
		return chart{}, err
	}
	archive, err := timeless(saved)
	return chart{name: source.Name(), version: b.version, image: image, archive: archive}, err
}

// timeless returns a compressed tar with 1970 for the time of each file.
func timeless(archive []byte) ([]byte, error) {
	from, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		return nil, err
	}
	var files []file
	for r := tar.NewReader(from); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return compressed(files)
		}
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: header.Name, mode: header.Mode, content: content})
	}
}

// writeOCI writes an archive of an OCI layout that has the chart, in the form in which
// helm itself pushes it: here to a registry of this process.
func (c chart) writeOCI(file string, created time.Time) (digest string, err error) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	client, err := helmregistry.NewClient(helmregistry.ClientOptPlainHTTP(), helmregistry.ClientOptWriter(io.Discard))
	if err != nil {
		return "", err
	}
	ref := strings.TrimPrefix(server.URL, "http://") + "/charts/" + c.name + ":" + c.version
	if _, err := client.Push(c.archive, ref, helmregistry.PushOptCreationTime(created.UTC().Format(time.RFC3339))); err != nil {
		return "", err
	}
	// A version with a + has another tag.
	tag, err := name.NewTag(strings.ReplaceAll(ref, "+", "_"))
	if err != nil {
		return "", err
	}
	pushed, err := remote.Image(tag)
	if err != nil {
		return "", err
	}
	hash, err := pushed.Digest()
	if err != nil {
		return "", err
	}
	return hash.String(), writeLayout(file, func(path layout.Path) error {
		return path.AppendImage(pushed, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag.TagStr()}))
	})
}

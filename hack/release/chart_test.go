// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"sigs.k8s.io/yaml"
)

// TestChart: the time at which helm packages the chart is nowhere in it, and Artifact
// Hub finds there what it shows.
func TestChart(t *testing.T) {
	b := build{top: "../..", version: "1.2.3-rc.1", created: time.Unix(0, 0)}
	chart, err := b.chart()
	if err != nil {
		t.Fatal(err)
	}
	from, err := gzip.NewReader(bytes.NewReader(chart.archive))
	if err != nil {
		t.Fatal(err)
	}
	var metadata struct {
		Version, AppVersion string
		Annotations         map[string]string
	}
	// It fails for a time other than 0.
	if err := yaml.Unmarshal([]byte(mustFiles(t, from)["podshunt/Chart.yaml"]), &metadata); err != nil {
		t.Fatal(err)
	}
	if metadata.Version != b.version || metadata.AppVersion != b.version {
		t.Errorf("got version %q and appVersion %q, want %q", metadata.Version, metadata.AppVersion, b.version)
	}
	var images []struct {
		Name, Image string
		Platforms   []string
	}
	if err := yaml.Unmarshal([]byte(metadata.Annotations["artifacthub.io/images"]), &images); err != nil {
		t.Fatal(err)
	}
	if len(images) != 1 || images[0].Image != "ghcr.io/podshunt/podshunt:1.2.3-rc.1" || len(images[0].Platforms) != 2 {
		t.Errorf("got images %+v, want the one that the chart installs, for two architectures", images)
	}
	var changes []string
	if err := yaml.Unmarshal([]byte(metadata.Annotations["artifacthub.io/changes"]), &changes); err != nil || len(changes) == 0 {
		t.Errorf("got changes %q and error %v", changes, err)
	}
	if got := metadata.Annotations["artifacthub.io/prerelease"]; got != "true" {
		t.Errorf("got prerelease %q for %s", got, b.version)
	}
	b.version = "1.2"
	if _, err := b.chart(); err == nil {
		t.Error("1.2 is taken for a version")
	}
}

// TestChartArchive: the OCI layout has the chart as helm pushes it, and is the same twice.
func TestChartArchive(t *testing.T) {
	b := build{top: "../..", version: "1.2.3-rc.1", created: time.Unix(1_000_000, 0)}
	chart, err := b.chart()
	if err != nil {
		t.Fatal(err)
	}
	files := [2]string{filepath.Join(t.TempDir(), "chart.tar"), filepath.Join(t.TempDir(), "chart.tar")}
	var digests [2]string
	for i, file := range files {
		if digests[i], err = chart.writeOCI(file, b.created); err != nil {
			t.Fatal(err)
		}
	}
	first, err1 := os.ReadFile(files[0])
	second, err2 := os.ReadFile(files[1])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) || digests[0] != digests[1] {
		t.Errorf("the same chart makes different archives: %q", digests)
	}
	dir := t.TempDir()
	if err := unpack(files[0], dir); err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	outer, err := index.IndexManifest()
	if err != nil || len(outer.Manifests) != 1 || outer.Manifests[0].Digest.String() != digests[0] {
		t.Fatalf("got index %+v and error %v, want the manifest %s", outer, err, digests[0])
	}
	image, err := index.Image(outer.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	const config, content = "application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
	if manifest.Config.MediaType != types.MediaType(config) || len(manifest.Layers) != 1 || manifest.Layers[0].MediaType != types.MediaType(content) {
		t.Fatalf("got manifest %+v, want a config %s and a layer %s", manifest, config, content)
	}
	if got := manifest.Layers[0].Digest.Hex; got != sum(chart.archive) {
		t.Errorf("got layer %s, want the chart, %s", got, sum(chart.archive))
	}
	if got := manifest.Annotations["org.opencontainers.image.created"]; got != "1970-01-12T13:46:40Z" {
		t.Errorf("got created %q, want the time of the commit", got)
	}
}

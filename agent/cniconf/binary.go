// SPDX-License-Identifier: Apache-2.0

// The plugin's binary in the directory that the runtime starts plugins from.

package cniconf

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"

	"github.com/podshunt/podshunt/api"
)

// versionTimeout bounds how long the plugin may take to print its CNI versions.
const versionTimeout = 10 * time.Second

// binary keeps a copy of the plugin where the runtime looks for it.
type binary struct {
	source, path string
	// installed and wanted describe the two files as they were when last found equal.
	installed, wanted os.FileInfo
	// versions are the CNI versions that the copy supports, by its own last
	// answer.
	versions []string
}

// reconcile makes the copy equal to the source. Whoever runs the copy gets the whole
// old one or the whole new one. The new copy is asked for its versions before it
// gets its name: one that cannot run on this node, because of a mount with noexec or
// another architecture, never gets it. After an error, versions has the versions of
// an older copy that is there and runs, or none.
func (b *binary) reconcile() error {
	err := b.install()
	if err != nil {
		b.installed, b.wanted = nil, nil
		b.versions, _ = versions(b.path)
	}
	return err
}

func (b *binary) install() error {
	wanted, err := os.Stat(b.source)
	if err != nil {
		return fmt.Errorf("plugin to install: %w", err)
	}
	if installed, err := os.Stat(b.path); err == nil && same(installed, b.installed) && same(wanted, b.wanted) {
		return nil
	}
	content, err := os.ReadFile(b.source)
	if err != nil {
		return fmt.Errorf("plugin to install: %w", err)
	}
	if err := b.write(content); err != nil {
		return fmt.Errorf("install plugin: %w", err)
	}
	b.wanted = wanted
	b.installed, err = os.Stat(b.path)
	return err
}

func same(a, b os.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}

// write writes the content to the copy, unless it is there already, and asks for its
// versions.
func (b *binary) write(content []byte) error {
	present, err := os.ReadFile(b.path)
	if info, statErr := os.Stat(b.path); err == nil && statErr == nil && bytes.Equal(present, content) && info.Mode().Perm()&0o111 == 0o111 {
		b.versions, err = versions(b.path)
		return err
	}
	temp := b.path + tempExtension
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(0o755)
	}
	// Close it first: a file that is open for writing cannot be executed.
	err = finish(f, err)
	if err == nil {
		b.versions, err = versions(temp)
	}
	return publish(temp, err, b.path)
}

// versions asks a plugin for the CNI versions that it supports.
func versions(path string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: io.Discard}}
	info, err := invoke.GetVersionInfo(ctx, path, exec)
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", path, err)
	}
	return info.SupportedVersions(), nil
}

// checkVersions returns an error if a runtime could call the plugin with a CNI
// version that it does not support: then no pod would start. Of several versions in
// a configuration, each runtime may choose another.
func (ins *Installer) checkVersions(f file) error {
	var keys map[string]any
	if err := json.Unmarshal(f.data, &keys); err != nil {
		return fmt.Errorf("read versions of %s: %w", f.path, err)
	}
	versions, _ := keys["cniVersions"].([]any)
	if version, ok := keys["cniVersion"]; ok || len(versions) == 0 {
		versions = append(versions, version)
	}
	for _, version := range versions {
		if text, _ := version.(string); !slices.Contains(ins.binary.versions, text) {
			return fmt.Errorf("%s has the CNI version %q; accepted are %s: raise it there if the network's plugins support one of them",
				f.path, text, strings.Join(ins.binary.versions, ", "))
		}
	}
	return nil
}

func newBinary(source, dir string) binary {
	return binary{source: source, path: filepath.Join(dir, api.PluginType)}
}

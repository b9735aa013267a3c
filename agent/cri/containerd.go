// SPDX-License-Identifier: Apache-2.0

// The configuration of containerd.

package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

const (
	containerdConfig  = "/etc/containerd/config.toml"
	containerdAddress = "/run/containerd/containerd.sock"
	// maxImports is far above what anybody imports.
	maxImports = 256
)

// criPlugins are the names of the plugin that serves the kubelet, in versions 1, 2, and 3
// and later of the configuration.
func criPlugins() []string {
	return []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"}
}

// readContainerd reads what containerd has read when it started, unless that was changed
// since.
func readContainerd(f *Found) error {
	f.Name = api.Containerd
	args := f.process.args()
	f.address = last(values(args, "address", "a"))
	main := last(values(args, "config", "c"))
	files, err := readImports(f.Root, main)
	if err != nil {
		return err
	}
	for _, file := range files {
		f.Sources = append(f.Sources, file.path)
	}
	// Up to 1.7, a plugin's section in an import replaces that of the importing file;
	// later versions of containerd merge the two.
	replaced, err1 := parseContainerd(files, false)
	merged, err2 := parseContainerd(files, true)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if !reflect.DeepEqual(replaced, merged) {
		return fmt.Errorf("%s: several of them have the settings of CNI, and versions of containerd differ in which count: put all of them into one", strings.Join(f.Sources, ", "))
	}
	if f.address == "" {
		f.address = merged.address
	}
	if merged.disabled {
		return errNoCRI
	}
	f.ConfDir, f.BinDirs, f.Networks = merged.ConfDir, merged.BinDirs, merged.Networks
	return nil
}

// tomlFile is a decoded file.
type tomlFile struct {
	path string
	keys map[string]any
}

// readImports reads a file and those that it imports, in the order in which they count:
// later ones win. Without a name it is the default, which need not be there.
func readImports(root nodefs.Root, main string) (files []tomlFile, err error) {
	optional := main == ""
	if optional {
		main = containerdConfig
	}
	pending := []string{main}
	for len(pending) > 0 && len(files) < maxImports {
		file := tomlFile{path: pending[0]}
		pending = pending[1:]
		data, err := root.ReadFile(file.path)
		if optional && errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		optional = false
		if err := toml.Unmarshal(data, &file.keys); err != nil {
			return nil, fmt.Errorf("%s: %w", file.path, err)
		}
		if slices.ContainsFunc(files, func(f tomlFile) bool { return f.path == file.path }) {
			continue // an import that imports its importer
		}
		files = append(files, file)
		for _, pattern := range texts(file.keys["imports"]) {
			if !path.IsAbs(pattern) {
				pattern = path.Join(path.Dir(file.path), pattern)
			}
			pending = append(pending, glob(root, pattern)...)
		}
	}
	return files, nil
}

// glob returns the files whose names match a pattern, as containerd's imports may have in
// their last element. A pattern without special characters matches itself.
func glob(root nodefs.Root, pattern string) (found []string) {
	dir, last := path.Split(pattern)
	if !strings.ContainsAny(last, `*?[\`) {
		return []string{pattern}
	}
	names, err := root.ReadDir(dir)
	if err != nil {
		return nil // there may be none
	}
	for _, name := range names {
		if matched, err := path.Match(last, name); err == nil && matched {
			found = append(found, dir+name)
		}
	}
	return found
}

// containerdSettings is what matters of a configuration.
type containerdSettings struct {
	api.Runtime
	address  string
	disabled bool
}

func parseContainerd(files []tomlFile, merge bool) (containerdSettings, error) {
	s := containerdSettings{Runtime: api.Runtime{ConfDir: defaultConfDir, BinDirs: []string{defaultBinDir}, Networks: 1}, address: containerdAddress}
	plugins := map[string]any{}
	for _, file := range files {
		for _, disabled := range texts(file.keys["disabled_plugins"]) {
			s.disabled = s.disabled || slices.Contains(criPlugins(), disabled)
		}
		for _, server := range []map[string]any{table(file.keys, "grpc"), table(file.keys, "plugins", "io.containerd.server.v1.grpc")} {
			if address, ok := server["address"].(string); ok && address != "" {
				s.address = address
			}
		}
		for name, section := range table(file.keys, "plugins") {
			if slices.Contains(criPlugins(), name) {
				section, _ := section.(map[string]any)
				put(plugins, "cri", section, merge)
			}
		}
	}
	cni := table(plugins, "cri", "cni")
	if dir, ok := cni["conf_dir"].(string); ok && dir != "" {
		s.ConfDir = dir
	}
	// bin_dir is older than bin_dirs, which may not be set with it.
	if dirs := append(texts(cni["bin_dirs"]), texts(cni["bin_dir"])...); len(dirs) > 0 {
		s.BinDirs = dirs
	}
	if number, ok := cni["max_conf_num"].(int64); ok {
		if number < 0 {
			return s, fmt.Errorf("max_conf_num is %d", number)
		}
		s.Networks = int(number)
	}
	return s, nil
}

// put copies a section into a table, instead of the one that is there, or merged with that.
func put(into map[string]any, name string, section map[string]any, merge bool) {
	there, ok := into[name].(map[string]any)
	if !ok || !merge {
		there = map[string]any{}
		into[name] = there
	}
	for key, value := range section {
		if inner, ok := value.(map[string]any); ok {
			put(there, key, inner, merge)
		} else {
			there[key] = value
		}
	}
}

// table returns the table at a path of keys, or an empty one.
func table(keys map[string]any, path ...string) map[string]any {
	for _, key := range path {
		keys, _ = keys[key].(map[string]any)
	}
	return keys
}

// texts returns the text or texts of a value.
func texts(value any) (all []string) {
	switch value := value.(type) {
	case string:
		if value != "" {
			all = append(all, value)
		}
	case []any:
		for _, v := range value {
			all = append(all, texts(v)...)
		}
	}
	return all
}

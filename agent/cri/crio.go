// SPDX-License-Identifier: Apache-2.0

// The configuration of CRI-O and of cri-dockerd.

package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

const (
	crioConfig    = "/etc/crio/crio.conf"
	crioConfigDir = "/etc/crio/crio.conf.d"
)

// crioFile is what matters of a file of CRI-O's. A key that is absent leaves what an
// earlier file says.
type crioFile struct {
	CRIO struct {
		Network struct {
			NetworkDir        *string  `toml:"network_dir"`
			PluginDir         *string  `toml:"plugin_dir"` // deprecated
			PluginDirs        []string `toml:"plugin_dirs"`
			CNIDefaultNetwork *string  `toml:"cni_default_network"`
		} `toml:"network"`
	} `toml:"crio"`
}

// readCRIO reads the file, then those in and below the directory, the environment and the command
// line, of which later ones win.
func readCRIO(f *Found) error {
	f.Name, f.ConfDir, f.BinDirs, f.Networks = api.CRIO, defaultConfDir, []string{defaultBinDir}, 1
	args := f.process.args()
	files := []string{crioConfig}
	if main := last(values(args, "config", "c")); main != "" {
		files[0] = main
	}
	dir := crioConfigDir
	if given := values(args, "config-dir", "d"); len(given) > 0 {
		dir = last(given)
	}
	added, err := filesBelow(f.Root, dir)
	if err != nil {
		return err
	}
	for _, file := range append(files, added...) {
		if err := f.readCRIOFile(file); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	env := func(name string) (found []string) {
		for _, entry := range f.process.words("environ") {
			if value, ok := strings.CutPrefix(entry, name+"="); ok && value != "" {
				found = []string{value}
			}
		}
		return found
	}
	f.override(environment, env("CONTAINER_CNI_CONFIG_DIR"), env("CONTAINER_CNI_PLUGIN_DIR"), env("CONTAINER_CNI_DEFAULT_NETWORK"))
	f.override(commandLine, values(args, "cni-config-dir"), values(args, "cni-plugin-dir"), values(args, "cni-default-network"))
	return nil
}

// filesBelow returns the files in and below a directory, in the order in which CRI-O reads
// them.
func filesBelow(root nodefs.Root, dir string) (files []string, err error) {
	names, err := root.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, name := range names {
		at := path.Join(dir, name)
		st, err := root.Stat(at)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			files = append(files, at)
			continue
		}
		below, err := filesBelow(root, at)
		if err != nil {
			return nil, err
		}
		files = append(files, below...)
	}
	return files, nil
}

func (f *Found) readCRIOFile(file string) error {
	data, err := f.Root.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var keys crioFile
	if err := toml.Unmarshal(data, &keys); err != nil {
		return err
	}
	f.Sources = append(f.Sources, file)
	network := keys.CRIO.Network
	if network.NetworkDir != nil && *network.NetworkDir != "" {
		f.ConfDir = *network.NetworkDir
	}
	if network.PluginDirs != nil {
		f.BinDirs = network.PluginDirs
	}
	if network.PluginDir != nil && *network.PluginDir != "" {
		f.BinDirs = append(f.BinDirs, *network.PluginDir)
	}
	if network.CNIDefaultNetwork != nil {
		f.Network = *network.CNIDefaultNetwork
	}
	return nil
}

// override takes what is given elsewhere than in files.
func (f *Found) override(source string, confDir, binDirs, network []string) {
	if len(confDir)+len(binDirs)+len(network) == 0 {
		return
	}
	f.Sources = append(f.Sources, source)
	if len(confDir) > 0 {
		f.ConfDir = last(confDir)
	}
	if dirs := listed(binDirs); len(dirs) > 0 {
		f.BinDirs = dirs
	}
	if len(network) > 0 {
		f.Network = last(network)
	}
}

// readCRIDockerd reads the command line of cri-dockerd, which has no file.
func readCRIDockerd(f *Found) error {
	f.Name, f.ConfDir, f.BinDirs, f.Networks = api.CRIDockerd, defaultConfDir, []string{defaultBinDir}, 1
	args := f.process.args()
	f.override(commandLine, values(args, "cni-conf-dir"), values(args, "cni-bin-dir"), nil)
	return nil
}

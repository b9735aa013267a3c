// SPDX-License-Identifier: Apache-2.0

// A list of CNI 1.1 that has no plugins of its own: they are files in the directory of the
// network's name, and so is our entry.

package cniconf

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"

	"github.com/podshunt/podshunt/api"
)

// dropInName is the name of our file. Plugins run in the order of names.
const dropInName = "zz-" + api.PluginType + ".conf"

// dropInPath returns the path of our file for a list that has no plugins of its own, or "".
func dropInPath(f file) string {
	if !f.isList() {
		return ""
	}
	list, err := libcni.ConfListFromBytes(f.data)
	if err != nil || len(list.Plugins) > 0 || filepath.Base(list.Name) != list.Name {
		return ""
	}
	return filepath.Join(filepath.Dir(f.path), list.Name, dropInName)
}

// putDropIn puts our entry at path, a file among those with the plugins of the list in f.
func (ins *Installer) putDropIn(f file, path string) error {
	first := firstOfDirectory(path)
	switch {
	case first == "":
		return fmt.Errorf("%w, which are files in %s", errAlone, filepath.Dir(path))
	case filepath.Base(first) > dropInName:
		return fmt.Errorf("%s would come after our %s, and has to come before it, as it makes the interface: give it an earlier name", first, dropInName)
	}
	present, err := os.ReadFile(path)
	if err == nil && equalJSON(present, ins.section) {
		return nil
	}
	if err := errors.Join(ins.admit(f.path), unchanged(f)); err != nil {
		return err
	}
	// Runtimes watch the directory of the list only, and read it again when a name goes away
	// there.
	if err := writeBy(dropInTemp(filepath.Dir(f.path)), path, append(ins.section, '\n'), f.path); err != nil {
		return err
	}
	ins.wrote(f.path, path)
	return nil
}

// presentDropIn returns the path of our file if it is there, behind the plugin that makes the
// interface, or "".
func presentDropIn(path string) string {
	first := firstOfDirectory(path)
	if data, err := os.ReadFile(path); err != nil || !isOurs(data) || first == "" || filepath.Base(first) > dropInName {
		return ""
	}
	return path
}

// dropInTemp is the name that our file has in the directory of the list before and after
// it is in that of the network.
func dropInTemp(confDir string) string { return filepath.Join(confDir, dropInName+tempExtension) }

// firstOfDirectory returns the first plugin that is not ours among the files beside the one at
// path, or "".
func firstOfDirectory(path string) string {
	files, err := libcni.ConfFiles(filepath.Dir(path), []string{".conf"})
	if err != nil {
		return ""
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if _, invalid := libcni.NetworkPluginConfFromBytes(data); err == nil && invalid == nil && !isOurs(data) {
			return file
		}
	}
	return ""
}

// removeDropIns deletes our files in the directories of networks, but for the one at except.
func removeDropIns(confDir, except string, log *slog.Logger) error {
	paths, err := filepath.Glob(filepath.Join(confDir, "*", dropInName))
	for _, path := range paths {
		data, readErr := os.ReadFile(path)
		if path == except || readErr != nil || !isOurs(data) {
			err = errors.Join(err, ignoreMissing(readErr))
			continue
		}
		// As for putDropIn, for the runtime to see it.
		temp := dropInTemp(confDir)
		if moveErr := errors.Join(os.Rename(path, temp), os.Remove(temp), syncDirIfThere(filepath.Dir(path))); moveErr != nil {
			if !errors.Is(moveErr, fs.ErrNotExist) {
				err = errors.Join(err, fmt.Errorf("take entry out of %s: %w", filepath.Dir(path), moveErr))
			}
			continue
		}
		log.Info("entry taken out of cni configuration", "path", path)
	}
	return err
}

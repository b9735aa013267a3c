// SPDX-License-Identifier: Apache-2.0

// Directories that are taken from the runtime's own configuration, and reached through the
// node's root directory.

package cniconf

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/podshunt/podshunt/agent/nodefs"
)

// notAuto says what to do where the directories are not found.
const notAuto = "give --cni-conf-dir and --cni-bin-dir (in the chart: agent.cniConfDir and agent.cniBinDir) instead of auto"

// locate finds the two directories, if they are not given. When the runtime has others than
// before, it takes the entry out of the former ones.
func (ins *Installer) locate() error {
	if !ins.cfg.Auto {
		return nil
	}
	r, _ := ins.cfg.Runtime()
	if r.Error != "" {
		if ins.cfg.ConfDir != "" {
			return nil // it is about to start again
		}
		return fmt.Errorf("the directories of the container runtime are not known: %s: %s", notAuto, r.Error)
	}
	conf, err := ins.resolve(r.ConfDir)
	if err != nil {
		return err
	}
	bin, err := ins.chooseBinDir(r.BinDirs)
	if err != nil {
		return err
	}
	if conf != ins.cfg.ConfDir {
		if err := takeAllOut(ins.cfg.ConfDir, ins.cfg.Log); err != nil {
			return err
		}
		ins.cfg.ConfDir, ins.confPlace = conf, place{path: conf}
	}
	if bin != ins.cfg.BinDir {
		ins.cfg.BinDir, ins.binPlace, ins.binary = bin, place{path: bin}, newBinary(ins.cfg.Plugin, bin)
	}
	return nil
}

// resolve returns the path to a directory of the node. What is not there yet has no links.
func (ins *Installer) resolve(dir string) (string, error) {
	path, err := nodefs.Root(ins.cfg.NodeRoot).Resolve(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return filepath.Join(ins.cfg.NodeRoot, dir), nil
	}
	if err != nil {
		return "", fmt.Errorf("look for the directory of the container runtime: %w: %s", err, notAuto)
	}
	return path, nil
}

// chooseBinDir returns the first directory that can be written to, or else the first.
func (ins *Installer) chooseBinDir(dirs []string) (string, error) {
	if len(dirs) == 0 {
		return "", errors.New("the container runtime has no directory of plugins")
	}
	chosen := dirs[0]
	for _, dir := range dirs {
		if readOnly, err := nodefs.Root(ins.cfg.NodeRoot).ReadOnly(dir); err == nil && !readOnly {
			chosen = dir
			break
		}
	}
	return ins.resolve(chosen)
}

// takeAllOut takes our entry out of a directory that the runtime no longer uses.
func takeAllOut(confDir string, log *slog.Logger) error {
	if confDir == "" {
		return nil
	}
	files, err := readDir(confDir)
	return errors.Join(ignoreMissing(err), takeOut(files, "", log), removeDropIns(confDir, "", log))
}

// dirs returns the directories that are known.
func (ins *Installer) dirs() []string {
	ins.mu.Lock()
	defer ins.mu.Unlock()
	if ins.cfg.ConfDir == "" {
		return nil
	}
	return []string{ins.cfg.ConfDir, ins.cfg.BinDir}
}

// checkDirs returns an error if the directories are given, and the runtime uses others.
func (ins *Installer) checkDirs(rt nodeRuntime) error {
	if ins.cfg.Auto {
		return nil
	}
	return rt.checkDirs(ins.cfg.ConfDir, ins.cfg.BinDir)
}

// seen returns a text with the paths as the node has them.
func (ins *Installer) seen(text string) string {
	if !ins.cfg.Auto {
		return text
	}
	return strings.ReplaceAll(text, strings.TrimSuffix(ins.cfg.NodeRoot, "/")+"/", "/")
}

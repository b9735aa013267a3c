// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/libcni"

	"github.com/podshunt/podshunt/api"
)

// Runtimes look at names that end in .conf, .conflist or .json only.
const (
	listExtension = ".conflist"
	// keptExtension is added to the name of a lone configuration that a list of ours stands for.
	keptExtension = "." + api.PluginType
	// tempExtension is added to the name of a file that is being written.
	tempExtension = keptExtension + "-new"
)

// file is a file of the configuration directory as a runtime looks at it.
type file struct {
	path string
	data []byte
	// err is why a runtime does not accept it.
	err error
}

func (f file) isList() bool { return filepath.Ext(f.path) == listExtension }

// readDir returns the files that a runtime looks at, in its order.
func readDir(dir string) ([]file, error) {
	// For libcni a directory that is not there is an empty one.
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	paths, err := libcni.ConfFiles(dir, []string{".conf", listExtension, ".json"})
	if err != nil {
		return nil, err
	}
	slices.Sort(paths)
	var files []file
	for _, path := range paths {
		f := file{path: path}
		if f.data, f.err = os.ReadFile(path); f.err == nil {
			if f.isList() {
				_, f.err = libcni.ConfListFromFile(path)
			} else {
				_, f.err = libcni.NetworkPluginConfFromBytes(f.data)
			}
		}
		files = append(files, f)
	}
	return files, nil
}

// Uninstall takes podshunt out of every list of the configuration directory, and
// puts the lone configurations back that its lists stand for. A file that nobody
// else has changed is to the byte what it was, with its mode and owner; of one
// that was changed only our entry goes. It works while a runtime uses the
// directory, and completes what an earlier call could not; a directory that is
// not there has nothing to take out.
//
// The plugin's binary stays in its directory on purpose. Runtimes name it after
// the entry is gone: CRI-O deletes a pod's network by the list that its ADD was
// run with (libcni keeps it under /var/lib/cni), containerd by the list that it
// loaded last, and a DEL whose binary is missing fails for ever, with the pod in
// Terminating. Without an agent the binary lets every DEL succeed at once. It
// may be deleted when the node has no pod left that was started with the entry,
// for example after it was drained.
func Uninstall(confDir, binDir string, log *slog.Logger) error {
	files, err := readDir(confDir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	errs := []error{takeOut(files, "", log)}
	for _, f := range files {
		if f.err != nil && bytes.Contains(f.data, []byte(`"`+api.PluginType+`"`)) {
			errs = append(errs, fmt.Errorf("%s names %s but is not valid, take it out by hand: %w", f.path, api.PluginType, f.err))
		}
	}
	if errors.Join(errs...) == nil {
		// What is left belongs to lists that others have deleted or rewritten.
		errs = append(errs, sweep(confDir, keptExtension), sweep(confDir, tempExtension), sweep(binDir, tempExtension))
	}
	return errors.Join(errs...)
}

// takeOut releases every list with an entry of ours but the one at except.
func takeOut(files []file, except string, log *slog.Logger) error {
	var errs []error
	for _, f := range files {
		if f.path == except || !f.isList() || !holdsOurs(f.data) {
			continue
		}
		err := release(f)
		if err == nil {
			log.Info("entry taken out of cni configuration", "path", f.path)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// release takes our entry out of a list. A list that stands for a lone
// configuration makes way for it; see convert for the order.
func release(list file) error {
	base := strings.TrimSuffix(list.path, listExtension)
	for _, extension := range []string{".conf", ".json"} {
		path := base + extension
		kept := path + keptExtension
		// A list that was changed since stays, and what is kept is out of date.
		if !standsFor(list, kept) && !standsFor(list, path) {
			if err := removeIfThere(kept); err != nil {
				return err
			}
			continue
		}
		// The owner may have written it again.
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			if err := os.Rename(kept, path); err != nil {
				return err
			}
		}
		return errors.Join(os.Remove(list.path), removeIfThere(kept), syncDir(filepath.Dir(path)))
	}
	rest, err := Remove(list.data)
	if err != nil {
		return fmt.Errorf("take entry out of %s: %w", list.path, err)
	}
	return replace(list, rest)
}

// standsFor tells whether a list is one that was made of the lone configuration at path.
func standsFor(list file, path string) bool {
	conf, err := os.ReadFile(path)
	return err == nil && holdsOurs(list.data) && wraps(list.data, conf)
}

// convert puts a list in the place of a lone configuration, and keeps that under
// a name that runtimes ignore. A runtime finds the network at every instant: the
// list comes before the configuration goes. While both are there it uses the
// first, and between their names is no other. (A containerd with a max_conf_num
// other than 1 that reads the directory in this instant takes the network twice.)
// It returns the path of the list.
func convert(conf file, list []byte, files []file) (string, error) {
	base := strings.TrimSuffix(conf.path, filepath.Ext(conf.path))
	target := file{path: base + listExtension}
	kept := conf.path + keptExtension
	for _, f := range files {
		switch {
		case f.path == target.path:
			// A list of ours is there if a conversion was not completed, or if the owner has written its configuration again.
			if !standsFor(f, conf.path) && !standsFor(f, kept) {
				return "", fmt.Errorf("%s is in the way of a list for %s: delete the one that is not needed", f.path, conf.path)
			}
			target = f
		case f.err == nil && conf.path < f.path && f.path < target.path:
			return "", fmt.Errorf("make %s of %s: runtimes would use %s instead: give that one a later name", target.path, conf.path, f.path)
		}
	}
	if err := unchanged(conf); err != nil {
		return "", err
	}
	if !bytes.Equal(target.data, list) {
		if err := write(target.path, list, conf.path); err != nil {
			return "", err
		}
	}
	if err := os.Rename(conf.path, kept); err != nil {
		return "", err
	}
	return target.path, syncDir(filepath.Dir(conf.path))
}

// replace writes data to a file that still is what was read.
func replace(f file, data []byte) error {
	if err := unchanged(f); err != nil {
		return err
	}
	// The file may be reached by a symbolic link, which stays.
	path, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return err
	}
	return write(path, data, path)
}

// unchanged makes the time in which a change by its owner gets lost as short as
// it can be without a lock.
func unchanged(f file) error {
	now, err := os.ReadFile(f.path)
	if err == nil && !bytes.Equal(now, f.data) {
		err = fmt.Errorf("%s was changed meanwhile", f.path)
	}
	return err
}

// write replaces or makes the file at path in one step, with the mode and the
// owner of the file at like. The temporary file has to be in the same directory
// not only for the rename: containerd (1.7) reads its configuration again when a
// name goes away from the directory, not when one appears in it.
func write(path string, data []byte, like string) error {
	info, err := os.Stat(like)
	if err != nil {
		return err
	}
	temp := path + tempExtension
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && err == nil {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(info.Mode())
	}
	return publish(temp, finish(f, err), path)
}

// finish closes a file, whose data are on disk then unless err says that it is
// not complete.
func finish(f *os.File, err error) error {
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// publish renames a finished file to path, or deletes it after an error.
func publish(temp string, err error, path string) error {
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// sweep deletes the files of a directory whose names end with the extension.
func sweep(dir, extension string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) == extension {
			err = errors.Join(err, removeIfThere(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

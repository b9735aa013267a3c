// SPDX-License-Identifier: Apache-2.0

// The directory of CNI configuration: which file the runtime uses, and what is ours in it.

package cniconf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"github.com/podshunt/podshunt/api"
)

// Runtimes look at names that end in .conf, .conflist or .json only.
const (
	listExtension = ".conflist"
	// madeEnding takes the place of the extension in the name of a list that is made
	// of a lone configuration: it sorts before any extension, so that runtimes use it.
	madeEnding = "-" + api.PluginType + listExtension
	// keptExtension ends the name that earlier versions gave a lone
	// configuration, which they replaced by 10-x.conflist.
	keptExtension = "." + api.PluginType
	// tempExtension is added to the name of a file that is being written.
	tempExtension = keptExtension + "-new"
)

// file is a file of the configuration directory as a runtime looks at it.
type file struct {
	path string
	data []byte
	// err says why a runtime does not accept the file.
	err error
	// target is where the file leads if it is a link that only the node can follow.
	target string
}

func (f file) isList() bool { return filepath.Ext(f.path) == listExtension }

// isMade reports whether the file, by its name, is a list that was made of a lone
// configuration, whether that is still there or not.
func (f file) isMade() bool {
	return strings.HasSuffix(f.path, madeEnding) && bytes.Contains(f.data, []byte(`"`+madeOfKey+`"`))
}

// madePath returns the path of the list that is made of the lone configuration at
// path.
func madePath(path string) string { return strings.TrimSuffix(path, filepath.Ext(path)) + madeEnding }

// readDir returns the files that a runtime looks at, in its order.
func readDir(dir string) ([]file, error) {
	// libcni would take a directory that is not there for an empty one.
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
// deletes the lists that are made of lone configurations. A file that nobody else
// has changed is to the byte what it was, with its mode and owner; of one that was
// changed only our entry goes. It works while a runtime uses the directory, and
// completes what an earlier call could not. It succeeds if the directory is not
// there.
//
// The plugin's binary stays in its directory on purpose. Runtimes name it after
// the entry is gone: CRI-O deletes a pod's network by the list that its ADD was
// run with (libcni keeps it under /var/lib/cni), containerd by the list that it
// loaded last, and a DEL whose binary is missing fails for ever, with the pod in
// Terminating. Without an agent the binary lets every DEL succeed at once. It
// may be deleted when the node has no pod left that was started with the entry,
// for example after it was drained.
//
// It returns remarks for a person to look at, also with an error: one for every file
// below the configuration directory that still names podshunt. Such a file is a copy
// that another program has made of our entry; multus, for example, copies the whole
// list into its own configuration. It stays as it is.
func Uninstall(confDir, binDir string, log *slog.Logger) (remarks []string, err error) {
	err = uninstall(confDir, binDir, log)
	remarks, lookErr := mentions(confDir, filepath.Join(binDir, api.PluginType))
	for _, remark := range remarks {
		log.Warn("podshunt is named after the uninstall", "remark", remark)
	}
	return remarks, errors.Join(err, lookErr)
}

func uninstall(confDir, binDir string, log *slog.Logger) error {
	files, err := readRestored(confDir, log)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	errs := []error{removeDropIns(confDir, "", log)}
	for _, f := range files {
		switch {
		case f.isMade() && f.err == nil && len(chained(f.data)) > 0 && madeOfSomething(f):
			// Not deleted: what others have put into it would go with
			// it.
			errs = append(errs, cut(f, log))
		case f.isMade(), f.isList() && holdsOurs(f.data):
			errs = append(errs, takeOut([]file{f}, "", log))
		case f.err != nil && bytes.Contains(f.data, []byte(`"`+api.PluginType+`"`)):
			errs = append(errs, fmt.Errorf("%s names %s but is not valid, take it out by hand: %w", f.path, api.PluginType, f.err))
		}
	}
	if errors.Join(errs...) == nil {
		// Left over from lists that others have deleted or rewritten.
		errs = append(errs, sweep(confDir, keptExtension), sweep(confDir, tempExtension), sweep(binDir, tempExtension))
	}
	return errors.Join(errs...)
}

// mentions returns a remark for every file in or below a directory that names
// podshunt, with what to do about it before the plugin's binary is deleted.
func mentions(dir, binary string) ([]string, error) {
	var remarks []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return ignoreMissing(err)
		}
		info, err := os.Stat(path) // follows a link to the file
		if err != nil || !info.Mode().IsRegular() {
			return ignoreMissing(err)
		}
		data, err := readSome(path)
		switch {
		case err != nil:
			return ignoreMissing(err)
		case file{path: path, data: data}.isMade():
			remarks = append(remarks, path+" stays, because others have put plugins into it: move these to the configuration that it is made of, and delete it")
		case bytes.Contains(data, []byte(api.PluginType)):
			remarks = append(remarks, fmt.Sprintf("%s still names %s: if it means the plugin, no pod starts with this file once %s is deleted; "+
				"let the program that wrote it write it again, or take %[2]s out of it, before you delete that binary", path, api.PluginType, binary))
		}
		return nil
	})
	if err = ignoreMissing(err); err != nil {
		err = fmt.Errorf("look for files that still name %s: %w", api.PluginType, err)
	}
	return remarks, err
}

// mostOfConf is far above the size of any configuration.
const mostOfConf = 4 << 20

func readSome(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, mostOfConf))
}

// ignoreMissing drops errors about files that go while they are looked at.
func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// takeOut deletes every list that is made of a lone configuration, and takes our
// entry out of every other list. It leaves the one at except, and those that only the
// node can reach, where nobody but their owner can have put it.
func takeOut(files []file, except string, log *slog.Logger) error {
	var errs []error
	for _, f := range files {
		switch {
		case f.path == except, f.target != "":
		case f.isMade():
			err := errors.Join(removeIfThere(f.path), syncDir(filepath.Dir(f.path)))
			if err == nil {
				log.Info("list for a lone cni configuration deleted", "path", f.path)
			}
			errs = append(errs, err)
		case f.isList() && holdsOurs(f.data):
			errs = append(errs, cut(f, log))
		}
	}
	return errors.Join(errs...)
}

// cut takes our entry out of a list and leaves the rest.
func cut(list file, log *slog.Logger) error {
	rest, err := Remove(list.data)
	if err == nil {
		err = replace(list, rest)
	}
	if err != nil {
		return fmt.Errorf("take entry out of %s: %w", list.path, err)
	}
	log.Info("entry taken out of cni configuration", "path", list.path)
	return nil
}

// madeOfSomething reports whether the configuration that a list is made of is still
// there.
func madeOfSomething(list file) bool {
	base := strings.TrimSuffix(list.path, madeEnding)
	for _, extension := range loneExtensions() {
		if _, err := os.Lstat(base + extension); err == nil {
			return true
		}
	}
	return false
}

func loneExtensions() []string { return []string{".conf", ".json"} }

// readRestored puts back the lone configurations that earlier versions renamed, and
// then does what readDir does.
func readRestored(dir string, log *slog.Logger) ([]file, error) {
	files, err := readDir(dir)
	if err != nil {
		return nil, err
	}
	restored := false
	for _, f := range files {
		done, err := restore(f)
		if err != nil {
			return nil, fmt.Errorf("put the lone configuration of %s back: %w", f.path, err)
		}
		if done {
			log.Info("lone cni configuration put back in the place of its list", "path", f.path)
			restored = true
		}
	}
	if !restored {
		return files, nil
	}
	return readDir(dir)
}

// restore puts back a lone configuration that an earlier version has replaced by a
// list, and deletes the list. A list that somebody has changed since stays.
func restore(list file) (bool, error) {
	if !list.isList() || list.isMade() || !holdsOurs(list.data) {
		return false, nil
	}
	base := strings.TrimSuffix(list.path, listExtension)
	for _, extension := range loneExtensions() {
		path := base + extension
		kept := path + keptExtension
		// If there is no renamed configuration, a crash came before the rename.
		if !standsFor(list, kept) && !standsFor(list, path) {
			continue
		}
		// The owner may have written it again. It comes back before the list goes, so
		// that runtimes find the network at every instant.
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			if err := os.Rename(kept, path); err != nil {
				return false, err
			}
		}
		return true, errors.Join(os.Remove(list.path), removeIfThere(kept), syncDir(filepath.Dir(path)))
	}
	return false, nil
}

// standsFor reports whether a list was made of the lone configuration at path, and
// of nothing else.
func standsFor(list file, path string) bool {
	conf, err := os.ReadFile(path)
	return err == nil && wraps(list.data, conf) && len(chained(list.data)) == 0
}

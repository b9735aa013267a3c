// SPDX-License-Identifier: Apache-2.0

// Package cniconf installs the CNI plugin on a node: its binary in the directory
// of plugins, and its entry as the last plugin of the network that the runtime
// uses. It keeps both there while other programs rewrite their files, and takes
// the entry out again so that a file is to the byte what it was.
//
// A runtime (containerd, CRI-O) uses the first file, in the order of names, that
// it accepts of those ending in .conf, .conflist and .json. The entry goes there,
// and nowhere else; beside a lone configuration, which has no place for it, goes a
// list that is used instead. No file is ever written that libcni would not accept,
// or that would be another network apart from our entry; every write is one rename.
package cniconf

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/podshunt/podshunt/agent/watch"
	"github.com/podshunt/podshunt/api"
)

const (
	// pollInterval is how soon a change is seen that no event tells of: the
	// directory was made or mounted, or the node is out of inotify watches.
	pollInterval = 500 * time.Millisecond
	// maxWrites is how often a configuration is changed within writeWindow.
	// Another program that undoes each change would do so for ever, and make
	// the runtime load its configuration each time.
	maxWrites   = 5
	writeWindow = time.Minute
	// thinMultus is the "type" of multus without a daemon; with one it is multus-shim.
	thinMultus = "multus"
)

// errNoNetwork says that there is nothing to put the entry into yet.
var errNoNetwork = errors.New("no network configuration yet: waiting for the network's own agent to write it")

// Config says what an Installer puts where. Every field is required but NodeRoot.
type Config struct {
	// ConfDir and BinDir are the runtime's directories of network configurations and of plugins.
	ConfDir, BinDir string
	// NodeRoot is where the node's root directory is seen, such as /proc/1/root. Empty:
	// nowhere, and it goes unnoticed if the node puts another directory in the place
	// of one that is mounted here.
	NodeRoot string
	// Plugin is the path of the binary to install.
	Plugin string
	// Section is what the plugin is told. Its paths are those of the node.
	Section api.PluginConf
	Log     *slog.Logger
}

// Installer keeps the plugin installed. Its methods may be called at any time, by
// any goroutine.
type Installer struct {
	cfg     Config
	section []byte
	window  time.Duration

	state atomic.Pointer[api.CNIStatus]

	mu      sync.Mutex // held while files are changed
	stopped bool       // by Uninstall
	// confPlace and binPlace are the two directories.
	confPlace, binPlace place
	binary              binary
	writes              map[string][]time.Time // by path, those within the window
}

// New returns an Installer that has not done anything yet.
func New(cfg Config) *Installer {
	ins := &Installer{
		cfg: cfg, section: cfg.Section.Section(), window: writeWindow,
		confPlace: place{path: cfg.ConfDir, root: cfg.NodeRoot}, binPlace: place{path: cfg.BinDir, root: cfg.NodeRoot},
		binary: newBinary(cfg.Plugin, cfg.BinDir), writes: map[string][]time.Time{},
	}
	ins.state.Store(&api.CNIStatus{Error: "not started", Since: time.Now()})
	return ins
}

// State returns what is installed, as of the last look.
func (ins *Installer) State() api.CNIStatus { return *ins.state.Load() }

// Run keeps the plugin installed until ctx ends, and leaves it installed then.
// What goes wrong with files is in State and in the log, and tried again. It returns
// an error if one of the directories is not the node's any more: whoever started
// the container has to do so again, for the directory that the node has now.
func (ins *Installer) Run(ctx context.Context) error {
	cfg := watch.Config{
		Dirs:     func() []string { return []string{ins.cfg.ConfDir, ins.cfg.BinDir} },
		Interval: pollInterval, Unwatched: pollInterval, Log: ins.cfg.Log,
	}
	return watch.Run(ctx, cfg, func() error {
		if err := ins.look(); errors.Is(err, errReplaced) {
			return err
		}
		return nil
	})
}

// Reconcile looks at everything once and changes what is not as wanted, unless
// Uninstall was called. State tells how that went.
func (ins *Installer) Reconcile() { _ = ins.look() }

func (ins *Installer) look() error {
	ins.mu.Lock()
	defer ins.mu.Unlock()
	if ins.stopped {
		return nil
	}
	path, err := ins.install()
	ins.setState(path, err)
	return err
}

// Uninstall stops keeping, for the life of the Installer, and takes everything out
// but the binary; see the function Uninstall, also for the remarks. After an error
// it may be called again.
func (ins *Installer) Uninstall() (remarks []string, err error) {
	ins.mu.Lock()
	defer ins.mu.Unlock()
	ins.stopped = true
	if err := errors.Join(ins.confPlace.check(), ins.binPlace.check()); err != nil {
		// It would be taken out of where no runtime looks.
		err = fmt.Errorf("uninstall: %w", err)
		ins.setState("", err)
		return nil, err
	}
	remarks, err = Uninstall(ins.cfg.ConfDir, ins.cfg.BinDir, ins.cfg.Log)
	if err != nil {
		ins.setState("", fmt.Errorf("uninstall: %w", err))
		return remarks, err
	}
	ins.setState("", errors.New("uninstalled: start the agent again to install"))
	return remarks, nil
}

// setState publishes what has changed, and logs it.
func (ins *Installer) setState(path string, err error) {
	now := api.CNIStatus{Conflist: path, Installed: path != ""}
	if err != nil {
		now.Error = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	last := ins.State()
	now.Since = last.Since
	if now == last {
		return
	}
	now.Since = time.Now()
	ins.state.Store(&now)
	switch {
	case err == nil:
		ins.cfg.Log.Info("cni plugin installed", "conflist", path, "plugin", ins.binary.path)
	case ins.stopped, errors.Is(err, errNoNetwork):
		ins.cfg.Log.Info("cni plugin not installed", "err", err)
	default:
		ins.cfg.Log.Warn("cni plugin not installed as wanted", "conflist", path, "err", err)
	}
}

// install returns the list with our entry that the runtime uses, or "". With
// an error, something is not as wanted.
func (ins *Installer) install() (string, error) {
	if err := ins.confPlace.check(); err != nil {
		return "", err
	}
	files, err := readRestored(ins.cfg.ConfDir, ins.cfg.Log)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: %w", errNoNetwork, err)
	}
	if err != nil {
		return "", err
	}
	if err := ins.binPlace.check(); err != nil {
		// The node's directory does not have the binary: no pod would start before the agent is back.
		return "", errors.Join(err, takeOut(files, "", ins.cfg.Log))
	}
	var made, theirs []file
	for _, f := range files {
		if f.isMade() {
			made = append(made, f)
		} else {
			theirs = append(theirs, f)
		}
	}
	// CRI-O passes over files that are not valid; containerd takes no network
	// at all if one comes before those that it needs.
	var errs []error
	first := slices.IndexFunc(theirs, func(f file) bool {
		if f.err != nil {
			errs = append(errs, fmt.Errorf("%s is not valid: %w", f.path, f.err))
		}
		return f.err == nil
	})
	// A list of ours goes with what it is made of: its owner has taken the network away.
	wanted := ""
	if first >= 0 && !theirs[first].isList() {
		wanted = madePath(theirs[first].path)
	}
	errs = append(errs, takeOut(made, wanted, ins.cfg.Log))
	files = slices.DeleteFunc(files, func(f file) bool { return f.isMade() && f.path != wanted })
	if first < 0 {
		return "", errors.Join(append(errs, errNoNetwork)...)
	}
	path, err := ins.join(theirs[first], files)
	// Whatever else has an entry: it is of no use there, and without this one it keeps pods from starting.
	return path, errors.Join(append(errs, err, takeOut(files, path, ins.cfg.Log))...)
}

// join installs the binary and puts our entry into the network in f, the first
// valid one of files that is not ours. It returns the list that has the entry, or
// "" if none may have it.
func (ins *Installer) join(f file, files []file) (string, error) {
	if err := ins.checkBinDir(f); err != nil {
		return "", err
	}
	err := ins.binary.reconcile()
	if err != nil {
		if ins.binary.versions == nil {
			return "", err // an entry without a binary would keep every pod from starting
		}
		// The older plugin may not know the section: what is there stays.
		return present(f, files), err
	}
	if err := ins.checkVersions(f); err != nil {
		return "", err
	}
	list, change := f, Insert
	if !f.isList() {
		if list, err = ins.beside(f, files); err != nil {
			return "", fmt.Errorf("put a list beside %s: %w", f.path, err)
		}
		change = func(list, section []byte) ([]byte, error) {
			return Rewrap(list, f.data, section, filepath.Base(f.path))
		}
	}
	if err := ins.put(list, f, change); err != nil {
		return present(f, files), fmt.Errorf("put entry into %s: %w", list.path, err)
	}
	return list.path, nil
}

// present returns the list by which a runtime runs our entry in the network in f,
// as that is now, or "".
func present(f file, files []file) string {
	if f.isList() {
		if inPlace(f.data) {
			return f.path
		}
		return ""
	}
	for _, list := range files {
		if list.path == madePath(f.path) && list.isMade() && inPlace(list.data) && wraps(list.data, f.data) {
			return list.path
		}
	}
	return ""
}

// checkBinDir returns an error unless the directory of plugins has the plugin that
// makes the interface of the network in f: then it is one that the runtime
// searches. Others do not count: many nodes have a portmap in a directory that
// their runtime does not search.
func (ins *Installer) checkBinDir(f file) error {
	plugin := firstPlugin(f)
	if plugin == "" {
		return nil // put says what is wrong with the list
	}
	// A link may lead to where only the node sees something.
	info, err := os.Lstat(filepath.Join(ins.cfg.BinDir, plugin))
	if err == nil && !info.IsDir() && filepath.Base(plugin) == plugin {
		return nil
	}
	return fmt.Errorf("%s has no %q, which makes the interface in %s: the runtime looks for plugins elsewhere, would not find ours, and no pod would start: "+
		"give --cni-bin-dir (in the chart: agent.cniBinDir) the directory that has %[2]q", ins.cfg.BinDir, plugin, f.path)
}

// put makes of a list what change makes of it. It counts as a change of the file
// at as.path.
func (ins *Installer) put(list, as file, change func(list, section []byte) ([]byte, error)) error {
	changed, err := change(list.data, ins.section)
	if err != nil || bytes.Equal(changed, list.data) {
		return err
	}
	if err := ins.admit(as.path); err != nil {
		return err
	}
	if list.path == as.path {
		err = replace(list, changed)
	} else if err = errors.Join(unchanged(as), unchanged(list)); err == nil {
		err = write(list.path, changed, as.path)
	}
	if err != nil {
		return err
	}
	ins.writes[as.path] = append(ins.writes[as.path], time.Now())
	ins.cfg.Log.Info("entry put into cni configuration", "path", list.path)
	return nil
}

// beside returns the list that goes beside a lone configuration, without data if it
// is not there yet, or an error if there may be none. The configuration stays as it
// is: its owner rewrites and deletes it as ever. Runtimes use the list, as its name
// comes first; CRI-O passes over the second of two files with one network's name.
func (ins *Installer) beside(lone file, files []file) (file, error) {
	list := file{path: madePath(lone.path)}
	for _, f := range files {
		switch {
		case f.path == list.path && !f.isMade():
			return file{}, fmt.Errorf("%s is in the way: give that file another name", f.path)
		case f.path == list.path:
			list = f
		case list.path < f.path && f.path < lone.path:
			return file{}, fmt.Errorf("%s would come after %s, and comes before it now: give that file a later name", f.path, list.path)
		}
	}
	conf, err := libcni.NetworkPluginConfFromBytes(lone.data)
	if err != nil {
		return file{}, err
	}
	if conf.Network.Name == "" {
		return file{}, errors.New(`it has no "name", so that CRI-O names the network after the file: give it one`)
	}
	if conf.Network.Type == thinMultus {
		return file{}, errors.New("multus in its thin form takes the first other file of the directory for the network that it delegates to, " +
			"which would be our list: use its thick form, or install nothing (in the chart: agent.cniConfDir and agent.cniBinDir empty)")
	}
	return list, nil
}

// checkVersions returns an error if a runtime could call the plugin with a CNI
// version that it does not support, which would keep every pod from starting.
// Which of several versions a runtime chooses depends on its own.
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

// admit returns an error if a file has been changed too often of late.
func (ins *Installer) admit(path string) error {
	now := time.Now()
	recent := slices.DeleteFunc(ins.writes[path], func(at time.Time) bool { return now.Sub(at) >= ins.window })
	ins.writes[path] = recent
	if len(recent) >= maxWrites {
		return fmt.Errorf("another program has undone our change of %s %d times within %s, next try at %s: let it keep changes (Cilium: cni.exclusive=false)",
			path, maxWrites, ins.window, recent[0].Add(ins.window).Format(time.TimeOnly))
	}
	return nil
}

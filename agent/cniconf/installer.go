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
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/agent/watch"
	"github.com/podshunt/podshunt/api"
)

const (
	// pollInterval bounds how late a change is seen that causes no event: a
	// directory that is made or mounted, or any change when the node is out of
	// inotify watches.
	pollInterval = 500 * time.Millisecond
	// maxWrites limits how often one configuration is changed within
	// writeWindow. Another program might undo each change for ever, and the
	// runtime load its configuration each time.
	maxWrites   = 5
	writeWindow = time.Minute
	// thinMultus is the "type" of multus in its thin form; that of the form with a
	// daemon is multus-shim.
	thinMultus = "multus"
)

// errNoNetwork says that there is nothing to put the entry into yet.
var errNoNetwork = errors.New("no network configuration yet: waiting for the network's own agent to write it")

// Config says what an Installer installs where. Every field but NodeRoot
// and Runtime is required.
type Config struct {
	// ConfDir and BinDir are the runtime's directories of network configurations and of plugins.
	ConfDir, BinDir string
	// Auto takes them from the runtime's own configuration, and reaches them through NodeRoot;
	// then they are not required, but NodeRoot and Runtime are.
	Auto bool
	// NodeRoot is a path that leads to the node's root directory, such as /proc/1/root.
	// If it is empty, the Installer does not notice that the node has replaced a
	// directory which is mounted here.
	NodeRoot string
	// Runtime returns what is known of the container runtime, and the root directory that
	// it sees. It may be nil: then ConfDir and BinDir are taken for the runtime's, which
	// uses the first network.
	Runtime func() (api.Runtime, nodefs.Root)
	// Plugin is the path of the binary to install.
	Plugin string
	// Section is written into the plugin's entry. Its paths are as the node sees
	// them.
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

// State returns what was installed at the last look.
func (ins *Installer) State() api.CNIStatus { return *ins.state.Load() }

// Run keeps the plugin installed until ctx ends, and leaves it installed then.
// Errors with files are in State and in the log, and Run tries again. It returns an
// error if the node has replaced one of the directories: only a new start of the
// container mounts the directory that the node has now.
func (ins *Installer) Run(ctx context.Context) error {
	cfg := watch.Config{
		Dirs:     ins.dirs,
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
// Uninstall was called. State has the result.
func (ins *Installer) Reconcile() { _ = ins.look() }

func (ins *Installer) look() error {
	ins.mu.Lock()
	defer ins.mu.Unlock()
	if ins.stopped {
		return nil
	}
	if err := ins.locate(); err != nil {
		ins.setState("", err)
		return nil // it tries again
	}
	path, err := ins.install()
	err = adviseReadOnly(err)
	ins.setState(path, err)
	return err
}

// Uninstall ends the work of the Installer for good, and takes out everything but
// the binary; see the function Uninstall, also for the remarks. After an error it
// may be called again.
func (ins *Installer) Uninstall() (remarks []string, err error) {
	ins.mu.Lock()
	defer ins.mu.Unlock()
	ins.stopped = true
	if err := ins.locate(); err != nil {
		err = fmt.Errorf("nothing was uninstalled: %w", err)
		ins.setState("", err)
		return []string{err.Error()}, nil
	}
	if err := errors.Join(ins.confPlace.check(), ins.binPlace.check()); err != nil {
		// No runtime looks at the directory that this process sees.
		err = fmt.Errorf("uninstall: %w", err)
		ins.setState("", err)
		return nil, err
	}
	remarks, err = Uninstall(ins.cfg.ConfDir, ins.cfg.BinDir, ins.cfg.Log)
	for i := range remarks {
		remarks[i] = ins.seen(remarks[i])
	}
	if err != nil {
		ins.setState("", fmt.Errorf("uninstall: %w", err))
		return remarks, err
	}
	ins.setState("", errors.New("uninstalled: start the agent again to install"))
	return remarks, nil
}

// setState publishes the state, and logs it if it has changed.
func (ins *Installer) setState(path string, err error) {
	now := api.CNIStatus{Conflist: ins.seen(path), Installed: path != ""}
	if err != nil {
		now.Error = ins.seen(strings.ReplaceAll(err.Error(), "\n", "; "))
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

// install installs everything. It returns the file with our entry that the runtime
// uses, or "", also with an error.
func (ins *Installer) install() (string, error) {
	path, err := ins.installIn()
	return path, errors.Join(err, removeDropIns(ins.cfg.ConfDir, path, ins.cfg.Log))
}

// installIn does all of that but to take out our files in the directories of networks.
func (ins *Installer) installIn() (string, error) {
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
	rt := ins.runtime()
	if err := errors.Join(ins.binPlace.check(), ins.checkDirs(rt)); err != nil {
		// The directory that the runtime searches lacks the binary: with the entry, no pod
		// would start.
		return "", errors.Join(err, takeOut(files, "", ins.cfg.Log))
	}
	ins.readElsewhere(files)
	var made, theirs []file
	for _, f := range files {
		if f.isMade() {
			made = append(made, f)
		} else {
			theirs = append(theirs, f)
		}
	}
	// CRI-O passes over files that are not valid; containerd takes no network at
	// all if one comes before the valid ones.
	var errs []error
	rt.passOver(theirs)
	first := rt.network(theirs)
	for i, f := range theirs {
		if f.err != nil && (first < 0 || i < first) {
			errs = append(errs, refusedError(f))
		}
	}
	// A list of ours goes if its lone configuration is gone: the owner has taken the
	// network away.
	wanted := ""
	if first >= 0 && !theirs[first].isList() {
		wanted = madePath(theirs[first].path)
	}
	errs = append(errs, takeOut(made, wanted, ins.cfg.Log))
	files = slices.DeleteFunc(files, func(f file) bool { return f.isMade() && f.path != wanted })
	if first < 0 {
		return "", errors.Join(append(errs, rt.noNetwork())...)
	}
	path, err := ins.join(theirs[first], files, rt)
	// Any other entry is of no use, and would keep pods from starting if this one cannot be installed.
	return path, errors.Join(append(errs, err, takeOut(files, path, ins.cfg.Log))...)
}

// join installs the binary and puts our entry into the network in f, the first
// valid one of files that is not ours. It returns the list that has the entry, or
// "" if none may have it.
func (ins *Installer) join(f file, files []file, rt nodeRuntime) (string, error) {
	if err := ins.checkBinDir(f); err != nil {
		return "", err
	}
	err := ins.binary.reconcile()
	if err != nil {
		if ins.binary.versions == nil {
			return "", err // an entry without a binary would keep every pod from starting
		}
		// The older plugin may not know the keys of the section: what is
		// there stays.
		return present(f, files), err
	}
	if err := ins.checkVersions(f); err != nil {
		return "", err
	}
	if f.target != "" {
		// Whoever owns the file may have put the entry there.
		if path := present(f, files); path != "" {
			return path, nil
		}
		return "", errElsewhere(f)
	}
	if path := dropInPath(f); path != "" {
		if err := ins.putDropIn(f, path); err != nil {
			return present(f, files), fmt.Errorf("put entry into %s: %w", filepath.Dir(path), err)
		}
		return path, nil
	}
	list, change := f, Insert
	if !f.isList() {
		if rt.Name != "" && rt.Networks != 1 {
			return "", fmt.Errorf("%s gives each pod more than one network (max_conf_num, %s), and %s holds a single plugin: a list beside it would be one more network; make it a list with the same plugin",
				rt.Name, rt.source(), f.path)
		}
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

// present returns the list from which a runtime runs our entry in the network in f
// at present, or "".
func present(f file, files []file) string {
	if path := dropInPath(f); path != "" {
		return presentDropIn(path)
	}
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

// put applies change to a list and writes the result. It counts as a change of the
// file at as.path.
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
	ins.wrote(as.path, list.path)
	return nil
}

// wrote counts a change of the file at as.
func (ins *Installer) wrote(as, path string) {
	ins.writes[as] = append(ins.writes[as], time.Now())
	ins.cfg.Log.Info("entry put into cni configuration", "path", path)
}

// beside returns the list that goes beside a lone configuration, with nil data if it
// is not there yet, or an error if there must be none. The configuration stays as it
// is, so that its owner can rewrite and delete it. Runtimes use the list, as its
// name comes first; CRI-O ignores the second of two files with one network's name.
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

// admit returns an error if a file has been changed too often within writeWindow.
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

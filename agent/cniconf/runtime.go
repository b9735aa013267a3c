// SPDX-License-Identifier: Apache-2.0

// What the container runtime's own configuration says, and the network that it uses.

package cniconf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

// errPassedOver says that a runtime ignores a file that is valid.
var errPassedOver = errors.New("passes over it")

// nodeRuntime is the node's container runtime.
type nodeRuntime struct {
	api.Runtime
	root nodefs.Root
}

// runtime returns what is known of the runtime; nothing is known without a name.
func (ins *Installer) runtime() nodeRuntime {
	if ins.cfg.Runtime == nil {
		return nodeRuntime{}
	}
	r, root := ins.cfg.Runtime()
	if r.Error != "" {
		return nodeRuntime{}
	}
	return nodeRuntime{r, root}
}

// checkDirs returns an error if the runtime uses other directories than the given ones.
func (r nodeRuntime) checkDirs(confDir, binDir string) error {
	if r.Name == "" {
		return nil
	}
	var errs []error
	if !r.same(confDir, r.ConfDir) {
		errs = append(errs, fmt.Errorf("%s reads network configurations from %s (%s), not from %s: give --cni-conf-dir=%[2]s (in the chart: agent.cniConfDir)",
			r.Name, r.ConfDir, r.source(), confDir))
	}
	if len(r.BinDirs) > 0 && !slices.ContainsFunc(r.BinDirs, func(dir string) bool { return r.same(binDir, dir) }) {
		errs = append(errs, fmt.Errorf("%s looks for plugins in %s (%s), not in %s, would not find ours, and no pod would start: give --cni-bin-dir=%s (in the chart: agent.cniBinDir)",
			r.Name, strings.Join(r.BinDirs, " and "), r.source(), binDir, r.BinDirs[0]))
	}
	return errors.Join(errs...)
}

// checkBinDir returns an error unless the directory of plugins has the plugin that
// makes the interface of the network in f, which proves that the runtime searches
// it. Other plugins prove nothing: many nodes have a portmap in a directory that
// their runtime does not search.
func (ins *Installer) checkBinDir(f file) error {
	plugin := firstPlugin(f)
	if plugin == "" || ins.cfg.Auto {
		return nil // put says what is wrong with the list, and the runtime has said where it searches
	}
	// Lstat, as a link may lead to a path that only the node has.
	info, err := os.Lstat(filepath.Join(ins.cfg.BinDir, plugin))
	if err == nil && !info.IsDir() && filepath.Base(plugin) == plugin {
		return nil
	}
	return fmt.Errorf("%s has no %q, which makes the interface in %s: the runtime looks for plugins elsewhere, would not find ours, and no pod would start: "+
		"give --cni-bin-dir (in the chart: agent.cniBinDir) the directory that has %[2]q", ins.cfg.BinDir, plugin, f.path)
}

// adviseReadOnly adds what to do to an error with a directory that is read-only.
func adviseReadOnly(err error) error {
	if !errors.Is(err, unix.EROFS) {
		return err
	}
	return fmt.Errorf("%w: the runtime may have another directory, which can be written to: give --cni-bin-dir and --cni-conf-dir (in the chart: agent.cniBinDir and agent.cniConfDir), "+
		"or leave both out, and pods take part from shortly after their start on", err)
}

// source says where the runtime's settings are from.
func (r nodeRuntime) source() string {
	if len(r.Sources) == 0 {
		return "its default"
	}
	return "by " + strings.Join(r.Sources, ", ")
}

// same reports whether two paths lead to one directory for the runtime.
func (r nodeRuntime) same(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	first, err1 := r.root.Stat(a)
	second, err2 := r.root.Stat(b)
	return err1 == nil && err2 == nil && first.Dev == second.Dev && first.Ino == second.Ino
}

// passOver gives an error to files whose network the runtime ignores, because one of its
// plugins is in none of its directories: CRI-O and cri-dockerd look at that, containerd does
// not. Our own plugin is not counted, since it comes with the entry. They also ask each
// plugin for its CNI versions, which a container cannot do with programs of the node.
func (r nodeRuntime) passOver(files []file) {
	if r.Name != api.CRIO && r.Name != api.CRIDockerd {
		return
	}
	for i, f := range files {
		if f.err != nil {
			continue
		}
		for _, plugin := range pluginsOf(f) {
			if !slices.ContainsFunc(r.BinDirs, func(dir string) bool { return r.hasProgram(filepath.Join(dir, plugin)) }) {
				files[i].err = fmt.Errorf("%s %w, since there is no %q in %s", r.Name, errPassedOver, plugin, strings.Join(r.BinDirs, " or "))
				break
			}
		}
	}
}

func (r nodeRuntime) hasProgram(path string) bool {
	st, err := r.root.Stat(path)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// refusedError says why the runtime does not use a file.
func refusedError(f file) error {
	if errors.Is(f.err, errPassedOver) {
		return fmt.Errorf("%s: %w", f.path, f.err)
	}
	return fmt.Errorf("%s is not valid: %w", f.path, f.err)
}

// pluginsOf returns the types of the plugins in a valid file that are not ours.
func pluginsOf(f file) (types []string) {
	if !f.isList() {
		return []string{firstPlugin(f)}
	}
	list, err := libcni.ConfListFromBytes(f.data)
	if err != nil {
		return nil
	}
	plugins := list.Plugins
	if !list.LoadOnlyInlinedPlugins {
		more, _ := libcni.NetworkPluginConfsFromFiles(filepath.Dir(f.path), list.Name)
		plugins = append(plugins, more...)
	}
	for _, p := range plugins {
		if !isOurs(p.Bytes) {
			types = append(types, p.Network.Type)
		}
	}
	return types
}

// network returns the index of the file that the runtime takes its network from, or -1:
// the first valid one, or the first of the network that is given to the runtime by name.
func (r nodeRuntime) network(files []file) int {
	return slices.IndexFunc(files, func(f file) bool {
		return f.err == nil && (r.Network == "" || networkName(f) == r.Network)
	})
}

// networkName returns the name of the network in a valid file. CRI-O names one without
// after the file.
func networkName(f file) string {
	name := ""
	if f.isList() {
		if list, err := libcni.ConfListFromBytes(f.data); err == nil {
			name = list.Name
		}
	} else if conf, err := libcni.NetworkPluginConfFromBytes(f.data); err == nil {
		name = conf.Network.Name
	}
	if name == "" {
		name = filepath.Base(f.path)
	}
	return name
}

// noNetwork returns the error for a directory without the network that the runtime uses.
func (r nodeRuntime) noNetwork() error {
	if r.Network == "" {
		return errNoNetwork
	}
	return fmt.Errorf("%w: %s uses the one called %q (%s)", errNoNetwork, r.Name, r.Network, r.source())
}

// readElsewhere reads files that are links to paths which only the node has, since a
// container sees no more of the node than what is mounted. A runtime reads them all the
// same, and may use one of them.
func (ins *Installer) readElsewhere(files []file) {
	root := ins.cfg.NodeRoot
	if root == "" {
		return
	}
	for i, f := range files {
		target, err := os.Readlink(f.path)
		if err != nil || !errors.Is(f.err, unix.ENOENT) {
			continue
		}
		data, err := nodefs.Root(root).ReadFile(ins.seen(f.path))
		if err != nil {
			continue // for the runtime, too, it is not there
		}
		f.data, f.target = data, target
		if f.isList() {
			_, f.err = libcni.ConfListFromBytes(data)
		} else {
			_, f.err = libcni.NetworkPluginConfFromBytes(data)
		}
		files[i] = f
	}
}

// errElsewhere says why the entry does not go into a file.
func errElsewhere(f file) error {
	return fmt.Errorf("%s is a link to %s, which is outside of the directories that the agent may change: "+
		"put {%q: %q} at the end of its plugins there, or a file in the place of the link", f.path, f.target, "type", api.PluginType)
}

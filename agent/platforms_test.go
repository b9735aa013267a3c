// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/cri"
	"github.com/podshunt/podshunt/agent/cri/critest"
	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/docs"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestPlatforms installs on the nodes of distributions, with the values that
// docs/platforms.md names for them: in the runtime's own directories, again after the
// distribution has started again and written its network's file, and takes all of it out
// again. The agent sees its directories by mounts, as in a container. The same with auto, where it finds
// the directories by itself, and has no mounts of them.
func TestPlatforms(t *testing.T) {
	for _, p := range critest.Platforms() {
		life := func(t *testing.T, auto bool) {
			n := newPlatformNode(t, p)
			n.auto = auto
			before := n.files()
			n.inContainer(func(ins *cniconf.Installer) {
				n.wantInstalled(ins, "installed")
				n.rewrite()
				ins.Reconcile()
				n.wantInstalled(ins, "written again by the distribution")
			})
			if p.Rewrite == critest.Edited {
				before[n.conflist] = stampedFile{edited(t, before[n.conflist].Content), before[n.conflist].Mode, before[n.conflist].Uid}
			}
			// The distribution starts again while no agent runs.
			n.rewrite()
			n.inContainer(func(ins *cniconf.Installer) {
				n.wantInstalled(ins, "by another agent")
				if _, err := ins.Uninstall(); err != nil {
					t.Error(err)
				}
			})
			if diff := cmp.Diff(before, n.files()); diff != "" {
				t.Errorf("uninstalled (-want +got):\n%s", diff)
			}
		}
		t.Run(p.Name, func(t *testing.T) {
			t.Run("values", func(t *testing.T) { life(t, false) })
			t.Run("auto", func(t *testing.T) { life(t, true) })
		})
	}
}

// TestSnapRefresh: MicroK8s moves to the directories of another revision.
func TestSnapRefresh(t *testing.T) {
	var p critest.Platform
	for _, other := range critest.Platforms() {
		if other.Name == "MicroK8s" {
			p = other
		}
	}
	n := newPlatformNode(t, p)
	n.inContainer(func(ins *cniconf.Installer) {
		n.wantInstalled(ins, "installed")
		// snapd copies the directories, and the link moves. containerd starts later.
		n.Check(os.CopyFS(filepath.Join(nodeInContainer, "var/snap/microk8s/8200"), os.DirFS(filepath.Join(nodeInContainer, "var/snap/microk8s/8136"))))
		link := filepath.Join(nodeInContainer, "var/snap/microk8s/current")
		n.Check(os.Remove(link))
		n.Check(os.Symlink("8200", link))
		ins.Reconcile()
		if state := ins.State(); state.Installed || !strings.Contains(state.Error, "the agent has to be started again") {
			t.Errorf("got state %+v, want one that says to start the agent again", state)
		}
	})
	n.inContainer(func(ins *cniconf.Installer) {
		state := ins.State()
		// The runtime that still runs has the former directories.
		if state.Installed || !strings.Contains(state.Error, "/var/snap/microk8s/8136/args/cni-network") {
			t.Errorf("got state %+v, want one that names the directories of the former revision", state)
		}
	})
	config := strings.ReplaceAll(p.Files["/var/snap/microk8s/8136/args/containerd.toml"], "8136", "8200")
	n.MustWrite(filepath.Join(n.Root, "var/snap/microk8s/8200/args/containerd.toml"), config)
	n.platform.Want.ConfDir, n.platform.Want.BinDirs = "/var/snap/microk8s/8200/args/cni-network", []string{"/var/snap/microk8s/8200/opt/cni/bin"}
	n.Check(os.RemoveAll(filepath.Join(n.Proc, "100")))
	n.Add(100, 1, "pid:[1]", strings.ReplaceAll(p.Processes[0], "8136", "8200"))
	n.inContainer(func(ins *cniconf.Installer) { n.wantInstalled(ins, "in the new revision") })
}

// TestPlatformsTable: the table has the platforms of the test, and no other row says that
// it was tested by paths. It names every file of values.
func TestPlatformsTable(t *testing.T) {
	want, tested, files := map[string]string{}, map[string]string{}, map[string]bool{}
	for _, p := range critest.Platforms() {
		want[p.Name] = p.Values
	}
	row := regexp.MustCompile(`(?m)^\| ([^|]+) \| ([^|]+) \| [^|]+ \| \*([a-z ]+)\* \|`)
	for _, m := range row.FindAllStringSubmatch(docs.Platforms, -1) {
		name := regexp.MustCompile(`\[(.*)\]\(.*\)`).ReplaceAllString(m[1], "$1")
		values := regexp.MustCompile(`values-[a-z0-9]+\.yaml`).FindString(m[2])
		files[values] = true
		if m[3] == "by paths" {
			tested[name] = values
		}
	}
	if diff := cmp.Diff(want, tested); diff != "" {
		t.Errorf("rows that were tested by paths (-test +table):\n%s", diff)
	}
	found, err := filepath.Glob("../charts/podshunt/values-*.yaml")
	if err != nil || len(found) == 0 {
		t.Fatalf("got files %v and error %v", found, err)
	}
	for _, file := range found {
		if !files[filepath.Base(file)] {
			t.Errorf("%s is in no row of docs/platforms.md", file)
		}
	}
}

// platformNode is a node on which the agent's container has the chart's directories.
type platformNode struct {
	critest.Node
	platform critest.Platform
	// base leads to the node's root directory, for the test or in the container.
	base            string
	container       string
	confDir, binDir string // as the chart has them
	auto            bool   // the agent finds them by itself
	conflist        string // name of the network's file
	content         string // what the distribution writes into it
}

const (
	nodeInContainer   = "/node"
	procInContainer   = "/host/proc"
	pluginInContainer = "/" + api.PluginType
)

type stampedFile struct {
	Content string
	Mode    os.FileMode
	Uid     uint32
}

func newPlatformNode(t *testing.T, p critest.Platform) *platformNode {
	t.Helper()
	sandboxtest.MustBeRoot(t)
	root := filepath.Join(t.TempDir(), "root")
	n := &platformNode{Node: critest.NewSeen(t, p.Files, root, nodeInContainer), platform: p, base: root, container: t.TempDir()}
	n.AddAll(p.Starter, p.Processes)
	n.confDir, n.binDir = chartDirs(t, p.Values)
	shape := filepath.Join("cniconf/testdata/shapes", p.Network, "before")
	sources, err := filepath.Glob(shape + "/*.conflist")
	if err != nil || len(sources) != 1 {
		t.Fatalf("got %v and error %v, want one list", sources, err)
	}
	content, err := os.ReadFile(sources[0])
	n.Check(err)
	n.conflist, n.content = filepath.Base(sources[0]), string(content)
	// The runtime's directories, by its own configuration: the chart's must lead there.
	for _, dir := range []string{p.Want.ConfDir, p.Want.BinDirs[0]} {
		n.MustMkdir(filepath.Join(n.Root, dir))
		n.Check(os.Chown(filepath.Join(n.Root, dir), p.Owner, p.Owner))
	}
	n.MustWrite(n.path(), n.content)
	n.Check(os.Chown(n.path(), p.Owner, p.Owner))
	n.Check(os.Chmod(n.path(), 0o600))
	var list struct{ Plugins []struct{ Type string } }
	n.Check(json.Unmarshal(content, &list))
	n.MustWrite(filepath.Join(n.Root, p.Want.BinDirs[0], list.Plugins[0].Type), "")
	// A static program, since the container has no libraries.
	plugin, err := os.ReadFile(filepath.Join(mustBinDir(t), api.PluginType))
	n.Check(err)
	n.Check(os.WriteFile(filepath.Join(n.container, pluginInContainer), plugin, 0o755))
	return n
}

// mustBinDir returns the directory with what `make build cni` has built.
func mustBinDir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("PODSHUNT_BIN")
	if dir == "" {
		dir = "../bin"
	}
	if _, err := os.Stat(filepath.Join(dir, api.PluginType)); err != nil {
		t.Fatalf("%v: run make build, or set PODSHUNT_BIN", err)
	}
	return dir
}

// chartDirs returns the chart's directories, with a file of values.
func chartDirs(t testing.TB, file string) (confDir, binDir string) {
	t.Helper()
	var values struct {
		Agent struct{ CNIConfDir, CNIBinDir string }
	}
	for _, name := range []string{"values.yaml", file} {
		if name == "" {
			continue
		}
		data, err := os.ReadFile(filepath.Join("../charts/podshunt", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(data, &values); err != nil {
			t.Fatal(err)
		}
	}
	return values.Agent.CNIConfDir, values.Agent.CNIBinDir
}

// inContainer calls f in the agent's container, with an agent that has looked once. f sees
// no path of the test's.
func (n *platformNode) inContainer(f func(*cniconf.Installer)) {
	n.Helper()
	for _, dir := range []string{n.confDir, n.binDir, nodeInContainer, "/proc", procInContainer} {
		n.MustMkdir(filepath.Join(n.container, dir))
	}
	log := slog.New(slog.NewTextHandler(n.Output(), nil))
	n.Check(onLostThread(func() error {
		if err := n.enter(); err != nil {
			return err
		}
		n.base = nodeInContainer
		defer func() { n.base = n.Root }()
		cfg := cniconf.Config{
			ConfDir: n.confDir, BinDir: n.binDir, NodeRoot: procInContainer + "/1/root", Runtime: cri.NewNode(procInContainer, log).Runtime, Plugin: pluginInContainer,
			Section: api.PluginConf{AgentSocket: socketIn(api.RunDir), AgentTimeout: api.PluginTimeout, AttachmentsDir: attachmentsIn(api.RunDir)}, Log: log,
		}
		if n.auto {
			cfg.ConfDir, cfg.BinDir, cfg.Auto = "", "", true
		}
		ins := cniconf.New(cfg)
		ins.Reconcile()
		f(ins)
		return nil
	}))
	if n.Failed() {
		n.FailNow()
	}
}

// enter puts the thread into the container.
func (n *platformNode) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	bind := func(source, target string) error {
		if err := unix.Mount(source, filepath.Join(n.container, target), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	dirs := []string{n.confDir, n.binDir}
	if n.auto {
		dirs = nil
	}
	for _, dir := range dirs {
		// Links are the node's, as for a runtime.
		f, err := nodefs.Root(n.Root).Open(dir, unix.O_PATH)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := bind(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), dir); err != nil {
			return err
		}
	}
	return errors.Join(bind(n.Root, nodeInContainer), bind("/proc", "/proc"), bind(n.Proc, procInContainer), unix.Chroot(n.container), unix.Chdir("/"))
}

// path returns the path of the network's file on the node.
func (n *platformNode) path() string {
	return filepath.Join(n.base, n.platform.Want.ConfDir, n.conflist)
}

// files returns what the runtime's directory of configurations has.
func (n *platformNode) files() map[string]stampedFile {
	n.Helper()
	dir := filepath.Dir(n.path())
	entries, err := os.ReadDir(dir)
	n.Check(err)
	files := map[string]stampedFile{}
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		n.Check(err)
		info, err := e.Info()
		n.Check(err)
		files[e.Name()] = stampedFile{string(content), info.Mode(), info.Sys().(*syscall.Stat_t).Uid}
	}
	return files
}

// rewrite does with the network's file what the distribution does when it starts.
func (n *platformNode) rewrite() {
	n.Helper()
	path, content := n.path(), n.content
	switch n.platform.Rewrite {
	case critest.Edited:
		present, err := os.ReadFile(path)
		n.Check(err)
		content = edited(n, string(present))
	case critest.Renamed:
		path += ".tmp"
	}
	n.Check(os.WriteFile(path, []byte(content), 0o600))
	n.Check(os.Chown(path, n.platform.Owner, n.platform.Owner))
	n.Check(os.Rename(path, n.path()))
}

// edited returns a list with the pods' addresses in it, as kube-router writes it.
func edited(t testing.TB, list string) string {
	t.Helper()
	var keys map[string]any
	if err := json.Unmarshal([]byte(list), &keys); err != nil {
		t.Fatal(err)
	}
	keys["plugins"].([]any)[0].(map[string]any)["ipam"].(map[string]any)["subnet"] = "10.244.1.0/24"
	text, err := json.MarshalIndent(keys, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text) + "\n"
}

// wantInstalled: the runtime's own directories have the plugin, and its entry behind what is
// there.
func (n *platformNode) wantInstalled(ins *cniconf.Installer, what string) {
	n.Helper()
	state, confDir := ins.State(), n.confDir
	if n.auto {
		confDir = n.platform.Want.ConfDir
	}
	if !state.Installed || state.Error != "" || state.Conflist != filepath.Join(confDir, n.conflist) {
		n.Errorf("%s: got state %+v", what, state)
	}
	content, err := os.ReadFile(n.path())
	n.Check(err)
	var list struct{ Plugins []struct{ Type string } }
	n.Check(json.Unmarshal(content, &list))
	if last := list.Plugins[len(list.Plugins)-1]; last.Type != api.PluginType {
		n.Errorf("%s: got %s, want our entry at its end", what, content)
	}
	_, err = os.Stat(filepath.Join(n.base, n.platform.Want.BinDirs[0], api.PluginType))
	n.Check(err)
}

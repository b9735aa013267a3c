// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

// newAutoInstaller takes the directories of *r, on a node with links like those of systems
// whose root is read-only.
func newAutoInstaller(t testing.TB, r *api.Runtime) *Installer {
	t.Helper()
	ins := newTestInstaller(t)
	root := filepath.Join(t.TempDir(), "node")
	for _, dir := range []string{"etc/cni/net.d", "var/opt/cni/bin", "srv/net.d"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/var/opt", filepath.Join(root, "opt")); err != nil {
		t.Fatal(err)
	}
	root = mustBeRoot(t, root)
	cfg := ins.cfg
	cfg.Auto, cfg.NodeRoot, cfg.ConfDir, cfg.BinDir = true, root, "", ""
	cfg.Runtime = func() (api.Runtime, nodefs.Root) { return *r, nodefs.Root(root) }
	return New(cfg)
}

// mustBeRoot returns a path that leads to dir as /proc/1/root does to the node's root: by a
// link that only the kernel can follow. Without root it returns dir.
func mustBeRoot(t testing.TB, dir string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		return dir
	}
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	ready := make(chan error, 1)
	var tid int
	go func() {
		_ = onLostThread(func() error {
			tid = unix.Gettid()
			// Of a mount namespace of its own, so that the link says "/".
			ready <- errors.Join(
				unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
				unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""),
				unix.Chdir(dir),
				unix.Mount(dir, "/", "", unix.MS_MOVE, ""),
				unix.Chroot("."),
			)
			<-done
			return nil
		})
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("/proc/%d/task/%d/root", os.Getpid(), tid)
}

// TestAuto installs where the runtime's configuration says, by the node's links, and moves
// with it. What it says has the node's paths.
func TestAuto(t *testing.T) {
	r := api.Runtime{Name: api.Containerd, Error: "not TOML"}
	ins := newAutoInstaller(t, &r)
	node := func(path string) string { return filepath.Join(ins.cfg.NodeRoot, path) }
	writeFile(t, node("etc/cni/net.d/10-a.conflist"), testList)
	writeFile(t, node("srv/net.d/10-b.conflist"), otherList)
	want := func(what, conflist, text string, contents map[string]string) {
		t.Helper()
		state := ins.State()
		if state.Conflist != conflist || state.Installed != (conflist != "") || !strings.Contains(state.Error, text) || text == "" && state.Error != "" {
			t.Errorf("%s: got state %+v, want conflist %q and an error with %q", what, state, conflist, text)
		}
		if strings.Contains(state.Error, ins.cfg.NodeRoot) {
			t.Errorf("%s: %q has paths that only the agent sees", what, state.Error)
		}
		for path, content := range contents {
			if !hasContent(node(path), content)() {
				t.Errorf("%s: %s is not %s", what, path, content)
			}
		}
	}
	ins.Reconcile()
	want("configuration not known", "", "give --cni-conf-dir and --cni-bin-dir (in the chart: agent.cniConfDir and agent.cniBinDir) instead of auto: not TOML",
		map[string]string{"etc/cni/net.d/10-a.conflist": testList})

	r = api.Runtime{Name: api.Containerd, ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin"}, Networks: 1}
	ins.Reconcile()
	want("known", "/etc/cni/net.d/10-a.conflist", "", map[string]string{"etc/cni/net.d/10-a.conflist": testBoth, "var/opt/cni/bin/podshunt": testPlugin})

	// containerd is started again.
	r.Error = "none of containerd, crio and cri-dockerd is among the processes of the node"
	ins.Reconcile()
	want("for a moment not known", "/etc/cni/net.d/10-a.conflist", "", map[string]string{"etc/cni/net.d/10-a.conflist": testBoth})

	r.Error, r.ConfDir = "", "/srv/net.d"
	ins.Reconcile()
	want("elsewhere", "/srv/net.d/10-b.conflist", "", map[string]string{"etc/cni/net.d/10-a.conflist": testList})

	r.ConfDir = "/srv/none"
	ins.Reconcile()
	want("a directory that is not there", "", "no network configuration yet", map[string]string{"srv/net.d/10-b.conflist": otherList})

	r.ConfDir = "/srv/net.d"
	ins.Reconcile()
	want("there again", "/srv/net.d/10-b.conflist", "", nil)
	// kubelet's reset makes it anew. No mount shows the former one.
	setAside(t, node("srv/net.d"))
	remake(t, node("srv/net.d"))
	writeFile(t, node("srv/net.d/10-a.conflist"), testList)
	ins.Reconcile()
	want("made anew", "/srv/net.d/10-a.conflist", "", map[string]string{"srv/net.d/10-a.conflist": testBoth})

	if remarks, err := ins.Uninstall(); err != nil || len(remarks) > 0 {
		t.Errorf("got remarks %q and error %v", remarks, err)
	}
	want("uninstalled", "", "uninstalled", map[string]string{"srv/net.d/10-a.conflist": testList})
}

// TestAutoUninstall of an agent that has never known the directories holds nobody up, and says
// so.
func TestAutoUninstall(t *testing.T) {
	r := api.Runtime{Error: "no runtime"}
	ins := newAutoInstaller(t, &r)
	remarks, err := ins.Uninstall()
	if err != nil || len(remarks) != 1 || !strings.Contains(remarks[0], "give --cni-conf-dir and --cni-bin-dir") {
		t.Errorf("got remarks %q and error %v, want one that names the flags", remarks, err)
	}
}

// TestAutoLinkOutOfDirectory: a file that is a link is the node's.
func TestAutoLinkOutOfDirectory(t *testing.T) {
	r := api.Runtime{Name: api.Containerd, ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin"}, Networks: 1}
	ins := newAutoInstaller(t, &r)
	if err := os.MkdirAll(filepath.Join(ins.cfg.NodeRoot, "nix/store"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(ins.cfg.NodeRoot, "nix/store/a"), testList)
	if err := os.Symlink("/nix/store/a", filepath.Join(ins.cfg.NodeRoot, "etc/cni/net.d/10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	ins.Reconcile()
	if state := ins.State(); state.Installed || !strings.Contains(state.Error, "/etc/cni/net.d/10-a.conflist is a link to /nix/store/a") {
		t.Errorf("got state %+v, want one that names the link", state)
	}
}

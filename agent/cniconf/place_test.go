// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mounted replaces a directory of the Installer's by one of a node, which it goes on
// seeing whatever becomes of the path on the node, as a container does by its mount.
// It returns the node's path.
func mounted(t testing.TB, root, dir string) string {
	t.Helper()
	node := filepath.Join(root, dir)
	if err := os.MkdirAll(filepath.Dir(node), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, node); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), dir); err != nil {
		t.Fatal(err)
	}
	return node
}

// newMountedInstaller has directories of a node, and is installed there.
func newMountedInstaller(t testing.TB) (ins *Installer, conf, bin string) {
	t.Helper()
	ins = newTestInstaller(t)
	ins.cfg.NodeRoot = filepath.Join(t.TempDir(), "node")
	conf, bin = mounted(t, ins.cfg.NodeRoot, ins.cfg.ConfDir), mounted(t, ins.cfg.NodeRoot, ins.cfg.BinDir)
	ins = New(ins.cfg)
	writeFile(t, filepath.Join(conf, "10-a.conflist"), testList)
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "")
	return ins, conf, bin
}

func remake(t testing.TB, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, dir string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
}

func setAside(t testing.TB, dir string) {
	t.Helper()
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
}

// runUntilEnd returns what ends Run, and nil after two minutes.
func runUntilEnd(t testing.TB, ins *Installer) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	return ins.Run(ctx)
}

const (
	testDeleted  = ": the node has deleted it: once it is made again, restart the agent's pod"
	testReplaced = ": the node has another directory there now, and this container still has the former one"
)

// kubeadm reset and uninstallers of networks delete the directories; what is made
// there again is not what this container has mounted.
func TestDirectoryReplaced(t *testing.T) {
	for name, away := range map[string]func(testing.TB, string){"deleted": remove, "set aside": setAside} {
		t.Run(name, func(t *testing.T) {
			ins, conf, _ := newMountedInstaller(t)
			away(t, conf)
			for range 2 {
				ins.Reconcile()
				wantState(t, ins, "", ins.cfg.ConfDir+testDeleted)
			}
			remake(t, conf)
			writeFile(t, filepath.Join(conf, "10-a.conflist"), testList)
			err := runUntilEnd(t, ins)
			if err == nil || !strings.Contains(err.Error(), ins.cfg.ConfDir+testReplaced) {
				t.Errorf("got error %v, want one that says that the directory is another one", err)
			}
			wantState(t, ins, "", ins.cfg.ConfDir+testReplaced)
			if _, err := ins.Uninstall(); err == nil || !strings.Contains(err.Error(), testReplaced) {
				t.Errorf("uninstall: got error %v, want one that says that the directory is another one", err)
			}
			// An agent that is to leave the node alone does not start again for it.
			if err := ins.look(); err != nil {
				t.Errorf("after an uninstall: got error %v", err)
			}
		})
	}
}

// Without the directory of plugins the entry keeps every pod from starting.
func TestBinDirReplaced(t *testing.T) {
	ins, conf, bin := newMountedInstaller(t)
	remove(t, bin)
	ins.Reconcile()
	wantState(t, ins, "", ins.cfg.BinDir+testDeleted)
	wantFiles(t, ins, "entry taken out", map[string]string{"10-a.conflist": testList})
	writeFile(t, filepath.Join(conf, "10-a.conflist"), testBoth)
	remake(t, bin)
	writeFile(t, filepath.Join(bin, "a"), "")
	if err := runUntilEnd(t, ins); err == nil || !strings.Contains(err.Error(), ins.cfg.BinDir+testReplaced) {
		t.Errorf("got error %v, want one that says that the directory is another one", err)
	}
	wantFiles(t, ins, "entry taken out before the agent ends", map[string]string{"10-a.conflist": testList})
}

// While an Installer runs it notices by itself.
func TestRunEndsWhenReplaced(t *testing.T) {
	ins, conf, _ := newMountedInstaller(t)
	done := make(chan error, 1)
	go func() { done <- runUntilEnd(t, ins) }()
	remove(t, conf)
	remake(t, conf)
	if err := <-done; err == nil || !strings.Contains(err.Error(), testReplaced) {
		t.Errorf("got error %v, want one that says that the directory is another one", err)
	}
}

// What the node has at the path says something only if it was the same directory once.
func TestPlaceOnNode(t *testing.T) {
	dir := t.TempDir()
	root, here := filepath.Join(dir, "root"), filepath.Join(dir, "here")
	remake(t, root)
	remake(t, here)
	check := func(what string, p *place, want string) {
		t.Helper()
		err := p.check()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got error %v, want one with %q", what, err, want)
		}
	}
	node := filepath.Join(root, here)
	if err := os.MkdirAll(node, 0o755); err != nil {
		t.Fatal(err)
	}
	other := &place{path: here, root: root}
	check("another directory from the start", other, "")
	if other.shared {
		t.Error("another directory is taken for the same")
	}

	// By a link that begins at the node's root.
	remove(t, node)
	if err := os.Symlink("/real", node); err != nil {
		t.Fatal(err)
	}
	real := filepath.Join(root, "real")
	setAside(t, here)
	if err := os.Rename(here+".old", real); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(real)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), here); err != nil {
		t.Fatal(err)
	}
	linked, alone, blind := &place{path: here, root: root}, &place{path: here, root: filepath.Join(dir, "none")}, &place{path: here}
	for _, p := range []*place{linked, alone, blind} {
		check("as it was made", p, "")
	}
	if !linked.shared || alone.shared || blind.shared {
		t.Errorf("got shared %t, %t and %t, want only the first", linked.shared, alone.shared, blind.shared)
	}
	remove(t, real)
	for _, p := range []*place{linked, alone, blind} {
		check("deleted", p, testDeleted)
	}
	remake(t, real)
	check("made again", linked, testReplaced)
	for _, p := range []*place{alone, blind} {
		check("made again where nobody sees it", p, testDeleted)
	}

	// Without a mount in between a path leads to what is there now.
	plain := &place{path: node + ".plain", root: "/"}
	for range 2 {
		check("not there", plain, "")
		remake(t, plain.path)
		check("there", plain, "")
		if !plain.shared {
			t.Error("the same directory is taken for another one")
		}
		remove(t, plain.path)
	}
}

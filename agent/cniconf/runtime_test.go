// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

// runtimeIs lets an Installer know a runtime with its own directories, changed by change.
func runtimeIs(ins *Installer, name string, change func(*api.Runtime)) *Installer {
	r := api.Runtime{Name: name, ConfDir: ins.cfg.ConfDir, BinDirs: []string{"/usr/libexec/cni", ins.cfg.BinDir}, Networks: 1}
	change(&r)
	ins.cfg.Runtime = func() (api.Runtime, nodefs.Root) { return r, "/" }
	return New(ins.cfg)
}

// TestNetworkByName puts the entry into the network that CRI-O is told to use, wherever it
// is in the order of names.
func TestNetworkByName(t *testing.T) {
	const named = `{"cniVersion":"1.0.0","name":"ovn-kubernetes","plugins":[{"type":"a"}]}`
	for _, tc := range []struct {
		name, network, conflist, err string
		files                        map[string]string
	}{
		{"the second file", "ovn-kubernetes", "20-ovn.conflist", "", map[string]string{"10-a.conflist": testList, "20-ovn.conflist": named}},
		{"two of the name", "ovn-kubernetes", "20-ovn.conflist", "", map[string]string{"10-a.conflist": testList, "20-ovn.conflist": named, "30-ovn.conflist": named}},
		{"behind one that is not valid", "ovn-kubernetes", "20-ovn.conflist", "10-a.conflist is not valid", map[string]string{"10-a.conflist": "{", "20-ovn.conflist": named}},
		{"a lone configuration", "a", "20-a-podshunt.conflist", "", map[string]string{"10-b.conflist": otherList, "20-a.conf": testLone}},
		{"not there yet", "ovn-kubernetes", "", `cri-o uses the one called "ovn-kubernetes"`, map[string]string{"10-a.conflist": testList}},
		{"no name", "", "10-a.conflist", "", map[string]string{"10-a.conflist": testList, "20-ovn.conflist": named}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ins := runtimeIs(newTestInstaller(t), api.CRIO, func(r *api.Runtime) { r.Network = tc.network })
			for name, content := range tc.files {
				writeFile(t, ins.conf(name), content)
			}
			ins.Reconcile()
			wantState(t, ins, tc.conflist, tc.err)
			for name, content := range tc.files {
				if name != tc.conflist && !hasContent(ins.conf(name), content)() {
					t.Errorf("%s has changed", name)
				}
			}
		})
	}
}

// TestPassedOver: CRI-O and cri-dockerd ignore a network if one of its plugins is missing, and
// take the next one; containerd does not look.
func TestPassedOver(t *testing.T) {
	const lacking = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"a"},{"type":"tuning"}]}`
	elsewhere := t.TempDir()
	writeFile(t, filepath.Join(elsewhere, "tuning"), "")
	for _, tc := range []struct {
		name, runtime, network string
		binDirs                []string // beside that of the Installer
		files                  map[string]string
		conflist, err          string
	}{
		{
			name: "CRI-O", runtime: api.CRIO, files: map[string]string{"10-a.conflist": lacking, "20-b.conflist": otherList},
			conflist: "20-b.conflist", err: `10-a.conflist: cri-o passes over it, since there is no "tuning" in `,
		},
		{
			name: "cri-dockerd", runtime: api.CRIDockerd, files: map[string]string{"10-a.conf": `{"cniVersion":"1.0.0","name":"a","type":"tuning"}`, "20-b.conflist": otherList},
			conflist: "20-b.conflist", err: "10-a.conf: cri-dockerd passes over it",
		},
		{
			name: "the plugin is in another directory", runtime: api.CRIO, binDirs: []string{elsewhere},
			files: map[string]string{"10-a.conflist": lacking, "20-b.conflist": otherList}, conflist: "10-a.conflist",
		},
		{
			name: "by name", runtime: api.CRIO, network: "a", files: map[string]string{"10-a.conflist": lacking, "20-a.conflist": testList},
			conflist: "20-a.conflist", err: "10-a.conflist: cri-o passes over it",
		},
		{
			name: "none is left", runtime: api.CRIO, files: map[string]string{"10-a.conflist": lacking},
			err: "10-a.conflist: cri-o passes over it",
		},
		{
			name: "our entry does not count", runtime: api.CRIO, files: map[string]string{"10-a.conflist": testBoth, "20-b.conflist": otherList},
			conflist: "10-a.conflist",
		},
		{
			name: "containerd", runtime: api.Containerd, files: map[string]string{"10-a.conflist": lacking, "20-b.conflist": otherList},
			conflist: "10-a.conflist",
		},
		{name: "not known", files: map[string]string{"10-a.conflist": lacking, "20-b.conflist": otherList}, conflist: "10-a.conflist"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ins := runtimeIs(newTestInstaller(t), tc.runtime, func(r *api.Runtime) {
				r.Network, r.BinDirs = tc.network, append(tc.binDirs, r.BinDirs...)
			})
			for name, content := range tc.files {
				writeFile(t, ins.conf(name), content)
			}
			ins.Reconcile()
			wantState(t, ins, tc.conflist, tc.err)
			if _, err := ins.Uninstall(); err != nil {
				t.Fatal(err)
			}
			if tc.name != "our entry does not count" {
				wantFiles(t, ins, "uninstalled", tc.files)
			}
		})
	}
}

// TestNetworkByNameMoves follows CRI-O, which was started again with another network.
func TestNetworkByNameMoves(t *testing.T) {
	ins := newTestInstaller(t)
	writeFile(t, ins.conf("10-a.conflist"), testList)
	writeFile(t, ins.conf("20-b.conflist"), otherList)
	runtimeIs(ins, api.CRIO, func(r *api.Runtime) {}).Reconcile()
	ins = runtimeIs(ins, api.CRIO, func(r *api.Runtime) { r.Network = "b" })
	ins.Reconcile()
	wantState(t, ins, "20-b.conflist", "")
	if !hasContent(ins.conf("10-a.conflist"), testList)() {
		t.Error("the entry stays in the network that is not used")
	}
}

// TestRuntimeDirs installs into the runtime's own directories only.
func TestRuntimeDirs(t *testing.T) {
	other := t.TempDir()
	for _, tc := range []struct {
		name, err string
		change    func(ins *Installer, r *api.Runtime)
	}{
		{"the same", "", func(*Installer, *api.Runtime) {}},
		{"with a slash at the end", "", func(ins *Installer, r *api.Runtime) { r.ConfDir += "/" }},
		{"by a link", "", func(ins *Installer, r *api.Runtime) {
			link := filepath.Join(other, "link")
			if err := os.Symlink(ins.cfg.ConfDir, link); err != nil {
				t.Fatal(err)
			}
			r.ConfDir = link
		}},
		{"not known", "", func(ins *Installer, r *api.Runtime) { *r = api.Runtime{Name: api.Containerd, Error: "not TOML"} }},
		{"other configurations", "containerd reads network configurations from " + other + " (by /etc/containerd/config.toml)", func(ins *Installer, r *api.Runtime) {
			r.ConfDir, r.Sources = other, []string{"/etc/containerd/config.toml"}
		}},
		{"other plugins", "containerd looks for plugins in /usr/libexec/cni and " + other + " (its default)", func(ins *Installer, r *api.Runtime) { r.BinDirs[1] = other }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ins := newTestInstaller(t)
			// An entry from when the runtime was another.
			writeFile(t, ins.conf("10-a.conflist"), testBoth)
			ins = runtimeIs(ins, api.Containerd, func(r *api.Runtime) { tc.change(ins, r) })
			ins.Reconcile()
			if tc.err == "" {
				wantState(t, ins, "10-a.conflist", "")
				return
			}
			wantState(t, ins, "", tc.err)
			wantFiles(t, ins, "no entry", map[string]string{"10-a.conflist": testList})
			if _, err := os.Stat(filepath.Join(ins.cfg.BinDir, api.PluginType)); err == nil {
				t.Error("the plugin is installed where no runtime looks for it")
			}
		})
	}
}

// TestSeveralNetworks makes no list beside a lone configuration for a runtime that would
// take the two for two networks.
func TestSeveralNetworks(t *testing.T) {
	for _, networks := range []int{0, 2} {
		ins := runtimeIs(newTestInstaller(t), api.Containerd, func(r *api.Runtime) { r.Networks = networks })
		writeFile(t, ins.conf("10-a.conf"), testLone)
		ins.Reconcile()
		wantState(t, ins, "", "make it a list")
		wantFiles(t, ins, "no list", map[string]string{"10-a.conf": testLone})

		writeFile(t, ins.conf("05-b.conflist"), otherList)
		ins.Reconcile()
		wantState(t, ins, "05-b.conflist", "")
	}
}

// TestLinkOutOfMount leaves a network alone that it sees no file of, and those that come
// behind it, too.
func TestLinkOutOfMount(t *testing.T) {
	store := "/nix/store/0a-cni"
	for _, tc := range []struct {
		name, link, content string // content of the file in the store; "" is none
		conflist, err       string
	}{
		{"list", "10-flannel.conflist", testList, "", "10-flannel.conflist is a link to " + store},
		{"lone configuration", "10-flannel.conf", testLone, "", "10-flannel.conf is a link to " + store},
		{"list with our entry", "10-flannel.conflist", testBoth, "10-flannel.conflist", ""},
		{"not valid", "10-flannel.conflist", "{", "87-podman.conflist", "10-flannel.conflist is not valid: "},
		{"not on the node either", "10-flannel.conflist", "", "87-podman.conflist", "10-flannel.conflist is not valid: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ins := newTestInstaller(t)
			ins.cfg.NodeRoot = filepath.Join(t.TempDir(), "node")
			conf := mounted(t, ins.cfg.NodeRoot, ins.cfg.ConfDir)
			mounted(t, ins.cfg.NodeRoot, ins.cfg.BinDir)
			ins = New(ins.cfg)
			if err := os.Symlink(store, filepath.Join(conf, tc.link)); err != nil {
				t.Fatal(err)
			}
			if tc.content != "" {
				if err := os.MkdirAll(filepath.Join(ins.cfg.NodeRoot, filepath.Dir(store)), 0o755); err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(ins.cfg.NodeRoot, store), tc.content)
			}
			writeFile(t, filepath.Join(conf, "87-podman.conflist"), otherList)
			ins.Reconcile()
			wantState(t, ins, tc.conflist, tc.err)
			if tc.conflist != "87-podman.conflist" && !hasContent(filepath.Join(conf, "87-podman.conflist"), otherList)() {
				t.Error("another network has changed")
			}
			if tc.content != "" && !hasContent(filepath.Join(ins.cfg.NodeRoot, store), tc.content)() {
				t.Error("the file in the store has changed")
			}
			// Its owner replaces the link by a file.
			if err := os.Remove(filepath.Join(conf, tc.link)); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(conf, "10-flannel.conflist"), testList)
			ins.Reconcile()
			wantState(t, ins, "10-flannel.conflist", "")
			if _, err := ins.Uninstall(); err != nil {
				t.Fatal(err)
			}
			for name, content := range map[string]string{"10-flannel.conflist": testList, "87-podman.conflist": otherList} {
				if !hasContent(filepath.Join(conf, name), content)() {
					t.Errorf("%s is not what it was", name)
				}
			}
		})
	}
}

// TestWholeSentences has no error that lacks a value to give.
func TestWholeSentences(t *testing.T) {
	err := nodeRuntime{Runtime: api.Runtime{Name: api.CRIO, ConfDir: "/c", BinDirs: []string{"/b"}}, root: "/"}.checkDirs("/x", "/y")
	for _, want := range []string{"--cni-conf-dir=/c (", "--cni-bin-dir=/b ("} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want %q", err, want)
		}
	}
}

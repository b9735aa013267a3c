// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestInstall starts from the configuration of the network alone: the agent makes
// the chain, by which a pod takes part as soon as it is added.
func TestInstall(t *testing.T) {
	n := mustNode(t)
	n.MustWritePods(t, "web "+on)
	confDir, binDir := filepath.Join(n.Base, "net.d"), filepath.Join(n.Base, "cni-bin")
	for _, dir := range []string{confDir, binDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	list, err := cniconf.Remove([]byte(n.Conflist()))
	if err != nil {
		t.Fatal(err)
	}
	// The agent looks for the plugin that makes the interface before it puts its own beside it.
	if err := os.Symlink(filepath.Join(n.BinDir, "bridge"), filepath.Join(binDir, "bridge")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(confDir, "10-podshunt.conflist")
	if err := os.WriteFile(path, list, 0o644); err != nil {
		t.Fatal(err)
	}
	start := func() {
		n.mustStart(t, "--cni-conf-dir="+confDir, "--cni-bin-dir="+binDir)
		sandboxtest.WaitFor(t, "installed in "+path, func() api.CNIStatus { return *n.MustStatus(t).CNI }, func(s api.CNIStatus) bool {
			return s.Conflist == path && s.Installed && s.Error == ""
		})
	}
	start()
	installed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.MustAddPod(t, n, "web", sandbox.PodOptions{Conflist: string(installed)})
	wantDiff(t, "pods", []string{"web: takes part"}, n.MustStates(t))

	n.MustStop(t)
	if err := os.WriteFile(path, list, 0o644); err != nil {
		t.Fatal(err)
	}
	start()
	again, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "configuration after another start", string(installed), string(again))
	want, err1 := os.ReadFile(filepath.Join(n.BinDir, api.PluginType))
	got, err2 := os.ReadFile(filepath.Join(binDir, api.PluginType))
	if err1 != nil || err2 != nil || string(got) != string(want) {
		t.Errorf("got a plugin of %d bytes with errors %v and %v, want the %d of the built one", len(got), err1, err2, len(want))
	}
}

// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/watch"
)

const (
	testList   = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"a"}]}`
	testBoth   = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"a"},{"type":"podshunt"}]}`
	otherList  = `{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"b"}]}`
	testLone   = `{"cniVersion":"1.0.0","name":"a","type":"a"}`
	testPlugin = "#!/bin/sh\necho '{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}'\n"
)

// newTestInstaller has an empty directory of configurations, one of the plugins that
// the networks of these tests begin with, and a plugin that says its versions.
func newTestInstaller(t testing.TB) *Installer {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{
		ConfDir: filepath.Join(dir, "net.d"), BinDir: filepath.Join(dir, "bin"), Plugin: filepath.Join(dir, "plugin"),
		Section: testConf, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	for _, dir := range []string{cfg.ConfDir, cfg.BinDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, cfg.Plugin, testPlugin)
	for _, plugin := range []string{"a", "b", "e"} {
		writeFile(t, filepath.Join(cfg.BinDir, plugin), "")
	}
	return New(cfg)
}

func (ins *Installer) conf(name string) string { return filepath.Join(ins.cfg.ConfDir, name) }

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func snapshot(t testing.TB, dir string) map[string]stamped {
	t.Helper()
	result := map[string]stamped{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		content, err1 := os.ReadFile(path)
		info, err2 := os.Stat(path)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		stat := info.Sys().(*syscall.Stat_t)
		result[e.Name()] = stamped{string(content), info.Mode(), stat.Uid, stat.Gid, info.ModTime().UnixNano(), stat.Ino}
	}
	return result
}

func wantFiles(t testing.TB, ins *Installer, what string, want map[string]string) {
	t.Helper()
	if diff := cmp.Diff(want, contents(t, ins.cfg.ConfDir)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// wantState compares the state; its error has to contain the given text, or to be empty.
func wantState(t testing.TB, ins *Installer, conflist, text string) {
	t.Helper()
	state := ins.State()
	path := ""
	if conflist != "" {
		path = ins.conf(conflist)
	}
	if state.Conflist != path || state.Installed != (path != "") || !strings.Contains(state.Error, text) || text == "" && state.Error != "" {
		t.Errorf("got state %+v, want conflist %q and an error with %q", state, path, text)
	}
}

// within waits for what has to be so some time after what was done.
func within(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("%s: not within %s", what, limit)
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("%s: %s", what, time.Since(start).Round(time.Millisecond))
}

func hasContent(path, want string) func() bool {
	return func() bool {
		got, err := os.ReadFile(path)
		return err == nil && string(got) == want
	}
}

func start(t testing.TB, ins *Installer) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ins.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRunKeeps(t *testing.T) {
	ins := newTestInstaller(t)
	path, plugin := ins.conf("10-a.conflist"), filepath.Join(ins.cfg.BinDir, "podshunt")
	if err := os.Remove(ins.cfg.ConfDir); err != nil {
		t.Fatal(err)
	}
	start(t, ins)
	within(t, 10*time.Second, "says that the directory is missing", func() bool {
		return strings.Contains(ins.State().Error, "no network configuration yet") && strings.Contains(ins.State().Error, "net.d: no such file")
	})
	if err := os.Mkdir(ins.cfg.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, testList)
	within(t, 10*time.Second, "installed when the directory is made", hasContent(path, testBoth))
	within(t, 10*time.Second, "plugin", hasContent(plugin, testPlugin))
	within(t, 10*time.Second, "state", func() bool { return ins.State().Installed })

	writeFile(t, path, testList)
	within(t, 10*time.Second, "kept when the file is written in place", hasContent(path, testBoth))
	writeFile(t, path+".tmp", testList)
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
	within(t, 10*time.Second, "kept when the file is replaced", hasContent(path, testBoth))
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	within(t, 10*time.Second, "kept when the plugin is deleted", hasContent(plugin, testPlugin))

	if _, err := ins.Uninstall(); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, ins, "uninstalled", map[string]string{"10-a.conflist": testList})
	time.Sleep(pollInterval + watch.Settle)
	wantFiles(t, ins, "still uninstalled", map[string]string{"10-a.conflist": testList})
	wantState(t, ins, "", "uninstalled: start the agent again")
}

func TestNoNetwork(t *testing.T) {
	ins := newTestInstaller(t)
	ins.Reconcile()
	wantState(t, ins, "", "no network configuration yet")
	writeFile(t, ins.conf("10-a.conflist"), "")
	writeFile(t, ins.conf("20-a.conflist"), `{"cniVersion":"1.0.0","name":"a","plugins":[]}`)
	ins.Reconcile()
	wantState(t, ins, "", "no network configuration yet")
	wantState(t, ins, "", "20-a.conflist is not valid: error parsing configuration list: no plugins in list")
	writeFile(t, ins.conf("05-a.conflist"), `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"podshunt"}]}`)
	ins.Reconcile()
	wantState(t, ins, "", `no plugin besides podshunt in "plugins"`)
}

// The entry follows the file that the runtime uses.
func TestFirstValid(t *testing.T) {
	ins := newTestInstaller(t)
	writeFile(t, ins.conf("10-a.conflist"), "{")
	writeFile(t, ins.conf("20-b.conflist"), otherList)
	ins.Reconcile()
	wantState(t, ins, "20-b.conflist", "10-a.conflist is not valid: error parsing configuration list")
	writeFile(t, ins.conf("10-a.conflist"), testList)
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "")
	wantFiles(t, ins, "first repaired", map[string]string{"10-a.conflist": testBoth, "20-b.conflist": otherList})

	// A lone configuration before it, and a list before that.
	writeFile(t, ins.conf("08-c.conf"), testLone)
	ins.Reconcile()
	wantState(t, ins, "08-c-podshunt.conflist", "")
	writeFile(t, ins.conf("05-b.conflist"), otherList)
	ins.Reconcile()
	wantState(t, ins, "05-b.conflist", "")
	wantFiles(t, ins, "moved", map[string]string{
		"05-b.conflist": strings.Replace(otherList, "]", `,{"type":"podshunt"}]`, 1),
		"08-c.conf":     testLone, "10-a.conflist": testList, "20-b.conflist": otherList,
	})
}

func TestUpgrade(t *testing.T) {
	ins := newTestInstaller(t)
	path := ins.conf("10-a.conflist")
	writeFile(t, path, strings.Replace(testBoth, `"podshunt"`, `"podshunt","agentTimeout":"1s"`, 1))
	writeFile(t, filepath.Join(ins.cfg.BinDir, "podshunt"), "#!/bin/sh\nexit 1\n")
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "")
	wantFiles(t, ins, "upgraded", map[string]string{"10-a.conflist": testBoth})
}

// Others want to be the last plugin, too: any place behind the one that makes the
// interface is good, also for an entry that is upgraded there.
func TestPlace(t *testing.T) {
	for name, plugins := range map[string][2]string{
		"in the middle":           {`{"type":"a"},{"type":"podshunt"},{"type":"mesh"}`, `{"type":"a"},{"type":"podshunt"},{"type":"mesh"}`},
		"upgraded in the middle":  {`{"type":"a"}, {"type":"podshunt","agentTimeout":"1s"} ,{"type":"mesh"}`, `{"type":"a"}, {"type":"podshunt"} ,{"type":"mesh"}`},
		"before the interface":    {`{"type":"podshunt"},{"type":"a"},{"type":"mesh"}`, `{"type":"a"},{"type":"mesh"},{"type":"podshunt"}`},
		"twice":                   {`{"type":"a"},{"type":"podshunt"},{"type":"mesh"},{"type":"podshunt"}`, `{"type":"a"},{"type":"mesh"},{"type":"podshunt"}`},
		"before the mesh and all": {`{"type":"podshunt"},{"type":"a"},{"type":"podshunt"},{"type":"mesh"}`, `{"type":"a"},{"type":"mesh"},{"type":"podshunt"}`},
	} {
		t.Run(name, func(t *testing.T) {
			ins := newTestInstaller(t)
			list := func(plugins string) string { return strings.Replace(testList, `{"type":"a"}`, plugins, 1) }
			writeFile(t, ins.conf("10-a.conflist"), list(plugins[0]))
			ins.Reconcile()
			wantFiles(t, ins, "kept", map[string]string{"10-a.conflist": list(plugins[1])})
			wantState(t, ins, "10-a.conflist", "")
		})
	}
}

// Another agent that moves its own entry to the end with each change does not make
// this one write again, however often it does so.
func TestTwoWhoWantToBeLast(t *testing.T) {
	ins := newTestInstaller(t)
	path := ins.conf("10-a.conflist")
	writeFile(t, path, strings.Replace(testList, "]", `,{"type":"mesh"}]`, 1))
	const want = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"a"},{"type":"podshunt"},{"type":"mesh"}]}`
	for range 3 * maxWrites {
		ins.Reconcile()
		wantState(t, ins, "10-a.conflist", "")
		list, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// What the other does: takes itself out, and appends itself.
		other := strings.Replace(string(list), `,{"type":"mesh"}`, "", 1)
		writeFile(t, path, strings.Replace(other, "]", `,{"type":"mesh"}]`, 1))
	}
	wantFiles(t, ins, "the other is last", map[string]string{"10-a.conflist": want})
	if got := len(ins.writes[path]); got != 1 {
		t.Errorf("got %d changes of the list, want 1", got)
	}
}

func mustWrap(t testing.TB, lone, name string) string {
	t.Helper()
	list, err := Wrap([]byte(lone), []byte(testSection), name)
	if err != nil {
		t.Fatal(err)
	}
	return string(list)
}

// A lone configuration stays its owner's, and a list goes beside it.
func TestBeside(t *testing.T) {
	const changed = `{"cniVersion":"1.0.0","name":"a","type":"a","mtu":1400}`
	list, changedList := mustWrap(t, testLone, "10-a.conf"), mustWrap(t, changed, "10-a.conf")
	meshed := string(withPlugin([]byte(list), `{"type":"mesh"}`))
	meshedOnly, err := Remove([]byte(meshed))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name                    string
		before, kept, uninstall map[string]string
		alone                   map[string]string // after an uninstall without an agent, if that differs
		conflist, err           string
	}{
		{
			name:      "new",
			before:    map[string]string{"10-a.conf": testLone, "20-b.conflist": otherList},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": list, "20-b.conflist": otherList},
			uninstall: map[string]string{"10-a.conf": testLone, "20-b.conflist": otherList},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "json",
			before:    map[string]string{"10-a.json": testLone},
			kept:      map[string]string{"10-a.json": testLone, "10-a-podshunt.conflist": mustWrap(t, testLone, "10-a.json")},
			uninstall: map[string]string{"10-a.json": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "written again by its owner",
			before:    map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": list},
			kept:      map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": changedList},
			uninstall: map[string]string{"10-a.conf": changed},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "deleted by its owner",
			before:    map[string]string{"10-a-podshunt.conflist": list, "20-b.conflist": otherList},
			kept:      map[string]string{"20-b.conflist": strings.Replace(otherList, "]", `,{"type":"podshunt"}]`, 1)},
			uninstall: map[string]string{"20-b.conflist": otherList},
			conflist:  "20-b.conflist",
		},
		{
			name:      "deleted by its owner, and nothing else is there",
			before:    map[string]string{"10-a-podshunt.conflist": meshed},
			kept:      map[string]string{},
			uninstall: map[string]string{},
			err:       "no network configuration yet",
		},
		{
			name:      "broken by its owner",
			before:    map[string]string{"10-a.conf": "{", "10-a-podshunt.conflist": list, "20-b.conflist": otherList},
			kept:      map[string]string{"10-a.conf": "{", "20-b.conflist": strings.Replace(otherList, "]", `,{"type":"podshunt"}]`, 1)},
			uninstall: map[string]string{"10-a.conf": "{", "20-b.conflist": otherList},
			conflist:  "20-b.conflist",
			err:       "10-a.conf is not valid",
		},
		{
			name:      "another network comes first",
			before:    map[string]string{"05-b.conflist": otherList, "10-a.conf": testLone, "10-a-podshunt.conflist": list},
			kept:      map[string]string{"05-b.conflist": strings.Replace(otherList, "]", `,{"type":"podshunt"}]`, 1), "10-a.conf": testLone},
			uninstall: map[string]string{"05-b.conflist": otherList, "10-a.conf": testLone},
			conflist:  "05-b.conflist",
		},
		{
			name:      "a mesh has chained itself into the list",
			before:    map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": meshed},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": meshed},
			uninstall: map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": string(meshedOnly)},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:   "a mesh has chained itself into the list, and the owner writes again",
			before: map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": string(withPlugin(meshedOnly, `{"type":"podshunt","agentTimeout":"1s"}`))},
			kept: map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": string(withPlugin(
				[]byte(strings.Replace(changedList, `,
    {"type":"podshunt"}`, `,
    {"type":"mesh"}`, 1)), testSection))},
			uninstall: map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": strings.Replace(changedList, `{"type":"podshunt"}`, `{"type":"mesh"}`, 1)},
			alone:     map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": string(meshedOnly)},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "the list is edited",
			before:    map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": changedList},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": list},
			uninstall: map[string]string{"10-a.conf": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "the list is broken",
			before:    map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": list + "}"},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": list},
			uninstall: map[string]string{"10-a.conf": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "crash while the list is written",
			before:    map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist.podshunt-new": "{"},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": list},
			uninstall: map[string]string{"10-a.conf": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "a file of others has the list's name",
			before:    map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": "{"},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": "{"},
			uninstall: map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": "{"},
			err:       "10-a-podshunt.conflist is in the way: give that file another name",
		},
		{
			name:      "another file between the names",
			before:    map[string]string{"10-a.conf": testLone, "10-a-x.conf": "{"},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-x.conf": "{"},
			uninstall: map[string]string{"10-a.conf": testLone, "10-a-x.conf": "{"},
			err:       "10-a-podshunt.conflist, and comes before it now: give that file a later name",
		},
		{
			name:      "another file comes between the names",
			before:    map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": list, "10-a-x.conf": "{"},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-x.conf": "{"},
			uninstall: map[string]string{"10-a.conf": testLone, "10-a-x.conf": "{"},
			err:       "10-a-podshunt.conflist, and comes before it now: give that file a later name",
		},
		{
			name:      "no name",
			before:    map[string]string{"10-a.conf": `{"cniVersion":"1.0.0","type":"a"}`, "20-b.conflist": otherList},
			kept:      map[string]string{"10-a.conf": `{"cniVersion":"1.0.0","type":"a"}`, "20-b.conflist": otherList},
			uninstall: map[string]string{"10-a.conf": `{"cniVersion":"1.0.0","type":"a"}`, "20-b.conflist": otherList},
			err:       `10-a.conf: it has no "name"`,
		},
		{
			name:      "thin multus",
			before:    map[string]string{"00-multus.conf": strings.Replace(testLone, `"type":"a"`, `"type":"multus"`, 1)},
			kept:      map[string]string{"00-multus.conf": strings.Replace(testLone, `"type":"a"`, `"type":"multus"`, 1)},
			uninstall: map[string]string{"00-multus.conf": strings.Replace(testLone, `"type":"a"`, `"type":"multus"`, 1)},
			err:       "multus in its thin form",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.alone == nil {
				tc.alone = tc.uninstall
			}
			checkDir(t, tc.before, tc.kept, tc.uninstall, tc.alone, tc.conflist, tc.err)
		})
	}
}

// The owner of a lone configuration takes its network away, and brings it back.
func TestRunFollowsOwner(t *testing.T) {
	ins := newTestInstaller(t)
	lone, list, next := ins.conf("10-a.conf"), ins.conf("10-a-podshunt.conflist"), ins.conf("20-b.conflist")
	writeFile(t, lone, testLone)
	writeFile(t, next, otherList)
	start(t, ins)
	const limit = 2 * time.Minute
	within(t, limit, "list made", hasContent(list, mustWrap(t, testLone, "10-a.conf")))
	if err := os.Remove(lone); err != nil {
		t.Fatal(err)
	}
	within(t, limit, "list gone", func() bool {
		_, err := os.Stat(list)
		return errors.Is(err, fs.ErrNotExist)
	})
	within(t, limit, "entry in the next network", hasContent(next, strings.Replace(otherList, "]", `,{"type":"podshunt"}]`, 1)))
	writeFile(t, lone, testLone)
	within(t, limit, "list made again", hasContent(list, mustWrap(t, testLone, "10-a.conf")))
	within(t, limit, "entry in one network only", hasContent(next, otherList))
	within(t, limit, "state", func() bool { return ins.State().Conflist == list && ins.State().Error == "" })
}

// checkDir wants a directory to become kept by a look, uninstall by an uninstall
// then, and alone by one without an agent.
func checkDir(t *testing.T, before, kept, uninstall, alone map[string]string, conflist, text string) {
	t.Helper()
	ins, fresh := newTestInstaller(t), newTestInstaller(t)
	writeFile(t, filepath.Join(ins.cfg.BinDir, "multus"), "")
	for name, content := range before {
		writeFile(t, ins.conf(name), content)
		writeFile(t, fresh.conf(name), content)
	}
	stamps := snapshot(t, ins.cfg.ConfDir)
	ins.Reconcile()
	wantFiles(t, ins, "kept", kept)
	wantState(t, ins, conflist, text)
	installed := snapshot(t, ins.cfg.ConfDir)
	ins.Reconcile()
	if diff := cmp.Diff(installed, snapshot(t, ins.cfg.ConfDir)); diff != "" {
		t.Errorf("second look (-want +got):\n%s", diff)
	}
	_, err := ins.Uninstall()
	if err != nil {
		t.Error(err)
	}
	wantFiles(t, ins, "uninstalled", uninstall)
	// Nobody has touched the lone ones: not even the time of their last change differs.
	for name, after := range snapshot(t, ins.cfg.ConfDir) {
		before, ok := stamps[name]
		if diff := cmp.Diff(before, after); ok && filepath.Ext(name) != listExtension && diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if _, err = Uninstall(fresh.cfg.ConfDir, fresh.cfg.BinDir, fresh.cfg.Log); err != nil {
		t.Error(err)
	}
	wantFiles(t, fresh, "uninstalled without an agent", alone)
}

// Earlier versions put a list in the place of a lone configuration, and that aside.
func TestEarlierLayout(t *testing.T) {
	const changed = `{"cniVersion":"1.0.0","name":"a","type":"a","mtu":1400}`
	earlier := func(lone string) string {
		return strings.Replace(mustWrap(t, lone, "10-a.conf"), `  "podshunt.io/made-of": "10-a.conf",`+"\n", "", 1)
	}
	list := earlier(testLone)
	stripped, err := Remove([]byte(list))
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(list, `"type": "a"`, `"type": "e"`, 1)
	for _, tc := range []struct {
		name                    string
		before, kept, uninstall map[string]string
		conflist                string
	}{
		{
			name:      "as it was left",
			before:    map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": list},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": mustWrap(t, testLone, "10-a.conf")},
			uninstall: map[string]string{"10-a.conf": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "json",
			before:    map[string]string{"10-a.json.podshunt": testLone, "10-a.conflist": list},
			kept:      map[string]string{"10-a.json": testLone, "10-a-podshunt.conflist": mustWrap(t, testLone, "10-a.json")},
			uninstall: map[string]string{"10-a.json": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "crash before the configuration was renamed",
			before:    map[string]string{"10-a.conf": testLone, "10-a.conflist": list, "10-a.conflist.podshunt-new": "{"},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": mustWrap(t, testLone, "10-a.conf"), "10-a.conflist.podshunt-new": "{"},
			uninstall: map[string]string{"10-a.conf": testLone},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "written again by its owner",
			before:    map[string]string{"10-a.conf": changed, "10-a.conf.podshunt": testLone, "10-a.conflist": list},
			kept:      map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": mustWrap(t, changed, "10-a.conf")},
			uninstall: map[string]string{"10-a.conf": changed},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "written again, crash before it was renamed",
			before:    map[string]string{"10-a.conf": changed, "10-a.conf.podshunt": testLone, "10-a.conflist": earlier(changed)},
			kept:      map[string]string{"10-a.conf": changed, "10-a-podshunt.conflist": mustWrap(t, changed, "10-a.conf")},
			uninstall: map[string]string{"10-a.conf": changed},
			conflist:  "10-a-podshunt.conflist",
		},
		{
			name:      "list rewritten by others",
			before:    map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": otherList},
			kept:      map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": strings.Replace(otherList, "]", `,{"type":"podshunt"}]`, 1)},
			uninstall: map[string]string{"10-a.conflist": otherList},
			conflist:  "10-a.conflist",
		},
		{
			name:      "list edited",
			before:    map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": edited},
			kept:      map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": edited},
			uninstall: map[string]string{"10-a.conflist": strings.Replace(string(stripped), `"a"`+"\n    }", `"e"`+"\n    }", 1)},
			conflist:  "10-a.conflist",
		},
		{
			name:      "a mesh has chained itself into the list",
			before:    map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": string(withPlugin([]byte(list), `{"type":"mesh"}`))},
			kept:      map[string]string{"10-a.conf.podshunt": testLone, "10-a.conflist": string(withPlugin([]byte(list), `{"type":"mesh"}`))},
			uninstall: map[string]string{"10-a.conflist": string(withPlugin(stripped, `{"type":"mesh"}`))},
			conflist:  "10-a.conflist",
		},
		{
			name:      "what was kept is lost",
			before:    map[string]string{"10-a.conflist": list},
			kept:      map[string]string{"10-a.conflist": list},
			uninstall: map[string]string{"10-a.conflist": string(stripped)},
			conflist:  "10-a.conflist",
		},
		{
			name:      "list of others beside a lone configuration",
			before:    map[string]string{"10-a.conf": testLone, "10-a.conflist": otherList},
			kept:      map[string]string{"10-a.conf": testLone, "10-a-podshunt.conflist": mustWrap(t, testLone, "10-a.conf"), "10-a.conflist": otherList},
			uninstall: map[string]string{"10-a.conf": testLone, "10-a.conflist": otherList},
			conflist:  "10-a-podshunt.conflist",
		},
	} {
		t.Run(tc.name, func(t *testing.T) { checkDir(t, tc.before, tc.kept, tc.uninstall, tc.uninstall, tc.conflist, "") })
	}
}

func TestUninstallLeavesChangesOfOthers(t *testing.T) {
	ins := newTestInstaller(t)
	path := ins.conf("10-a.conflist")
	writeFile(t, path, testList)
	ins.Reconcile()
	writeFile(t, path, strings.Replace(testBoth, `"a"}`, `"a","mtu":1400}`, 1))
	if _, err := ins.Uninstall(); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, ins, "uninstalled", map[string]string{"10-a.conflist": strings.Replace(testList, `"a"}`, `"a","mtu":1400}`, 1)})

	writeFile(t, path, testBoth+"}")
	if _, err := ins.Uninstall(); err == nil || !strings.Contains(err.Error(), "10-a.conflist names podshunt but is not valid, take it out by hand") {
		t.Errorf("got error %v, want one about a file that is not valid", err)
	}
	if _, err := Uninstall(ins.conf("none"), ins.conf("none"), ins.cfg.Log); err != nil {
		t.Errorf("got error %v of a directory that is not there", err)
	}
}

// What names podshunt after an uninstall is said, and stays as it is.
func TestUninstallNamesCopies(t *testing.T) {
	const multus = `{"cniVersion":"1.0.0","name":"m","plugins":[{"type":"multus","delegates":[{"plugins":[{"type":"podshunt"}]}]}]}`
	const quoted = `{"delegate":"{\"type\":\"podshunt\"}"}`
	const clean = "apiVersion: v1\nkind: Config\n"
	ins := newTestInstaller(t)
	writeFile(t, filepath.Join(ins.cfg.BinDir, "multus"), "")
	for name, content := range map[string]string{"10-a.conf": testLone, "20-b.conflist": otherList} {
		writeFile(t, ins.conf(name), content)
	}
	ins.Reconcile()
	wantState(t, ins, "10-a-podshunt.conflist", "")
	for _, dir := range []string{"multus.d", "empty"} {
		if err := os.Mkdir(ins.conf(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"00-multus.conflist": multus, "10-a.conflist.cilium_bak": testBoth, "multus.d/net": quoted, "multus.d/kubeconfig": clean,
		"10-a-podshunt.conflist": string(withPlugin([]byte(mustWrap(t, testLone, "10-a.conf")), `{"type":"mesh"}`)),
	} {
		writeFile(t, ins.conf(name), content)
	}
	for name, target := range map[string]string{"link": "multus.d/net", "nowhere": "none", "socket": "/dev/null", "directory": "empty"} {
		if err := os.Symlink(target, ins.conf(name)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // a second uninstall says it again
		remarks, err := ins.Uninstall()
		if err != nil {
			t.Fatal(err)
		}
		var named []string
		for _, remark := range remarks {
			path, what, _ := strings.Cut(remark, " ")
			named = append(named, strings.TrimPrefix(path, ins.cfg.ConfDir+"/"))
			want := "still names podshunt: if it means the plugin, no pod starts with this file once " + ins.binary.path + " is deleted"
			if strings.HasSuffix(path, madeEnding) {
				want = "stays, because others have put plugins into it: move these to the configuration that it is made of, and delete it"
			}
			if !strings.HasPrefix(what, want) {
				t.Errorf("got remark %q, want it to say %q", remark, want)
			}
		}
		if diff := cmp.Diff([]string{"00-multus.conflist", "10-a-podshunt.conflist", "10-a.conflist.cilium_bak", "link", "multus.d/net"}, named); diff != "" {
			t.Errorf("files named (-want +got):\n%s", diff)
		}
	}
	for name, want := range map[string]string{"00-multus.conflist": multus, "10-a.conflist.cilium_bak": testBoth, "multus.d/net": quoted, "10-a.conf": testLone} {
		if !hasContent(ins.conf(name), want)() {
			t.Errorf("%s was changed", name)
		}
	}
	// Without copies there is nothing to say.
	mustClear(t, ins.conf("multus.d"))
	for _, name := range []string{"00-multus.conflist", "10-a-podshunt.conflist", "10-a.conflist.cilium_bak", "link"} {
		if err := os.Remove(ins.conf(name)); err != nil {
			t.Fatal(err)
		}
	}
	if remarks, err := Uninstall(ins.cfg.ConfDir, ins.cfg.BinDir, ins.cfg.Log); err != nil || len(remarks) > 0 {
		t.Errorf("got remarks %q and error %v, want none", remarks, err)
	}
}

// No list is changed if a runtime could then call the plugin with a version that it does not know.
func TestVersions(t *testing.T) {
	for name, keys := range map[string]string{
		"none": ``, "old": `"cniVersion":"0.2.0",`, "new": `"cniVersion":"2.0.0",`, "not exact": `"CNIVersion":"1.0.0",`,
		"one of several": `"cniVersion":"0.4.0","cniVersions":["0.4.0","1.0.0","0.2.0"],`,
	} {
		for file, text := range map[string]string{"10-a.conflist": strings.Replace(testList, `"cniVersion":"1.0.0",`, keys, 1), "10-a.conf": strings.Replace(testLone, `"cniVersion":"1.0.0",`, keys, 1)} {
			t.Run(name+" "+file, func(t *testing.T) {
				ins := newTestInstaller(t)
				writeFile(t, ins.conf(file), text)
				ins.Reconcile()
				wantState(t, ins, "", "accepted are 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")
				wantFiles(t, ins, "kept", map[string]string{file: text})
			})
		}
	}
	ins := newTestInstaller(t)
	writeFile(t, ins.conf("10-a.conflist"), strings.Replace(testBoth, "1.0.0", "0.2.0", 1))
	ins.Reconcile()
	wantFiles(t, ins, "entry taken out again", map[string]string{"10-a.conflist": strings.Replace(testList, "1.0.0", "0.2.0", 1)})
}

func TestPlugin(t *testing.T) {
	ins := newTestInstaller(t)
	plugin := filepath.Join(ins.cfg.BinDir, "podshunt")
	writeFile(t, ins.conf("10-a.conflist"), testList)
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "")

	// A new plugin replaces the old one, whose file whoever runs it still has.
	running, err := os.Open(plugin)
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()
	writeFile(t, ins.cfg.Plugin, testPlugin+"# new\n")
	ins.Reconcile()
	if got, want := snapshot(t, ins.cfg.BinDir), testPlugin+"# new\n"; len(got) != 4 || got["podshunt"].Content != want || got["podshunt"].Mode != 0o755 {
		t.Errorf("got %+v, want %q with mode 0755", got, want)
	}
	old := new(bytes.Buffer)
	if _, err := old.ReadFrom(running); err != nil || old.String() != testPlugin {
		t.Errorf("got old plugin %q and error %v, want %q", old, err, testPlugin)
	}

	// A plugin that does not run is not installed; the old one and the entry stay.
	writeFile(t, ins.cfg.Plugin, "#!/bin/sh\nexit 1\n")
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "install plugin: run ")
	wantFiles(t, ins, "old plugin", map[string]string{"10-a.conflist": testBoth})
	if err := os.Remove(ins.cfg.Plugin); err != nil {
		t.Fatal(err)
	}
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "plugin to install: stat ")

	// Without any plugin the entry goes, so that pods start.
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	ins.Reconcile()
	wantState(t, ins, "", "plugin to install: stat ")
	wantFiles(t, ins, "no plugin", map[string]string{"10-a.conflist": testList})
	writeFile(t, ins.cfg.Plugin, testPlugin)
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "")
}

// A directory of plugins that the runtime does not search has none of the
// network's: an entry there would keep every pod from starting.
func TestBinDirNotSearched(t *testing.T) {
	const list = `{"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}`
	const lone = `{"cniVersion":"1.0.0","name":"cbr0","type":"flannel"}`
	installed, err := Insert([]byte(list), []byte(testSection))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		plugins []string
		before  map[string]string
		after   map[string]string
	}{
		{"empty", nil, map[string]string{"10-flannel.conflist": list}, map[string]string{"10-flannel.conflist": list}},
		{"lone configuration", nil, map[string]string{"10-flannel.conf": lone}, map[string]string{"10-flannel.conf": lone}},
		{"of another network", []string{"a"}, map[string]string{"10-flannel.conflist": list}, map[string]string{"10-flannel.conflist": list}},
		{"only what runs after the interface is made", []string{"portmap"}, map[string]string{"10-flannel.conflist": list}, map[string]string{"10-flannel.conflist": list}},
		{"entry there already", nil, map[string]string{"10-flannel.conflist": string(installed)}, map[string]string{"10-flannel.conflist": list}},
		{"entry of another network", nil, map[string]string{"10-flannel.conflist": list, "20-a.conflist": testBoth}, map[string]string{"10-flannel.conflist": list, "20-a.conflist": testList}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ins := newTestInstaller(t)
			mustClear(t, ins.cfg.BinDir)
			for _, plugin := range tc.plugins {
				writeFile(t, filepath.Join(ins.cfg.BinDir, plugin), "")
			}
			for name, content := range tc.before {
				writeFile(t, ins.conf(name), content)
			}
			ins.Reconcile()
			wantFiles(t, ins, "kept", tc.after)
			wantState(t, ins, "", ins.cfg.BinDir+` has no "flannel", which makes the interface in `+ins.conf("10-flannel"))
			wantState(t, ins, "", `agent.cniBinDir) the directory that has "flannel"`)
			if got := slices.Sorted(maps.Keys(snapshot(t, ins.cfg.BinDir))); !slices.Equal(got, tc.plugins) {
				t.Errorf("got plugins %v, want %v", got, tc.plugins)
			}
			// The network's own installer comes later.
			writeFile(t, filepath.Join(ins.cfg.BinDir, "flannel"), "")
			ins.Reconcile()
			if state := ins.State(); !state.Installed || state.Error != "" {
				t.Errorf("got state %+v, want installed", state)
			}
		})
	}

	ins := newTestInstaller(t)
	mustClear(t, ins.cfg.BinDir)
	if err := os.Symlink("/nowhere/flannel", filepath.Join(ins.cfg.BinDir, "flannel")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, ins.conf("10-flannel.conflist"), list)
	ins.Reconcile()
	wantState(t, ins, "10-flannel.conflist", "")
	writeFile(t, ins.conf("05-odd.conflist"), strings.Replace(testList, `"a"}`, `"../bin/flannel"}`, 1))
	ins.Reconcile()
	wantState(t, ins, "", `has no "../bin/flannel"`)
}

func mustClear(t testing.TB, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFight(t *testing.T) {
	ins := newTestInstaller(t)
	ins.window = time.Hour
	path := ins.conf("10-a.conflist")
	for range maxWrites {
		writeFile(t, path, testList)
		ins.Reconcile()
		wantState(t, ins, "10-a.conflist", "")
	}
	writeFile(t, path, testList)
	for range 2 {
		ins.Reconcile()
		wantState(t, ins, "", "another program has undone our change of "+path+" 5 times within 1h0m0s, next try at ")
		wantFiles(t, ins, "left alone", map[string]string{"10-a.conflist": testList})
	}
	ins.window = 0
	ins.Reconcile()
	wantState(t, ins, "10-a.conflist", "")
}

// Both directories are read-only: by their mode, or for root by a mount in a
// mount namespace of the test's own.
func TestReadOnly(t *testing.T) {
	ins := newTestInstaller(t)
	writeFile(t, ins.conf("10-a.conflist"), testList)
	err := onLostThread(func() error {
		if !readOnly(t, ins.cfg.ConfDir) {
			return nil
		}
		ins.Reconcile()
		wantState(t, ins, "", "put entry into "+ins.conf("10-a.conflist"))
		readOnly(t, ins.cfg.BinDir)
		ins.Reconcile() // with a plugin in place
		writeFile(t, ins.cfg.Plugin, testPlugin+"# new\n")
		ins.Reconcile()
		wantState(t, ins, "", "install plugin: open ")
		if os.Geteuid() == 0 {
			wantState(t, ins, "", "or leave both out")
		}
		if _, err := ins.Uninstall(); err != nil {
			t.Errorf("uninstall of nothing: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	wantFiles(t, ins, "untouched", map[string]string{"10-a.conflist": testList})
}

func readOnly(t testing.TB, dir string) bool {
	if os.Geteuid() != 0 {
		if err := os.Chmod(dir, 0o555); err != nil {
			t.Error(err)
		}
		t.Cleanup(func() { _ = os.Chmod(dir, 0o755) })
		return !t.Failed()
	}
	for _, do := range []func() error{
		func() error { return unix.Unshare(unix.CLONE_NEWNS) },
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount(dir, dir, "", unix.MS_BIND, "") },
		func() error { return unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "") },
	} {
		if err := do(); err != nil {
			t.Errorf("mount %s read-only: %v", dir, err)
			return false
		}
	}
	return true
}

func TestSymlink(t *testing.T) {
	ins := newTestInstaller(t)
	target := filepath.Join(t.TempDir(), "real")
	writeFile(t, target, testList)
	if err := os.Symlink(target, ins.conf("10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	ins.Reconcile()
	wantFiles(t, ins, "installed", map[string]string{"10-a.conflist": testBoth})
	if _, err := ins.Uninstall(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.Readlink(ins.conf("10-a.conflist")); err != nil || got != target {
		t.Errorf("got link to %q and error %v, want %q", got, err, target)
	}
	wantFiles(t, ins, "uninstalled", map[string]string{"10-a.conflist": testList})
}

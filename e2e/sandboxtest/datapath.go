// SPDX-License-Identifier: Apache-2.0

package sandboxtest

import (
	"context"
	"log/slog"
	"sync"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// Loaded is a sandbox with an open datapath and no agent.
type Loaded struct {
	*sandbox.Sandbox
	*datapath.Datapath
	// Config and Log are what MustOpen opens it with.
	Config datapath.Config
	Log    *slog.Logger
}

// types are the kernel's, which take seconds to read where the CPU is emulated.
var types = btf.NewCache()

// MustLoad opens a datapath, and unloads at the end of the test what is open
// by then. Unless change says otherwise, connections join at their handshake, and a direction takes the shortcut from its
// second message on, however long the test takes, and never goes back by itself.
func MustLoad(tb testing.TB, s *sandbox.Sandbox, change func(*datapath.Config)) *Loaded {
	tb.Helper()
	n := &Loaded{Sandbox: s, Config: datapath.DefaultConfig(), Log: slog.New(slog.NewTextHandler(tb.Output(), nil))}
	n.Config.Cgroup, n.Config.PinDir, n.Config.Types = s.Cgroup, s.PinDir, types
	n.Config.TrialReads, n.Config.TrialBytes, n.Config.TrialDrains, n.Config.RefreshInterval = 1, 0, 0, 0
	n.Config.JoinAfter, n.Config.LeaveRatio = 0, 0
	n.Config.MaxFlows = 4096 // of the default, the kernel prepares 22 MiB each time
	if change != nil {
		change(&n.Config)
	}
	n.MustOpen(tb)
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Timeout)
		defer cancel()
		if err := sandbox.UnloadDatapath(ctx, n.Datapath); err != nil {
			tb.Error(err)
		}
	})
	return n
}

// MustJoinWatched runs JoinWatched until stop is called, or the test ends.
func MustJoinWatched(tb testing.TB, d *datapath.Datapath) (stop func()) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.JoinWatched(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(stop)
	return stop
}

// MustOpen opens it, again after it was closed.
func (n *Loaded) MustOpen(tb testing.TB) {
	tb.Helper()
	opened, err := n.OpenDatapath(n.Config, n.Log)
	if err != nil {
		tb.Fatalf("%+v", err)
	}
	n.Datapath = opened
}

// MustCookie is Cookie of a pod.
func MustCookie(tb testing.TB, pod *sandbox.Pod) uint64 {
	tb.Helper()
	cookie, err := pod.Cookie()
	must(tb, err)
	return cookie
}

// MustEnrol makes pods and enrols them.
func (n *Loaded) MustEnrol(tb testing.TB, names ...string) (pods []*sandbox.Pod, cookies []uint64) {
	tb.Helper()
	for _, name := range names {
		pod := MustAddPod(tb, n, name, sandbox.PodOptions{})
		cookie := MustCookie(tb, pod)
		must(tb, n.Enrol(cookie))
		pods = append(pods, pod)
		cookies = append(cookies, cookie)
	}
	return pods, cookies
}

// MustSetPolicy is SetPolicy.
func (n *Loaded) MustSetPolicy(tb testing.TB, rules []rule.Rule) {
	tb.Helper()
	must(tb, n.SetPolicy(rules))
}

// SPDX-License-Identifier: Apache-2.0

package sandboxtest

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// agentTimeout is for one command of the agent. To start, it measures the kernel
// first, which takes long where QEMU emulates the CPU.
const agentTimeout = 5 * time.Minute

// Agent is the agent of a sandbox of its own.
type Agent struct{ *sandbox.Agent }

// MustNewAgent makes a sandbox with an agent that logs for the test. The agent does
// not run yet.
func MustNewAgent(tb testing.TB, cfg sandbox.Config) Agent {
	tb.Helper()
	cfg.Podshunt = true
	a := Agent{MustNew(tb, cfg).NewAgent()}
	a.Log = tb.Output()
	return a
}

// Soon are the flags by which connections join at their handshake and take the shortcut from
// the second message on, however long a test takes.
func Soon() []string {
	return []string{"--trial-reads=1", "--trial-bytes=0", "--trial-drains=0", "--refresh-interval=0", "--join-after=0", "--leave-ratio=0"}
}

// AcceptFatal is a flag by which pods take part on every kernel: the sockets of most tests are
// in non-blocking mode, and ask for nothing before they read.
const AcceptFatal = "--accept-hazards=fionread-tcp,fionread-redirected,splice"

// MustStart is Start. At the end of the test the agent is stopped.
func (a Agent) MustStart(tb testing.TB, flags ...string) {
	tb.Helper()
	tb.Cleanup(func() { a.MustStop(tb) })
	ctx, cancel := context.WithTimeout(tb.Context(), agentTimeout)
	defer cancel()
	must(tb, a.Start(ctx, flags...))
}

// MustStop is Stop.
func (a Agent) MustStop(tb testing.TB) {
	tb.Helper()
	if err := a.Stop(); err != nil {
		tb.Errorf("agent: %v", err)
	}
}

// MustWritePods is WritePods.
func (a Agent) MustWritePods(tb testing.TB, entries ...string) {
	tb.Helper()
	must(tb, a.WritePods(entries...))
}

// Command is Run with a deadline.
func (a Agent) Command(command string, flags ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), agentTimeout)
	defer cancel()
	return a.Run(ctx, command, flags...)
}

// MustShow is sandbox.Show.
func MustShow[T any](tb testing.TB, a Agent, command string) T {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), agentTimeout)
	defer cancel()
	answer, err := sandbox.Show[T](ctx, a.Agent, command)
	must(tb, err)
	return answer
}

// MustStatus is what the agent shows of itself.
func (a Agent) MustStatus(tb testing.TB) api.Status {
	tb.Helper()
	return MustShow[api.Status](tb, a, "status")
}

// MustFlows are what the agent shows of connections.
func (a Agent) MustFlows(tb testing.TB) []api.Flow {
	tb.Helper()
	return MustShow[api.FlowList](tb, a, "flows").Items
}

// MustStates returns "pod: takes part" or "pod: message" of each pod, sorted.
func (a Agent) MustStates(tb testing.TB) []string {
	tb.Helper()
	var states []string
	for _, p := range a.MustStatus(tb).Pods {
		state := "takes part"
		if !p.Enrolled {
			state = p.Message
		}
		states = append(states, p.Pod.Name+": "+state)
	}
	slices.Sort(states)
	return states
}

// MustTakePart waits for pods: on a slow machine the plugin does not wait until the
// guards are attached.
func (a Agent) MustTakePart(tb testing.TB, names ...string) {
	tb.Helper()
	for _, name := range names {
		WaitFor(tb, "pod", func() []string { return a.MustStates(tb) },
			func(s []string) bool { return slices.Contains(s, name+": takes part") })
	}
}

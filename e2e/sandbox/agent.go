// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/podshunt/podshunt/api"
)

// stopTimeout is how long the agent may take to end after it was told to.
const stopTimeout = 2 * time.Minute

// errKilled tells Exec to leave the agent no time.
var errKilled = errors.New("killed")

// Agent is the agent of a Sandbox with Config.Podshunt. It runs from Start to Stop
// or Kill, which are for one goroutine at a time; the other methods may be called
// concurrently.
type Agent struct {
	*Sandbox
	// PodsFile is what WritePods writes.
	PodsFile string
	// Source are the flags that tell the agent where to learn of pods. Default: PodsFile.
	Source []string
	// Log gets what the agent writes while it runs. Default: nothing does.
	Log io.Writer
	// Exec runs a command of the agent until it ends, or ctx tells it to. Default:
	// podshunt-agent in BinDir, as a process.
	Exec func(ctx context.Context, args []string, stdout, stderr io.Writer) error

	end   context.CancelCauseFunc // nil unless it runs
	ended chan error
}

// NewAgent returns the sandbox's agent, which does not run yet.
func (s *Sandbox) NewAgent() *Agent {
	podsFile := filepath.Join(s.Base, "pods.yaml")
	return &Agent{Sandbox: s, PodsFile: podsFile, Source: []string{"--pods-file=" + podsFile}, Exec: s.execAgent}
}

func (s *Sandbox) execAgent(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, filepath.Join(s.BinDir, "podshunt-agent"), args...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Cancel = func() error {
		if errors.Is(context.Cause(ctx), errKilled) {
			return cmd.Process.Kill()
		}
		return cmd.Process.Signal(syscall.SIGTERM)
	}
	cmd.WaitDelay = stopTimeout
	err := cmd.Run()
	if cmd.ProcessState != nil && cmd.ProcessState.Success() {
		return nil // after a signal, Run has the error of ctx
	}
	return err
}

// RunDir is the flag by which commands find the agent.
func (a *Agent) RunDir() string { return "--run-dir=" + filepath.Dir(a.AgentSocket) }

// Places are the flags of commands that may have to do without the agent.
func (a *Agent) Places() []string { return []string{a.RunDir(), "--pin-dir=" + a.PinDir} }

// RunArgs are the arguments by which Start runs the agent.
func (a *Agent) RunArgs(flags ...string) []string {
	return slices.Concat([]string{"run", "--cgroup=" + a.Cgroup}, a.Source, a.Places(), flags)
}

// Start returns when the agent answers.
func (a *Agent) Start(ctx context.Context, flags ...string) error {
	running, end := context.WithCancelCause(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Exec(running, a.RunArgs(flags...), a.Log, a.Log) }()
	a.end, a.ended = end, ended
	return a.Await(ctx, "answer", func(api.Status) bool { return true })
}

// Running says whether the agent was started and not stopped.
func (a *Agent) Running() bool { return a.end != nil }

// Await returns when the agent has a status for which is returns true.
func (a *Agent) Await(ctx context.Context, what string, is func(api.Status) bool) error {
	for {
		status, err := a.listeningStatus(ctx)
		if err == nil && is(status) {
			return nil
		}
		select {
		case err := <-a.ended:
			a.end = nil
			return errors.Join(errors.New("the agent has ended"), err)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait for the agent to %s: %w", what, ctx.Err()), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// listeningStatus is Status, which takes the CPU that the agent starts with, for an
// agent that already listens.
func (a *Agent) listeningStatus(ctx context.Context) (status api.Status, err error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", a.AgentSocket)
	if err != nil {
		return status, err
	}
	if err := conn.Close(); err != nil {
		return status, err
	}
	return Show[api.Status](ctx, a, "status")
}

// Stop ends the agent, if it runs, as the kubelet does, and returns its error.
func (a *Agent) Stop() error { return a.finish(nil) }

// Kill ends the agent, if it runs and is a process, by SIGKILL.
func (a *Agent) Kill() { _ = a.finish(errKilled) } // always "signal: killed"

func (a *Agent) finish(cause error) error {
	if !a.Running() {
		return nil
	}
	a.end(cause)
	a.end = nil
	select {
	case err := <-a.ended:
		return err
	case <-time.After(2 * stopTimeout): // a process is killed before that
		return errors.New("the agent does not end")
	}
}

// Run runs one of the agent's other commands and returns what it prints.
func (a *Agent) Run(ctx context.Context, command string, flags ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	if err := a.Exec(ctx, append([]string{command}, flags...), &stdout, &stderr); err != nil {
		return stdout.String(), fmt.Errorf("podshunt-agent %s: %w: %s", command, err, &stderr)
	}
	return stdout.String(), nil
}

// Show runs a command such as status, and returns what it prints with -o json.
func Show[T any](ctx context.Context, a *Agent, command string) (answer T, err error) {
	text, err := a.Run(ctx, command, "-o", "json", a.RunDir())
	if err != nil {
		return answer, err
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return answer, fmt.Errorf("parse what podshunt-agent %s prints: %w", command, err)
	}
	return answer, nil
}

// WritePods makes the pods file say which annotations pods have, by entries such as
// "web podshunt.io/shortcut: enabled" or "shop/web a: b, c: d".
func (a *Agent) WritePods(entries ...string) error {
	text := "pods:\n"
	for _, e := range entries {
		pod, annotations, _ := strings.Cut(e, " ")
		namespace, name, ok := strings.Cut(pod, "/")
		if !ok {
			namespace, name = "default", pod
		}
		text += fmt.Sprintf("- {namespace: %s, name: %s, annotations: {%s}}\n", namespace, name, annotations)
	}
	return a.WritePodsFile(text)
}

// WritePodsFile replaces the pods file in one step, as an editor does.
func (a *Agent) WritePodsFile(text string) error {
	if err := os.WriteFile(a.PodsFile+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(a.PodsFile+".new", a.PodsFile)
}

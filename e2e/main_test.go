// SPDX-License-Identifier: Apache-2.0

// Package e2e_test runs the whole chain as it is installed: a conflist with
// bridge, host-local and podshunt through libcni, and podshunt-agent as a
// process.
package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

func TestMain(m *testing.M) {
	if task := os.Getenv(holdEnv); task != "" {
		if err := hold(task); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(sandbox.Main(m.Run))
}

const (
	// inForce is how long a change may take on a machine that has other things to
	// do: make test-cluster prints how long it takes.
	inForce = 2 * time.Minute
	// processTimeout is how long a process of the agent may take.
	processTimeout = 5 * time.Minute

	on = "podshunt.io/shortcut: enabled"
)

// node is a sandbox whose agent is a process, and runs between mustStart and
// kill or mustStop.
type node struct {
	*sandbox.Sandbox
	binary, podsFile, pinDir string
	cmd                      *exec.Cmd // nil unless it runs
	ended                    chan error
}

func mustNode(t testing.TB) *node {
	t.Helper()
	s := sandbox.MustNew(t, sandbox.Config{Podshunt: true})
	binary, err := filepath.Abs(filepath.Join(cmp.Or(os.Getenv("PODSHUNT_BIN"), "../bin"), "podshunt-agent"))
	if err != nil {
		t.Fatal(err)
	}
	return &node{Sandbox: s, binary: binary, podsFile: filepath.Join(s.Base, "pods.yaml"), pinDir: filepath.Join(s.BPF, "podshunt")}
}

// places returns the flags that tell run and unload where this node is.
func (n *node) places() []string {
	return []string{n.runDir(), "--pin-dir=" + n.pinDir}
}

func (n *node) runDir() string { return "--run-dir=" + filepath.Dir(n.AgentSocket) }

// mustStart returns when the agent answers.
func (n *node) mustStart(t testing.TB, flags ...string) {
	t.Helper()
	args := slices.Concat([]string{
		"run", "--pods-file=" + n.podsFile, "--kernel-hazards=accept", "--cgroup=" + n.Cgroup,
		// The shortcut from the second message on, however long a test takes.
		"--trial-reads=1", "--trial-bytes=0", "--trial-drains=0", "--refresh-interval=0",
	}, n.places(), flags)
	cmd := exec.Command(n.binary, args...)
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	n.cmd, n.ended = cmd, ended
	t.Cleanup(func() { n.kill(t) })
	for deadline := time.Now().Add(processTimeout); ; time.Sleep(20 * time.Millisecond) {
		// A status each time would take the CPU that the agent starts with.
		c, err := net.DialTimeout("unix", n.AgentSocket, processTimeout)
		if err == nil {
			err = c.Close()
		}
		if err == nil {
			_, err = n.run("status", n.runDir())
		}
		if err == nil {
			return
		}
		select {
		case err := <-ended:
			n.cmd = nil
			t.Fatalf("agent: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not answer: %v", err)
		}
	}
}

// end sends a signal to the agent, if it runs, and returns how it ended.
func (n *node) end(t testing.TB, signal syscall.Signal) error {
	t.Helper()
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Signal(signal); err != nil {
		t.Errorf("signal the agent: %v", err)
	}
	n.cmd = nil
	select {
	case err := <-n.ended:
		return err
	case <-time.After(processTimeout):
		t.Fatalf("the agent does not end by signal %v", signal)
		return nil
	}
}

func (n *node) kill(t testing.TB) {
	t.Helper()
	_ = n.end(t, syscall.SIGKILL) // always "signal: killed"
}

func (n *node) mustStop(t testing.TB) {
	t.Helper()
	if err := n.end(t, syscall.SIGTERM); err != nil {
		t.Fatalf("agent after SIGTERM: %v", err)
	}
}

// run runs one of the agent's other commands and returns what it prints.
func (n *node) run(command string, flags ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), processTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, n.binary, append([]string{command}, flags...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("podshunt-agent %s: %w: %s", command, err, &stderr)
	}
	return stdout.String(), nil
}

func mustShow[T any](t testing.TB, n *node, command string) T {
	t.Helper()
	var answer T
	text, err := n.run(command, "-o", "json", n.runDir())
	if err == nil {
		err = json.Unmarshal([]byte(text), &answer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func (n *node) status(t testing.TB) api.Status {
	t.Helper()
	return mustShow[api.Status](t, n, "status")
}

// mustWritePods takes entries such as "web podshunt.io/shortcut: enabled".
func (n *node) mustWritePods(t testing.TB, entries ...string) {
	t.Helper()
	text := "pods:\n"
	for _, e := range entries {
		name, annotations, _ := strings.Cut(e, " ")
		text += fmt.Sprintf("- {namespace: default, name: %s, annotations: {%s}}\n", name, annotations)
	}
	n.mustWritePodsFile(t, text)
}

// mustWritePodsFile replaces the pods file in one step.
func (n *node) mustWritePodsFile(t testing.TB, text string) {
	t.Helper()
	if err := os.WriteFile(n.podsFile+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(n.podsFile+".new", n.podsFile); err != nil {
		t.Fatal(err)
	}
}

// states returns "pod: takes part" or "pod: reason" of each pod.
func (n *node) states(t testing.TB) []string {
	t.Helper()
	var states []string
	for _, p := range n.status(t).Pods {
		state := "takes part"
		if !p.Enrolled {
			state = p.Message
		}
		states = append(states, p.Pod.Name+": "+state)
	}
	slices.Sort(states)
	return states
}

// entries returns how many entries each of the named maps has.
func (n *node) entries(t testing.TB, names ...string) map[string]int {
	t.Helper()
	entries := map[string]int{}
	for _, m := range n.status(t).Maps {
		if slices.Contains(names, m.Name) {
			entries[m.Name] = m.Entries
		}
	}
	return entries
}

// mustBecome waits until get returns want.
func mustBecome[T any](t testing.TB, what string, want T, get func() T) {
	t.Helper()
	for deadline := time.Now().Add(inForce); ; time.Sleep(20 * time.Millisecond) {
		late := time.Now().After(deadline)
		diff := gocmp.Diff(want, get())
		if diff == "" {
			return
		}
		if late {
			t.Fatalf("%s: not after %v (-want +got):\n%s", what, inForce, diff)
		}
	}
}

func wantDiff(t testing.TB, what string, want, got any) {
	t.Helper()
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

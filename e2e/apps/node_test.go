// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
)

// node is a sandbox whose agent is a process.
type node struct {
	*sandbox.Sandbox
	binary string
}

func mustNode(t *testing.T) *node {
	t.Helper()
	bin, err := filepath.Abs(cmp.Or(os.Getenv("PODSHUNT_BIN"), "../../bin"))
	if err != nil {
		t.Fatal(err)
	}
	s := sandbox.MustNew(t, sandbox.Config{Podshunt: true, BinDir: bin})
	return &node{Sandbox: s, binary: filepath.Join(bin, "podshunt-agent")}
}

// mustStart runs the agent, with more flags, until the test ends, and returns its
// first status. The annotations are those of pods, by namespace/name.
func (n *node) mustStart(t *testing.T, annotations map[string]string, flags ...string) api.Status {
	t.Helper()
	podsFile := filepath.Join(n.Base, "pods.yaml")
	text := "pods:\n"
	for pod, a := range annotations {
		namespace, name, _ := strings.Cut(pod, "/")
		text += fmt.Sprintf("- {namespace: %s, name: %s, annotations: {%s}}\n", namespace, name, a)
	}
	if err := os.WriteFile(podsFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(n.binary, append([]string{
		"run", "--pods-file=" + podsFile, "--cgroup=" + n.Cgroup, n.runDir(),
		"--pin-dir=" + filepath.Join(n.BPF, "podshunt"),
	}, flags...)...)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it fails if the agent has ended, which Wait tells
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("agent: %v", err)
			}
		case <-time.After(*programTimeout):
			t.Errorf("the agent does not end; kill: %v; %v", cmd.Process.Kill(), <-ended)
		}
		if t.Failed() {
			t.Logf("log of the agent:\n%s", &log)
		}
	})
	for deadline := time.Now().Add(*programTimeout); ; time.Sleep(20 * time.Millisecond) {
		status, err := show[api.Status](n, "status")
		if err == nil {
			return status
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not answer: %v", err)
		}
	}
}

func (n *node) runDir() string { return "--run-dir=" + filepath.Dir(n.AgentSocket) }

// show runs one of the agent's other commands.
func show[T any](n *node, command string) (answer T, err error) {
	text, err := exec.Command(n.binary, command, "-o", "json", n.runDir()).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	if err != nil {
		err = fmt.Errorf("podshunt-agent %s: %w", command, err)
	}
	return answer, err
}

func mustShow[T any](t testing.TB, n *node, command string) T {
	t.Helper()
	answer, err := show[T](n, command)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// traffic is what the kernel programs have counted in a time.
type traffic struct {
	// sent is in bytes of paired connections; shortcut is what of them took the shortcut.
	sent, shortcut uint64
	// paired counts connections.
	paired uint64
}

func between(before, after api.Status) traffic {
	counted := func(s api.Status) (t traffic) {
		for _, o := range s.Outcomes {
			if o.Kind == api.OutcomeMessage {
				t.sent += o.Bytes
			}
			switch o.String() {
			case "message_shortcut":
				t.shortcut = o.Bytes
			case "connection_paired":
				t.paired = o.Count
			}
		}
		return t
	}
	a, b := counted(after), counted(before)
	return traffic{a.sent - b.sent, a.shortcut - b.shortcut, a.paired - b.paired}
}

// share is what part of the bytes took the shortcut.
func (t traffic) share() string {
	if t.sent == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(t.shortcut)/float64(t.sent))
}

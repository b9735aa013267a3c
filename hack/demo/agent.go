// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/podshunt/podshunt/api"
)

// agent is podshunt-agent as a process of its own.
type agent struct {
	path, runDir string
	log          *os.File
	cmd          *exec.Cmd
	ended        chan error // nil unless it runs
}

func newAgent(path, runDir string) (*agent, error) {
	log, err := os.Create(filepath.Join(runDir, "agent.log"))
	if err != nil {
		return nil, err
	}
	return &agent{path: path, runDir: runDir, log: log}, nil
}

// start returns when the agent answers.
func (a *agent) start(ctx context.Context, args ...string) error {
	a.cmd = exec.Command(a.path, args...)
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	if err := a.cmd.Start(); err != nil {
		return err
	}
	a.ended = make(chan error, 1)
	go func() { a.ended <- a.cmd.Wait() }()
	return a.await(ctx, "answer", func(api.Status) bool { return true })
}

// await returns when the agent has a status for which is returns true.
func (a *agent) await(ctx context.Context, what string, is func(api.Status) bool) error {
	for deadline := time.Now().Add(timeout); ; {
		status, err := a.status(ctx)
		if err == nil && is(status) {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("wait for the agent to %s: timed out after %v", what, timeout), err)
		}
		select {
		case err := <-a.ended:
			a.ended = nil
			return errors.Join(errors.New("the agent has ended"), err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// command runs one of the agent's other commands and returns what it prints.
func (a *agent) command(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, a.path, append([]string{name}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("podshunt-agent %s: %w: %s%s", name, err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

func (a *agent) status(ctx context.Context) (api.Status, error) {
	var status api.Status
	text, err := a.command(ctx, "status", "--run-dir="+a.runDir, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(text), &status)
	}
	return status, err
}

// stop ends the agent if it runs.
func (a *agent) stop() error {
	if a == nil || a.ended == nil {
		return nil
	}
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the agent: %w", err)
	}
	select {
	case err := <-a.ended:
		a.ended = nil
		return err
	case <-time.After(timeout):
		return errors.Join(fmt.Errorf("the agent has not ended after %v: killed", timeout), a.cmd.Process.Kill())
	}
}

// story returns what the agent has logged, as an error.
func (a *agent) story() error {
	text, err := os.ReadFile(a.log.Name())
	if err != nil {
		return err
	}
	return fmt.Errorf("log of the agent:\n%s", text)
}

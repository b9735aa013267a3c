// SPDX-License-Identifier: Apache-2.0

// The commands' side of the agent's socket.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/api"
)

// askTimeout bounds requests that the agent answers without waiting for anything.
const askTimeout = 10 * time.Second

// errNoAgent says that nobody listens on the agent's socket.
var errNoAgent = statusError{errors.New("no agent"), exitNoAgent}

// socketIn returns the path of the agent's socket.
func socketIn(runDir string) string { return filepath.Join(runDir, filepath.Base(api.Socket)) }

// attachmentsIn returns the directory of the agent's attachments.
func attachmentsIn(runDir string) string {
	return filepath.Join(runDir, filepath.Base(api.AttachmentsDir))
}

// show asks the agent for a T and prints it.
func show[T any](cmd *cobra.Command, runDir, path, output string, text func(io.Writer, T) error) error {
	var answer T
	if err := ask(cmd.Context(), runDir, http.MethodGet, path, askTimeout, &answer); err != nil {
		return err
	}
	if output == "json" {
		return writeJSON(cmd.OutOrStdout(), answer)
	}
	return text(cmd.OutOrStdout(), answer)
}

func writeJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

// ask sends a request without a body to the agent of a run directory, and decodes
// its answer. Its errors are those of request.
func ask(ctx context.Context, runDir, method, path string, timeout time.Duration, answer any) error {
	return request(ctx, runDir, method, path, timeout, func(body io.Reader) error { return json.NewDecoder(body).Decode(answer) })
}

// request sends a request without a body to the agent of a run directory, and calls read
// with the body of its answer. It returns errNoAgent if nobody listens on its socket.
func request(ctx context.Context, runDir, method, path string, timeout time.Duration, read func(io.Reader) error) error {
	socket := socketIn(runDir)
	// Without this a path that is too long looks as if no agent ran there.
	if err := api.CheckSocket(socket); err != nil {
		return usageError(fmt.Errorf("--run-dir: the agent's socket would be %w", err))
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" && !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w at %s (%w): start one with `podshunt-agent run`, or name its run directory with --run-dir", errNoAgent, socket, op.Err)
		}
		return unanswered("ask the agent", socket, timeout, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var failure api.Error
		if err := json.NewDecoder(resp.Body).Decode(&failure); err != nil {
			return fmt.Errorf("agent at %s answers %s", socket, resp.Status)
		}
		return fmt.Errorf("agent at %s: %s", socket, failure.Error)
	}
	if err := read(resp.Body); err != nil {
		return unanswered("read the answer of the agent", socket, timeout, err)
	}
	return nil
}

// unanswered explains why an agent that listens has not answered.
func unanswered(what, socket string, timeout time.Duration, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return statusError{fmt.Errorf("the agent at %s has not answered after %v: its log may say why", socket, timeout), exitTimedOut}
	}
	return fmt.Errorf("%s at %s: %w", what, socket, err)
}

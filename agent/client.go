// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/podshunt/podshunt/api"
)

// errNoAgent says that nobody listens.
var errNoAgent = errors.New("no agent")

// ask sends a request without a body to the agent at a socket and decodes its answer.
func ask(ctx context.Context, socket, method, path string, timeout time.Duration, answer any) error {
	// Without this a path that is too long looks as if no agent ran there.
	if err := api.CheckSocket(socket); err != nil {
		return fmt.Errorf("socket of the agent: %w", err)
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
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
			return fmt.Errorf("%w at %s (%w): start one with `podshunt-agent run`, or name its socket with --socket", errNoAgent, socket, op.Err)
		}
		return fmt.Errorf("ask the agent at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var failure api.Error
		if err := json.NewDecoder(resp.Body).Decode(&failure); err != nil {
			return fmt.Errorf("agent at %s answers %s", socket, resp.Status)
		}
		return fmt.Errorf("agent at %s: %s", socket, failure.Error)
	}
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		return fmt.Errorf("decode the answer of the agent at %s: %w", socket, err)
	}
	return nil
}

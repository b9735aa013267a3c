// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

// askTimeout bounds a question that the agent answers from what it has.
const askTimeout = 10 * time.Second

func statusCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return show(ctx, "status", api.PathStatus, args, stdout, stderr, writeStatus)
}

func flowsCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return show(ctx, "flows", api.PathFlows, args, stdout, stderr, writeFlows)
}

// show asks the agent for a T and prints it.
func show[T any](ctx context.Context, command, path string, args []string, stdout, stderr io.Writer, text func(io.Writer, T) error) error {
	flags := newFlags(command, stderr)
	socket := flags.String("socket", api.Socket, "unix socket of the agent")
	output := flags.String("o", "text", "output: text or json")
	if err := parse(flags, args); err != nil {
		return err
	}
	if *output != "text" && *output != "json" {
		return fmt.Errorf("-o %q: accepted are text, json", *output)
	}
	var answer T
	if err := ask(ctx, *socket, http.MethodGet, path, askTimeout, &answer); err != nil {
		return err
	}
	if *output == "text" {
		return text(stdout, answer)
	}
	encoder := json.NewEncoder(stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(answer)
}

func unloadCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := newFlags("unload", stderr)
	cfg := defaults()
	flags.StringVar(&cfg.runDir, "run-dir", cfg.runDir, "run `directory` of the agent")
	flags.StringVar(&cfg.socket, "socket", cfg.socket, "unix socket of the agent (default agent.sock in the run directory)")
	flags.StringVar(&cfg.datapath.PinDir, "pin-dir", cfg.datapath.PinDir, "`directory` of the kernel objects, if no agent runs")
	timeout := flags.Duration("timeout", 30*time.Second, "how long connections may take to read what was sent by the shortcut")
	if err := parse(flags, args); err != nil {
		return err
	}
	if *timeout <= 0 {
		return fmt.Errorf("--timeout=%s: accepted are durations above 0", *timeout)
	}
	if cfg.socket == "" {
		cfg.socket = filepath.Join(cfg.runDir, filepath.Base(api.Socket))
	}

	var result api.UnloadResult
	path := api.PathUnload + "?timeout=" + url.QueryEscape(timeout.String())
	err := ask(ctx, cfg.socket, http.MethodPost, path, *timeout+askTimeout, &result)
	if errors.Is(err, errNoAgent) {
		result, err = unloadPins(ctx, cfg.datapath.PinDir, *timeout)
		if errors.Is(err, fs.ErrNotExist) {
			_, err := fmt.Fprintf(stdout, "nothing to unload: no agent at %s, and no pins in %s\n", cfg.socket, cfg.datapath.PinDir)
			return err
		}
	}
	if err != nil {
		return err
	}
	if !result.Done {
		if err := writeFlows(stdout, result.Waiting); err != nil {
			return err
		}
		return fmt.Errorf("%d connections have not read what was sent by the shortcut after %s: nothing is deleted, "+
			"all new data goes by TCP until the agent is started again", len(result.Waiting), *timeout)
	}
	_, err = fmt.Fprintln(stdout, "unloaded: nothing of podshunt is left in the kernel")
	return err
}

// unloadPins unloads what an agent that does not run any more has left.
func unloadPins(ctx context.Context, dir string, timeout time.Duration) (api.UnloadResult, error) {
	d, err := datapath.OpenPins(dir)
	if err != nil {
		return api.UnloadResult{}, err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return unload(ctx, d, newView(nil, policy.Cluster{}, time.Now()))
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
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

func forgetCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := newFlags("forget", stderr)
	socket := flags.String("socket", api.Socket, "unix socket of the agent")
	defaultUsage := flags.Usage
	flags.Usage = func() {
		fmt.Fprintln(stderr, "podshunt-agent forget [NAMESPACE/NAME [PORT]] forgets what connections to server ports have used\n"+
			"that the shortcut does not serve: of a port, a pod, or all. New connections are paired again.")
		defaultUsage()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	var req api.ForgetRequest
	switch args := flags.Args(); len(args) {
	case 2:
		port, err := strconv.ParseUint(args[1], 10, 16)
		if err != nil || port == 0 {
			return fmt.Errorf("port %q: accepted are 1 to 65535", args[1])
		}
		req.Port = uint16(port)
		fallthrough
	case 1:
		if namespace, name, ok := strings.Cut(args[0], "/"); !ok || namespace == "" || name == "" {
			return fmt.Errorf("pod %q: accepted is namespace/name", args[0])
		}
		req.Pod = args[0]
	case 0:
	default:
		return fmt.Errorf("unexpected argument %q", args[2])
	}
	query := url.Values{"pod": {req.Pod}, "port": {strconv.Itoa(int(req.Port))}}
	var result api.ForgetResult
	if err := ask(ctx, *socket, http.MethodPost, api.PathForget+"?"+query.Encode(), askTimeout, &result); err != nil {
		return err
	}
	_, err := fmt.Fprintf(stdout, "server ports forgotten: %d\n", result.Forgotten)
	return err
}

func unloadCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	r := removal{log: newLogger(stderr, defaults())}
	flags := newFlags("unload", stderr)
	r.register(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	return r.run(ctx, api.PathUnload, nil, stdout)
}

// removal is what unload and uninstall have in common.
type removal struct {
	runDir, socket, pinDir string
	timeout                time.Duration
	force                  bool
	log                    *slog.Logger
}

func (r *removal) register(flags *flag.FlagSet) {
	cfg := defaults()
	flags.StringVar(&r.runDir, "run-dir", cfg.runDir, "run `directory` of the agent")
	flags.StringVar(&r.socket, "socket", cfg.socket, "unix socket of the agent (default agent.sock in the run directory)")
	flags.StringVar(&r.pinDir, "pin-dir", cfg.datapath.PinDir, "`directory` of the kernel objects, if no agent runs")
	flags.DurationVar(&r.timeout, "timeout", 30*time.Second, "how long connections may take to read what was sent by the shortcut")
	flags.BoolVar(&r.force, "force", false, "reset the connections that take longer, and only these")
}

func (r *removal) check() error {
	if r.timeout <= 0 {
		return fmt.Errorf("--timeout=%s: accepted are durations above 0", r.timeout)
	}
	if r.socket == "" {
		r.socket = filepath.Join(r.runDir, filepath.Base(api.Socket))
	}
	return nil
}

// run asks the agent. Where none runs, it calls first, if given, and takes the pins out itself.
func (r *removal) run(ctx context.Context, path string, first func() error, stdout io.Writer) error {
	var result api.UnloadResult
	query := url.Values{"timeout": {r.timeout.String()}, "force": {strconv.FormatBool(r.force)}}
	err := ask(ctx, r.socket, http.MethodPost, path+"?"+query.Encode(), r.longest()+askTimeout, &result)
	if errors.Is(err, errNoAgent) {
		if first != nil {
			if err := first(); err != nil {
				return err
			}
		}
		result, err = r.unloadPins(ctx)
		if errors.Is(err, fs.ErrNotExist) {
			_, err := fmt.Fprintf(stdout, "nothing to unload: no agent at %s, and no pins in %s\n", r.socket, r.pinDir)
			return err
		}
	}
	if err != nil {
		return err
	}
	return r.report(stdout, result)
}

// longest returns how long the unload itself may take.
func (r *removal) longest() time.Duration {
	if r.force {
		return r.timeout + resetTimeout
	}
	return r.timeout
}

// report prints how an unload ended, and returns an error unless it is done.
func (r *removal) report(stdout io.Writer, result api.UnloadResult) error {
	if len(result.Reset) > 0 {
		if _, err := fmt.Fprintf(stdout, "reset, as they had not read what was sent by the shortcut after %s:\n", r.timeout); err != nil {
			return err
		}
		if err := writeFlows(stdout, result.Reset); err != nil {
			return err
		}
	}
	if result.Done {
		text := "unloaded: nothing of podshunt is left in the kernel"
		if result.Left > 0 {
			text += fmt.Sprintf(" but what %d sockets of closed connections need to read what is theirs: it goes when their programs close them", result.Left)
		}
		_, err := fmt.Fprintln(stdout, text)
		return err
	}
	if err := writeFlows(stdout, result.Waiting); err != nil {
		return err
	}
	err := fmt.Errorf("%d connections have not read what was sent by the shortcut after %s: nothing is deleted, "+
		"all new data goes by TCP until the agent is started again", len(result.Waiting), r.timeout)
	switch {
	case result.ResetError != "":
		return fmt.Errorf("%w; they were not reset: %s", err, result.ResetError)
	case !r.force:
		return fmt.Errorf("%w; --force resets the connections that are listed, and unloads", err)
	}
	return err
}

// unloadPins unloads what an agent that does not run any more has left.
func (r *removal) unloadPins(ctx context.Context) (api.UnloadResult, error) {
	d, err := datapath.OpenPins(r.pinDir, r.log)
	if err != nil {
		return api.UnloadResult{}, err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	v := newView(nil, policy.Cluster{}, time.Now())
	return unloader{d, v, r.force, filepath.Join(r.runDir, filepath.Base(api.AttachmentsDir)), defaults().proc}.run(ctx)
}

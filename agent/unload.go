// SPDX-License-Identifier: Apache-2.0

// The command unload.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/explain"
	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

// defaultUnloadTimeout is how long an unload waits until connections have read.
const defaultUnloadTimeout = 30 * time.Second

// startTimeout is how long an unload waits for an agent that is starting: it measures the kernel first. startRetry is
// the time between two tries.
const startTimeout, startRetry = 20 * time.Second, 100 * time.Millisecond

func newUnloadCommand() *cobra.Command {
	var f unloadFlags
	cmd := &cobra.Command{
		Use:   "unload",
		Short: "Take everything out of this node's kernel without losing a byte",
		Long: `Takes podshunt out of this node's kernel. Connections go on by TCP. First it waits
until all that was sent by the shortcut has been read. If that takes longer than
--timeout, it deletes nothing, and lists the connections that have not read; their
new data goes by TCP until the agent is started again.

If an agent runs, it does the work, and then nothing more until it is started
again. If none runs, this command takes out what the last agent has left.`,
		Example: `  podshunt-agent unload
  podshunt-agent unload --timeout=2m
  podshunt-agent unload --force`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.log = newLogger(cmd.ErrOrStderr(), defaults())
			if err := f.check(); err != nil {
				return usageError(err)
			}
			return f.run(cmd.Context(), api.PathUnload, nil, cmd.OutOrStdout())
		},
	}
	f.register(cmd)
	return cmd
}

// unloadFlags has the flags that unload and uninstall have in common.
type unloadFlags struct {
	runDir, pinDir, proc string
	timeout              time.Duration
	force                bool
	log                  *slog.Logger
}

func (f *unloadFlags) register(cmd *cobra.Command) {
	runDirVar(cmd, &f.runDir)
	f.pinDir = defaults().datapath.PinDir
	dirVar(cmd, &f.pinDir, "pin-dir", "`directory` of the kernel objects, if no agent runs")
	procVar(cmd, &f.proc)
	cmd.Flags().DurationVar(&f.timeout, "timeout", defaultUnloadTimeout, "how long to wait until connections have read what was sent by the shortcut")
	cmd.Flags().BoolVar(&f.force, "force", false, "reset the connections that take longer, and only these")
}

func (f *unloadFlags) check() error {
	if f.timeout <= 0 {
		return fmt.Errorf("--timeout=%s: accepted are durations above 0", f.timeout)
	}
	return nil
}

// run asks the agent to unload, once it has started. If none runs, it calls first, unless that is nil, and
// takes the pins out itself. first returns remarks for the result.
func (f *unloadFlags) run(ctx context.Context, path string, first func() (remarks []string, err error), stdout io.Writer) error {
	var result api.UnloadResult
	query := url.Values{"timeout": {f.timeout.String()}, "force": {strconv.FormatBool(f.force)}}
	toAgent := func() error {
		return ask(ctx, f.runDir, http.MethodPost, path+"?"+query.Encode(), f.longest()+askTimeout, &result)
	}
	err := toAgent()
	for deadline := time.Now().Add(startTimeout); errors.Is(err, errNoAgent) && isRunDirLocked(f.runDir) && time.Now().Before(deadline); err = toAgent() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(startRetry):
		}
	}
	if errors.Is(err, errNoAgent) {
		var remarks []string
		if first != nil {
			if remarks, err = first(); err != nil {
				return err
			}
		}
		result, err = f.unloadPins(ctx)
		result.Remarks = remarks
	}
	for _, remark := range result.Remarks {
		if _, err := fmt.Fprintln(stdout, "note:", remark); err != nil {
			return err
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		_, err := fmt.Fprintf(stdout, "nothing to unload: no agent at %s, and no pins in %s\n", socketIn(f.runDir), f.pinDir)
		return err
	}
	if err != nil {
		return err
	}
	return f.report(stdout, result)
}

// longest returns how long the unload itself may take.
func (f *unloadFlags) longest() time.Duration {
	if f.force {
		return f.timeout + resetTimeout
	}
	return f.timeout
}

// report prints how an unload ended, and returns an error unless it is done.
func (f *unloadFlags) report(stdout io.Writer, result api.UnloadResult) error {
	if len(result.Reset) > 0 {
		if _, err := fmt.Fprintf(stdout, "reset, as they had not read what was sent by the shortcut after %s:\n", f.timeout); err != nil {
			return err
		}
		if err := writeFlows(stdout, result.Reset); err != nil {
			return err
		}
	}
	if result.Done {
		text := "unloaded: nothing of podshunt is left in the kernel"
		if result.Left > 0 {
			text += fmt.Sprintf(" except what %d sockets of ended connections need to read their last bytes: it goes when their programs close them", result.Left)
		}
		_, err := fmt.Fprintln(stdout, text)
		return err
	}
	if err := writeFlows(stdout, result.Waiting); err != nil {
		return err
	}
	text := fmt.Sprintf("%d connections have not read what was sent by the shortcut after %s: nothing is deleted, "+
		"all new data goes by TCP until the agent is started again", len(result.Waiting), f.timeout)
	switch {
	case result.ResetError != "":
		text += "; they were not reset: " + result.ResetError
	case !f.force:
		text += "; --force resets the connections that are listed, and unloads"
	}
	return statusError{errors.New(text), exitTimedOut}
}

// unloadPins unloads what an agent that has ended has left.
func (f *unloadFlags) unloadPins(ctx context.Context) (api.UnloadResult, error) {
	d, err := datapath.OpenPins(f.pinDir, f.log)
	if err != nil {
		return api.UnloadResult{}, err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	v := explain.NewView(nil, policy.Cluster{}, explain.Ports{}, time.Now())
	return unloader{d, v, f.force, attachmentsIn(f.runDir), f.proc}.run(ctx)
}

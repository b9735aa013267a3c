// SPDX-License-Identifier: Apache-2.0

// Podshunt-agent decides which pods of its node take part, owns podshunt's
// kernel objects and serves the CNI plugin; its other commands look at a running
// agent and take everything out again.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker (-X main.version=...).
var version = "devel"

// Exit statuses. The help of the root command and docs/operations.md list them.
const (
	exitError    = 1
	exitUsage    = 2
	exitNoAgent  = 3
	exitRefused  = 4
	exitTimedOut = 5
)

// statusError is an error that ends the process with another status than exitError.
type statusError struct {
	error
	status int
}

func (e statusError) Unwrap() error { return e.error }

// usageError gives an error the exit status of wrong usage; nil stays nil.
func usageError(err error) error {
	if err == nil {
		return nil
	}
	return statusError{err, exitUsage}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "podshunt-agent:", err)
	}
	os.Exit(exitStatus(err))
}

func exitStatus(err error) int {
	if err == nil {
		return 0
	}
	if e := (statusError{}); errors.As(err, &e) {
		return e.status
	}
	return exitError
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := newRootCommand()
	root.SetArgs(append([]string{}, args...)) // nil would mean os.Args
	root.SetOut(stdout)
	root.SetErr(stderr)
	begun := false
	root.PersistentPreRun = func(*cobra.Command, []string) { begun = true }
	err := root.ExecuteContext(ctx)
	if !begun {
		return usageError(err)
	}
	return err
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "podshunt-agent",
		Short: "Let TCP between opted-in pods of one node skip the TCP/IP stack",
		Long: `podshunt-agent lets TCP between opted-in pods of one node skip the TCP/IP stack.
"run" is the agent; the other commands ask the agent of this node, or do the work
themselves if none runs.

Exit statuses:
  0  done
  1  error; also: done on some nodes only
  2  wrong command, flag or argument: nothing was done
  3  no agent: nobody listens on its socket
  4  refused: "doctor", on a kernel that keeps pods on TCP
  5  timed out: the agent has not answered, or connections have not read, in time`,
		Example: `  podshunt-agent doctor
  podshunt-agent run --node-name=worker-1
  podshunt-agent flows --output=json`,
		Version:       version,
		SilenceErrors: true, // main prints them
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs, // unknown commands get to RunE
		RunE: func(cmd *cobra.Command, args []string) error {
			return usageError(commandError(cmd, args))
		},
	}
	root.SetFlagErrorFunc(flagError)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.AddCommand(newRunCommand(), newStatusCommand(), newFlowsCommand(), newDoctorCommand(), newForgetCommand(),
		newUnloadCommand(), newUninstallCommand(), newMountCommand(), newVersionCommand())
	return root
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Long:    "Prints the version of this program, which is that of the plugin, the image and the chart.",
		Example: "  podshunt-agent version",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), version)
			return err
		},
	}
}

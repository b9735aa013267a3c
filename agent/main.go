// SPDX-License-Identifier: Apache-2.0

// Podshunt-agent decides which pods of its node take part, owns podshunt's
// kernel objects and serves the CNI plugin; its other commands look at a running
// agent and take everything out again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker (-X main.version=...).
var version = "devel"

const usage = `podshunt-agent lets TCP between opted-in pods of one node skip the stack.

Commands:
  run          be the agent of this node
  status       what takes part and what does not, and why
  flows        the TCP connections of the pods that take part
  doctor       how this kernel serves the shortcut, and whether pods would take part
  forget       pair connections again that were found not to fit
  unload       take everything out of the kernel without losing a byte
  uninstall    take the plugin out of the CNI configuration, then unload; on all nodes if told so
  mount-bpffs  mount the file system that keeps the kernel objects, where there is none
  version      print the version

"podshunt-agent COMMAND -h" lists the flags of a command.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "podshunt-agent:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return errors.New("no command given")
	}
	name, args := args[0], args[1:]
	var err error
	switch name {
	case "run":
		err = runCommand(ctx, args, stderr)
	case "status":
		err = statusCommand(ctx, args, stdout, stderr)
	case "flows":
		err = flowsCommand(ctx, args, stdout, stderr)
	case "doctor":
		err = doctorCommand(args, stdout, stderr)
	case "forget":
		err = forgetCommand(ctx, args, stdout, stderr)
	case "unload":
		err = unloadCommand(ctx, args, stdout, stderr)
	case "uninstall":
		err = uninstallCommand(ctx, args, stdout, stderr)
	case "mount-bpffs":
		err = mountCommand(args, stdout, stderr)
	case "version":
		_, err = fmt.Fprintln(stdout, version)
	case "help", "-h", "-help", "--help":
		_, err = fmt.Fprint(stdout, usage)
	default:
		fmt.Fprint(stderr, usage)
		return fmt.Errorf("unknown command %q", name)
	}
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	return err
}

// newFlags returns a flag set that prints its flags to stderr when asked or wrong.
func newFlags(command string, stderr io.Writer) *flag.FlagSet {
	flags := flag.NewFlagSet("podshunt-agent "+command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	return flags
}

// parse refuses arguments that are not flags.
func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

// Flags that several commands have, and errors of flags that say what is accepted.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/podshunt/podshunt/api"
)

// runDirVar adds --run-dir, by which commands find the agent of the node.
func runDirVar(cmd *cobra.Command, value *string) {
	*value = api.RunDir
	dirVar(cmd, value, "run-dir", "`directory` of the agent's socket, lock and attachments")
}

// hostProc is where the node's procfs is unless a flag says otherwise: a pod without the
// node's PID namespace has it mounted elsewhere than on /proc, and HOST_PROC tells this to
// whatever is run in its containers.
func hostProc() string { return cmp.Or(os.Getenv("HOST_PROC"), "/proc") }

// procVar adds --proc, by which commands see the processes and namespaces of the node.
func procVar(cmd *cobra.Command, value *string) {
	*value = hostProc()
	dirVar(cmd, value, "proc", "`directory` where the procfs of the node is mounted; the environment variable HOST_PROC changes the default")
}

// outputVar adds --output: a table for people, or JSON for programs.
func outputVar(cmd *cobra.Command, value *string) {
	*value = "text"
	choiceVar(cmd, value, "output", "o", "`form` of what is printed: text or json", "text", "json")
}

// dirVar adds a flag that a shell completes with directories. Its default is the
// value it points to.
func dirVar(cmd *cobra.Command, value *string, name, usage string) {
	cmd.Flags().StringVar(value, name, *value, usage)
	_ = cmd.MarkFlagDirname(name) // it fails for a flag that is not there
}

// fileVar adds a flag that a shell completes with files.
func fileVar(cmd *cobra.Command, value *string, name, usage string) {
	cmd.Flags().StringVar(value, name, *value, usage)
	_ = cmd.MarkFlagFilename(name) // it fails for a flag that is not there
}

// choiceVar adds a flag that accepts a few words, which a shell completes.
func choiceVar(cmd *cobra.Command, value *string, name, shorthand, usage string, accepted ...string) {
	cmd.Flags().VarP(&choice{value, accepted}, name, shorthand, usage)
	completeWords(cmd, name, accepted)
}

// completeWords lets a shell complete a flag with some words.
func completeWords(cmd *cobra.Command, name string, words []string) {
	// This fails for a flag that does not exist, or that has words already.
	_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

// choice is a flag that accepts a few words.
type choice struct {
	value    *string
	accepted []string
}

var _ pflag.Value = (*choice)(nil)

func (c *choice) String() string { return *c.value }

func (c *choice) Type() string { return "choice" }

func (c *choice) Set(text string) error {
	if !slices.Contains(c.accepted, text) {
		return errors.New("accepted are " + strings.Join(c.accepted, ", "))
	}
	*c.value = text
	return nil
}

// patterns is a flag that lists patterns as path.Match takes them.
type patterns []string

var _ pflag.Value = (*patterns)(nil)

func (p *patterns) String() string { return strings.Join(*p, ",") }

func (p *patterns) Type() string { return "patterns" }

func (p *patterns) Set(text string) error {
	*p = nil
	for item := range strings.SplitSeq(text, ",") {
		item = strings.TrimSpace(item)
		if _, err := path.Match(item, ""); err != nil {
			return fmt.Errorf("%q: accepted are patterns with * and ?, such as \"kata-*\"", item)
		}
		if item != "" {
			*p = append(*p, item)
		}
	}
	return nil
}

// noArgs refuses arguments that are not flags.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q: accepted are flags only", args[0])
	}
	return nil
}

// flagError returns the error for a wrong flag, which says what is accepted.
func flagError(cmd *cobra.Command, err error) error {
	if !cmd.HasParent() && cmd.Flags().NArg() > 0 {
		return commandError(cmd, cmd.Flags().Args()) // its flags cannot be known
	}
	var unknown *pflag.NotExistError
	var bare *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		name := "--" + unknown.GetSpecifiedName()
		if letters := unknown.GetSpecifiedShortnames(); letters != "" {
			name = "-" + letters
		}
		return fmt.Errorf("unknown flag %s of %q: accepted are %s", name, cmd.CommandPath(), strings.Join(acceptedFlags(cmd.Flags()), ", "))
	case errors.As(err, &bare):
		_, usage := pflag.UnquoteUsage(bare.GetFlag())
		return fmt.Errorf("--%s has no value: %w", bare.GetFlag().Name, accepted(bare.GetFlag(), errors.New(usage)))
	case errors.As(err, &invalid):
		return fmt.Errorf("--%s=%q: %w", invalid.GetFlag().Name, invalid.GetValue(), accepted(invalid.GetFlag(), invalid.Unwrap()))
	}
	return err
}

func acceptedFlags(flags *pflag.FlagSet) []string {
	var names []string
	flags.VisitAll(func(f *pflag.Flag) {
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + " or " + name
		}
		names = append(names, name)
	})
	return names
}

// accepted adds to an error what a flag accepts, if the flag's library has not.
func accepted(flag *pflag.Flag, err error) error {
	switch flag.Value.Type() {
	case "bool":
		return errors.New("accepted are true, false")
	case "duration":
		return errors.New("accepted are durations such as 500ms, 30s or 5m")
	case "uint32":
		return errors.New("accepted are numbers from 0 to 4294967295")
	case "uint64":
		return errors.New("accepted are numbers from 0 to 18446744073709551615")
	}
	return err
}

// commandError returns the error for a missing or unknown command, which lists the
// commands.
func commandError(root *cobra.Command, args []string) error {
	var names []string
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	what := "no command given"
	if len(args) > 0 {
		what = fmt.Sprintf("unknown command %q", args[0])
	}
	return fmt.Errorf("%s: accepted are %s", what, strings.Join(names, ", "))
}

// SPDX-License-Identifier: Apache-2.0

// The command mount-bpffs.

package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/proc"
)

// newMountCommand makes a command for an init container, so that the agent itself
// need not enter the node's mount namespace.
func newMountCommand() *cobra.Command {
	pinDir, procfs := defaults().datapath.PinDir, ""
	cmd := &cobra.Command{
		Use:   "mount-bpffs",
		Short: "Mount the file system for the kernel objects, if there is none",
		Long: `The kernel objects live in a file system of type bpf (a bpffs). If the parent of the
pin directory is in none, this mounts one there, in the mount namespace of the node:
on /sys/fs/bpf, or on an empty directory below it. The chart runs this before the
agent, whose own mounts would end with its container.`,
		Example: `  podshunt-agent mount-bpffs
  podshunt-agent mount-bpffs --pin-dir=/sys/fs/bpf/podshunt`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir := filepath.Dir(pinDir)
			mounted, err := datapath.MountBPFFS(proc.Path(procfs, 1, "ns", "mnt"), dir)
			if err != nil {
				return err
			}
			text := "there is a bpffs at %s\n"
			if mounted {
				text = "mounted a bpffs on %s\n"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), text, dir)
			return err
		},
	}
	dirVar(cmd, &pinDir, "pin-dir", "`directory` of the kernel objects; the mount is made on its parent")
	procVar(cmd, &procfs)
	return cmd
}

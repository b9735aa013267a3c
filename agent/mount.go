// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/agent/datapath"
)

// newMountCommand is for an init container: the agent itself has no business in
// the node's mount namespace.
func newMountCommand() *cobra.Command {
	pinDir, namespace := defaults().datapath.PinDir, "/proc/1/ns/mnt"
	cmd := &cobra.Command{
		Use:   "mount-bpffs",
		Short: "Mount the file system that keeps the kernel objects, where there is none",
		Long: `Mounts a bpffs on the parent of the pin directory, in the mount namespace of the
node, if there is none: on /sys/fs/bpf, or on an empty directory below it. The
chart runs it before the agent, whose own mounts would end with its container.`,
		Example: `  podshunt-agent mount-bpffs
  podshunt-agent mount-bpffs --pin-dir=/sys/fs/bpf/podshunt`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir := filepath.Dir(pinDir)
			mounted, err := datapath.MountBPFFS(namespace, dir)
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
	fileVar(cmd, &namespace, "mount-namespace", "`file` of the node's mount namespace")
	return cmd
}

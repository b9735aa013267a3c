// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/api"
)

func newFlowsCommand() *cobra.Command {
	var runDir, output string
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Show the TCP connections of the pods that take part",
		Long: `Shows the open TCP connections of the pods of this node that take part. A
connection that is paired has a line for each direction: the way of its latest
message, bytes by the shortcut and by TCP, and the last reason for TCP. One that
is not paired has one line that says why.`,
		Example: `  podshunt-agent flows
  podshunt-agent flows --output=json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, runDir, api.PathFlows, output, func(w io.Writer, l api.FlowList) error { return writeFlows(w, l.Items) })
		},
	}
	runDirVar(cmd, &runDir)
	outputVar(cmd, &output)
	return cmd
}

func writeFlows(w io.Writer, flows []api.Flow) error {
	if len(flows) == 0 {
		_, err := fmt.Fprintln(w, "no connections")
		return err
	}
	t := newTable(w)
	t.row("CLIENT", "SERVER", "DIRECTION", "PATH", "SHORTCUT", "TCP", "LAST REASON FOR TCP")
	for _, f := range flows {
		client, server := endText(f.Client), endText(f.Server)
		dialled := ""
		if f.OrigDst != f.Server.Address {
			dialled = "  dialled " + f.OrigDst.String()
		}
		if !f.Paired {
			t.row(client, server, "both", "tcp", "", "", f.Message)
			if dialled != "" {
				t.row("", dialled, "", "", "", "", "")
			}
			continue
		}
		t.row(client, server, "to server", directionText(f.ToServer))
		t.row("", dialled, "to client", directionText(f.ToClient))
	}
	return t.Flush()
}

// directionText returns the cells from PATH on.
func directionText(d *api.Direction) string {
	if d == nil {
		return ""
	}
	path := "tcp"
	if d.Shortcut {
		path = "shortcut"
	}
	return strings.Join([]string{path, byteText(d.ShortcutBytes), byteText(d.TCPBytes), d.Message}, "\t")
}

func endText(e api.FlowEnd) string {
	pod := podText(e.Pod)
	if !e.Address.IsValid() {
		return pod
	}
	return pod + " " + e.Address.String()
}

// SPDX-License-Identifier: Apache-2.0

// The command flows.

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/api"
)

func newFlowsCommand() *cobra.Command {
	var runDir, output string
	var chosen api.Selector
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Show the TCP connections of the pods that take part",
		Long: `Shows the open TCP connections of the pods of this node that take part.

A connection that can use the shortcut ("paired") has a line for each direction:
how its latest message went, bytes by the shortcut and by TCP, and why the last
message that went by TCP did. Any other connection has one line that says why it
stays on TCP. "via" is the address that the client connected to, if it is not the
server's own, as with a Service.`,
		Example: `  podshunt-agent flows
  podshunt-agent flows --pod=default/web --port=8080
  podshunt-agent flows --output=json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkPod(chosen.Pod); chosen.Pod != "" && err != nil {
				return usageError(fmt.Errorf("--pod: %w", err))
			}
			return show(cmd, runDir, api.PathFlows+"?"+chosen.Query(), output, func(w io.Writer, l api.FlowList) error { return writeFlows(w, l.Items) })
		},
	}
	runDirVar(cmd, &runDir)
	outputVar(cmd, &output)
	cmd.Flags().StringVar(&chosen.Pod, "pod", "", "only connections with an end in this `pod`, NAMESPACE/NAME")
	cmd.Flags().Uint16Var(&chosen.Port, "port", 0, "only connections to this server `port`, behind a Service also by its own; 0 means all")
	return cmd
}

// pageFlows is how many connections are aligned at once.
const pageFlows = 500

func writeFlows(w io.Writer, flows []api.Flow) error {
	if len(flows) == 0 {
		_, err := fmt.Fprintln(w, "no connections")
		return err
	}
	t := newPagedTable(w)
	t.row("CLIENT", "SERVER", "DIRECTION", "PATH", "SHORTCUT", "TCP", "LAST REASON FOR TCP")
	for i, f := range flows {
		// To align tens of thousands of rows at once takes more memory than the agent has to spare.
		if i%pageFlows == pageFlows-1 {
			if err := t.flush(); err != nil {
				return err
			}
		}
		client, server := endText(f.Client), endText(f.Server)
		via := ""
		if f.OrigDst != f.Server.Address {
			via = "  via " + f.OrigDst.String()
		}
		if !f.Paired {
			t.row(client, server, "both", "tcp", "", "", f.Message)
			if via != "" {
				t.row("", via, "", "", "", "", "")
			}
			continue
		}
		t.row(append([]string{client, server, "to server"}, directionCells(f.ToServer)...)...)
		t.row(append([]string{"", via, "to client"}, directionCells(f.ToClient)...)...)
	}
	return t.flush()
}

// directionCells returns the cells from PATH on.
func directionCells(d *api.Direction) []string {
	if d == nil {
		return make([]string, 4)
	}
	path := "tcp"
	if d.Shortcut {
		path = "shortcut"
	}
	return []string{path, byteText(d.ShortcutBytes), byteText(d.TCPBytes), d.Message}
}

func endText(e api.FlowEnd) string {
	pod := podText(e.Pod)
	if !e.Address.IsValid() {
		return pod
	}
	return pod + " " + e.Address.String()
}

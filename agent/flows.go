// SPDX-License-Identifier: Apache-2.0

// The command flows.

package main

import (
	"fmt"
	"io"
	"net/http"

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
			return showFlows(cmd, runDir, chosen, output)
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

// flowWriter writes flows one at a time.
type flowWriter interface {
	Write(api.Flow) error
	// Close writes what is not written yet.
	Close() error
}

// showFlows prints flows while the agent still sends them.
func showFlows(cmd *cobra.Command, runDir string, chosen api.Selector, output string) error {
	var w flowWriter = newFlowTable(cmd.OutOrStdout())
	if output == "json" {
		var err error
		if w, err = api.NewFlowListWriter(cmd.OutOrStdout(), "  "); err != nil {
			return err
		}
	}
	err := request(cmd.Context(), runDir, http.MethodGet, api.PathFlows+"?"+chosen.Query(), askTimeout,
		func(body io.Reader) error { return api.ReadFlowList(body, w.Write) })
	if err != nil {
		return err
	}
	return w.Close()
}

func writeFlows(w io.Writer, flows []api.Flow) error {
	t := newFlowTable(w)
	for _, f := range flows {
		if err := t.Write(f); err != nil {
			return err
		}
	}
	return t.Close()
}

// flowTable writes flows for people.
type flowTable struct {
	w     io.Writer
	table *table // nil before the first flow
	flows int
}

func newFlowTable(w io.Writer) *flowTable { return &flowTable{w: w} }

func (t *flowTable) Write(f api.Flow) error {
	if t.table == nil {
		t.table = newPagedTable(t.w)
		t.table.row("CLIENT", "SERVER", "DIRECTION", "PATH", "SHORTCUT", "TCP", "LAST REASON FOR TCP")
	}
	client, server := endText(f.Client), endText(f.Server)
	via := ""
	if f.OrigDst != f.Server.Address {
		via = "  via " + f.OrigDst.String()
	}
	if f.Paired {
		t.table.row(append([]string{client, server, "to server"}, directionCells(f.ToServer)...)...)
		t.table.row(append([]string{"", via, "to client"}, directionCells(f.ToClient)...)...)
	} else {
		t.table.row(client, server, "both", "tcp", "", "", f.Message)
		if via != "" {
			t.table.row("", via, "", "", "", "", "")
		}
	}
	// To align tens of thousands of rows at once takes more memory than the agent has to spare.
	if t.flows++; t.flows%pageFlows == 0 {
		return t.table.flush()
	}
	return nil
}

func (t *flowTable) Close() error {
	if t.table == nil {
		_, err := fmt.Fprintln(t.w, "no connections")
		return err
	}
	return t.table.flush()
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

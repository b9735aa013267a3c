// SPDX-License-Identifier: Apache-2.0

// The command status.

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podshunt/podshunt/agent/explain"
	"github.com/podshunt/podshunt/api"
)

func newStatusCommand() *cobra.Command {
	var runDir, output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of this node: kernel, pods, and why pods stay on TCP",
		Long: `Shows the state of the agent of this node: the kernel and its hazards (what it
does differently on the shortcut), the CNI configuration, each pod and why it
stays on TCP, unsupported server ports (NOT PAIRED), server ports whose new
connections join sooner or later than others (NEW CONNECTIONS JOIN), how full the
kernel maps are, and how often the kernel programs have decided what.`,
		Example: `  podshunt-agent status
  podshunt-agent status --output=json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, runDir, api.PathStatus, output, writeStatus)
		},
	}
	runDirVar(cmd, &runDir)
	outputVar(cmd, &output)
	return cmd
}

func writeStatus(w io.Writer, s api.Status) error {
	t := newTable(w)
	state := "running"
	if s.Unloaded {
		state = "unloaded: nothing is shortcut until the agent is started again"
	}
	if s.Replacing != "" {
		state = "replacing: " + s.Replacing
	}
	t.row("agent", s.Version+", "+state)
	t.row("kernel", s.Kernel)
	t.row("observer", s.Observer)
	if s.Replacing == "" {
		t.row("new connections", newConnectionsText(s.NewConnections))
		t.row("open connections", openConnectionsText(s.OpenConnections))
	}
	t.row("cgroup", s.Cgroup)
	t.row("pins", s.PinDir)
	guards := cmp.Or(strings.Join(s.Guards, " "), "none")
	if s.Untraced != "" {
		guards += "; all messages go by TCP, as " + s.Untraced
	}
	t.row("guards", guards)
	if s.Runtime != nil {
		t.row("runtime", runtimeText(*s.Runtime))
	}
	writeNodeReport(t, s.Node)
	if s.CNI != nil {
		t.row("cni plugin", cniText(*s.CNI))
	}
	if s.SourceError != "" {
		t.row("source", s.SourceError)
	}
	if s.PolicyError != "" {
		t.row("policy", s.PolicyError)
	}
	if s.Lease != nil {
		t.row("policy lease", leaseText(*s.Lease, time.Now()))
	}
	t.row()
	t.row("HAZARD", "PRESENT", "DETAIL")
	for _, h := range s.Hazards {
		t.row(h.Name, hazardState(h, s.AcceptedHazards), h.Detail)
	}
	t.row()
	t.row("POD", "ADDRESSES", "STATE", "REASON")
	for _, p := range s.Pods {
		state := "tcp"
		if p.Enrolled {
			state = "takes part"
			if p.AcceptBlocking {
				state += ", blocking sockets too"
			}
		}
		t.row(p.Pod.String(), join(p.Addresses), state, p.Message)
	}
	if len(s.Pods) == 0 {
		t.row("none")
	}
	if len(s.UnsupportedPorts) > 0 {
		t.row()
		t.row("NOT PAIRED", "SERVER PORT", "FROM", "USED", "SINCE")
	}
	for _, m := range s.UnsupportedPorts {
		from := "everywhere"
		switch {
		case m.Client != nil:
			from = podText(*m.Client)
		case slices.Equal(m.Reasons, []string{"blocking"}):
			from = "pods without " + api.AnnotationBlockingSockets + "=accept"
		}
		t.row(podText(m.Pod), strconv.Itoa(int(m.Port)), from, explain.Calls(m.Reasons), m.Since.Format(time.DateTime))
	}
	if len(s.JoinPorts) > 0 {
		t.row()
		t.row("POD", "SERVER PORT", "NEW CONNECTIONS JOIN")
	}
	for _, p := range s.JoinPorts {
		when := "at their handshake"
		if p.JoinAfter > 0 {
			when = fmt.Sprintf("after %d segments of data", p.JoinAfter)
		}
		t.row(podText(p.Pod), strconv.Itoa(int(p.Port)), when)
	}
	t.row()
	t.row("MAP", "ENTRIES", "MAX")
	for _, m := range s.Maps {
		t.row(m.Name, strconv.Itoa(m.Entries), strconv.Itoa(m.Max))
	}
	t.row()
	t.row("OUTCOME", "COUNT", "BYTES")
	for _, o := range s.Outcomes {
		if o.Count > 0 {
			t.row(o.String(), strconv.FormatUint(o.Count, 10), bytesOrNone(o.Bytes))
		}
	}
	return t.flush()
}

// runtimeText says which runtime the node has, and what it uses by which settings.
func runtimeText(r api.Runtime) string {
	if r.Error != "" {
		return "not known: " + r.Error
	}
	text := fmt.Sprintf("%s, networks in %s, plugins in %s", r.Name, r.ConfDir, strings.Join(r.BinDirs, " and "))
	if r.Network != "" {
		text += ", network " + r.Network
	}
	return text + " (" + cmp.Or(strings.Join(r.Sources, ", "), "defaults") + ")"
}

func cniText(s api.CNIStatus) string {
	text := "not installed"
	if s.Installed {
		text = "installed in " + s.Conflist
	}
	text += " since " + s.Since.Local().Format(time.DateTime)
	if s.Error != "" {
		text += ": " + s.Error
	}
	return text
}

func hazardState(h api.Hazard, accepted []string) string {
	switch {
	case !h.Present:
		return "no"
	case h.Guard != "":
		return "yes, guarded"
	case slices.Contains(accepted, h.Name):
		return "yes, accepted"
	case !h.Fatal:
		return "yes"
	}
	return "yes, refused"
}

func leaseText(l api.Lease, now time.Time) string {
	left := l.Until.Sub(now).Round(time.Second)
	text := fmt.Sprintf("ends in %s unless it is renewed", left)
	if left <= 0 {
		text = fmt.Sprintf("ended %s ago: all connections go by TCP", -left)
	}
	if l.Error != "" {
		text += "; not renewed: " + l.Error
	}
	return text
}

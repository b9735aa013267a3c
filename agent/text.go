// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/podshunt/podshunt/api"
)

// table collects rows of columns and writes them aligned.
type table struct {
	*tabwriter.Writer
}

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

// row keeps to one line whatever the cells hold. All rows of a table must have
// the same number of cells. tabwriter keeps the first error for Flush.
func (t table) row(cells ...string) {
	fmt.Fprintln(t, strings.ReplaceAll(strings.Join(cells, "\t"), "\n", "; "))
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

func writeStatus(w io.Writer, s api.Status) error {
	t := newTable(w)
	state := "running"
	if s.Unloaded {
		state = "unloaded: nothing is shortcut until the agent is started again"
	}
	t.row("agent", s.Version+", "+state)
	t.row("kernel", s.Kernel)
	t.row("observer", s.Observer)
	t.row("cgroup", s.Cgroup)
	t.row("pins", s.PinDir)
	t.row("guards", cmp.Or(strings.Join(s.Guards, " "), "none"))
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
		t.row(h.Name, hazardState(h, s.HazardsAccepted), h.Detail)
	}
	t.row()
	t.row("POD", "ADDRESSES", "STATE", "REASON")
	for _, p := range s.Pods {
		state := "tcp"
		if p.Enrolled {
			state = "takes part"
		}
		t.row(p.Pod.String(), join(p.Addresses), state, p.Reason)
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
		if m.Client != nil {
			from = podText(*m.Client)
		}
		t.row(podText(m.Pod), strconv.Itoa(int(m.Port)), from, strings.Join(m.Reasons, ", "), m.Since.Format(time.DateTime))
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
			t.row(o.Name, strconv.FormatUint(o.Count, 10), bytesOrNone(o.Bytes))
		}
	}
	return t.Flush()
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

func hazardState(h api.Hazard, accepted bool) string {
	switch {
	case !h.Present:
		return "no"
	case h.Guard != "":
		return "yes, guarded"
	case !h.Fatal:
		return "yes"
	case accepted:
		return "yes, accepted"
	}
	return "yes, refused"
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
			t.row(client, server, "both", "tcp", "", "", f.Reason)
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
	reason := d.Reason
	if d.Detail != "" {
		reason += " (" + d.Detail + ")"
	}
	return strings.Join([]string{path, byteText(d.ShortcutBytes), byteText(d.TCPBytes), reason}, "\t")
}

func endText(e api.FlowEnd) string {
	pod := podText(e.Pod)
	if !e.Address.IsValid() {
		return pod
	}
	return pod + " " + e.Address.String()
}

func podText(p api.PodRef) string {
	if p == (api.PodRef{}) {
		return "-"
	}
	return p.String()
}

func join(addresses []netip.Addr) string {
	var texts []string
	for _, a := range addresses {
		texts = append(texts, a.String())
	}
	return cmp.Or(strings.Join(texts, " "), "-")
}

func bytesOrNone(n uint64) string {
	if n == 0 {
		return ""
	}
	return byteText(n)
}

// byteText returns a size as people read it: "512 B", "1.5 MiB".
func byteText(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	size, units := float64(n), "KMGTPE"
	i := -1
	for size >= 1024 {
		size /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", size, units[i])
}

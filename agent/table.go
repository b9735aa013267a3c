// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"

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

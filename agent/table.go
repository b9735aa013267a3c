// SPDX-License-Identifier: Apache-2.0

// Tables on the terminal.

package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"unicode"

	"github.com/liggitt/tabwriter"

	"github.com/podshunt/podshunt/api"
)

// table writes rows of columns aligned, by what kubectl aligns its columns with.
type table struct {
	w        *tabwriter.Writer
	buffered *bufio.Writer // what w writes to, as it writes each cell and its padding alone
	err      error         // the first of both
}

// newTable makes a table whose columns are as wide as the widest cell of the rows up to
// one without cells.
func newTable(w io.Writer) *table {
	return makeTable(w, 0)
}

// newPagedTable makes a table of one set of columns that may be flushed many times. They
// are at least as wide as those that are written already.
func newPagedTable(w io.Writer) *table {
	return makeTable(w, tabwriter.RememberWidths)
}

func makeTable(w io.Writer, flags uint) *table {
	buffered := bufio.NewWriterSize(w, 64<<10)
	return &table{w: tabwriter.NewWriter(buffered, 0, 0, 2, ' ', flags), buffered: buffered}
}

// row adds a line, whatever the cells hold: some quote what users have written. All
// rows of a table must have the same number of cells.
func (t *table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return ' '
			}
			return r
		}, strings.ReplaceAll(cell, "\n", "; "))
	}
	if t.err == nil {
		_, t.err = fmt.Fprintln(t.w, strings.Join(cells, "\t"))
	}
}

// flush writes the rows that are not written yet.
func (t *table) flush() error {
	if t.err == nil {
		t.err = t.w.Flush()
	}
	if t.err == nil {
		t.err = t.buffered.Flush()
	}
	return t.err
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

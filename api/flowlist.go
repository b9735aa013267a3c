// SPDX-License-Identifier: Apache-2.0

// Flow lists, written and read one flow at a time: tens of thousands of flows take tens
// of MiB as text.

package api

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// FlowListWriter writes a FlowList as JSON.
type FlowListWriter struct {
	w            *bufio.Writer
	indent       string
	before, tail string // what is written before the next flow, and after the last
}

// NewFlowListWriter returns a writer to w. It writes indent once for each level, or all on
// one line if it is empty. The caller calls Close, which does not close w.
func NewFlowListWriter(w io.Writer, indent string) (*FlowListWriter, error) {
	l := &FlowListWriter{w: bufio.NewWriterSize(w, 64<<10), indent: indent}
	empty, err := l.marshal(FlowList{TypeMeta: TypeMeta{Version, KindFlowList}, Items: []Flow{}}, 0)
	if err != nil {
		return nil, err
	}
	l.before, l.tail, _ = strings.Cut(string(empty), "]")
	l.before, l.tail = l.before+l.line(2), "]"+l.tail+"\n"
	return l, nil
}

// Write adds a flow. It may keep it until Close.
func (l *FlowListWriter) Write(f Flow) error {
	text, err := l.marshal(f, 2)
	if err != nil {
		return err
	}
	_, _ = l.w.WriteString(l.before) // an error is one of the next Write, too
	l.before = "," + l.line(2)
	_, err = l.w.Write(text)
	return err
}

// Close ends the list.
func (l *FlowListWriter) Close() error {
	end := l.line(1) + l.tail
	if !strings.HasPrefix(l.before, ",") { // no flow
		end = strings.TrimSuffix(l.before, l.line(2)) + l.tail
	}
	_, _ = l.w.WriteString(end) // an error is one of Flush, too
	return l.w.Flush()
}

// line begins a line of a level.
func (l *FlowListWriter) line(level int) string {
	if l.indent == "" {
		return ""
	}
	return "\n" + strings.Repeat(l.indent, level)
}

func (l *FlowListWriter) marshal(v any, level int) ([]byte, error) {
	if l.indent == "" {
		return json.Marshal(v)
	}
	return json.MarshalIndent(v, strings.Repeat(l.indent, level), l.indent)
}

// ReadFlowList calls visit with each flow of a FlowList as soon as it is read. It returns
// the first error of visit.
func ReadFlowList(r io.Reader, visit func(Flow) error) error {
	err := readFlowList(json.NewDecoder(r), visit)
	if errors.Is(err, io.EOF) { // in the middle of the list
		err = io.ErrUnexpectedEOF
	}
	return err
}

func readFlowList(d *json.Decoder, visit func(Flow) error) error {
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		if key != "items" {
			var other json.RawMessage
			if err := d.Decode(&other); err != nil {
				return err
			}
			continue
		}
		if err := expect(d, json.Delim('[')); err != nil {
			return err
		}
		for d.More() {
			var f Flow
			if err := d.Decode(&f); err != nil {
				return err
			}
			if err := visit(f); err != nil {
				return err
			}
		}
		if err := expect(d, json.Delim(']')); err != nil {
			return err
		}
	}
	return expect(d, json.Delim('}'))
}

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err == nil && got != want {
		err = fmt.Errorf("flow list has %v in place of %v", got, want)
	}
	return err
}

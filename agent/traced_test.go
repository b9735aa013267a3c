// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
)

type tracedFunc func() (untraced, err error)

func (f tracedFunc) UpdateTraced() (untraced, err error) { return f() }

// TestWatchTraced: the kernel is asked each second, and what changes is logged once.
func TestWatchTraced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		off := errors.New("it is off")
		answers := [][2]error{{nil, nil}, {off, nil}, {off, nil}, {nil, nil}, {nil, errors.New("no control")}, {nil, datapath.ErrUnloaded}}
		ctx, cancel := context.WithCancel(t.Context())
		began, asked := time.Now(), 0
		d := tracedFunc(func() (untraced, err error) {
			answer := answers[asked]
			if asked++; asked == len(answers) {
				cancel()
			}
			return answer[0], answer[1]
		})
		var out bytes.Buffer
		if err := watchTraced(ctx, d, slog.New(slog.NewTextHandler(&out, nil))); err != nil {
			t.Fatal(err)
		}
		if took, want := time.Since(began), time.Duration(len(answers)-1)*tracedInterval; took != want {
			t.Errorf("took %v, want %v", took, want)
		}
		for text, want := range map[string]int{`reason="it is off"`: 1, "runs the guards again": 1, "no control": 1, "level=": 3} {
			if got := strings.Count(out.String(), text); got != want {
				t.Errorf("got %d lines with %q, want %d:\n%s", got, text, want, &out)
			}
		}
	})
}

// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/podshunt/podshunt/api"
)

// TestFlowList: what is written flow by flow is what encoding/json writes of the whole, and
// is read again.
func TestFlowList(t *testing.T) {
	for _, indent := range []string{"", "  "} {
		for _, n := range []int{0, 1, 3} {
			t.Run(fmt.Sprintf("%d flows with indent %q", n, indent), func(t *testing.T) {
				want := api.FlowList{TypeMeta: api.TypeMeta{APIVersion: api.Version, Kind: api.KindFlowList}, Items: []api.Flow{}}
				var got bytes.Buffer
				w, err := api.NewFlowListWriter(&got, indent)
				if err != nil {
					t.Fatal(err)
				}
				for i := range n {
					f := api.Flow{Reason: "unmatched", Message: fmt.Sprint("line\n<[]> ", i), Details: []string{"a", "b"}, ToClient: &api.Direction{Switches: uint32(i)}}
					want.Items = append(want.Items, f)
					if err := w.Write(f); err != nil {
						t.Fatal(err)
					}
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				var whole bytes.Buffer
				e := json.NewEncoder(&whole)
				e.SetIndent("", indent)
				if err := e.Encode(want); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(whole.String(), got.String()); diff != "" {
					t.Errorf("text (-want +got):\n%s", diff)
				}
				read, err := readFlows(got.String())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want.Items, read, cmpopts.EquateEmpty(), cmpopts.EquateComparable(api.Flow{}.OrigDst)); diff != "" {
					t.Errorf("flows read again (-want +got):\n%s", diff)
				}
				// An agent that ends meanwhile leaves a part of a list.
				text := strings.TrimSpace(got.String())
				for size := range text {
					if _, err := readFlows(text[:size]); !errors.Is(err, io.ErrUnexpectedEOF) {
						t.Fatalf("got error %v of %q, want %v", err, text[:size], io.ErrUnexpectedEOF)
					}
				}
			})
		}
	}
}

func readFlows(text string) (flows []api.Flow, err error) {
	err = api.ReadFlowList(strings.NewReader(text), func(f api.Flow) error {
		flows = append(flows, f)
		return nil
	})
	return flows, err
}

func TestReadFlowList(t *testing.T) {
	for text, want := range map[string]string{
		`{"items":[],"later":{"items":[1]}}`: "",
		`{"later":[1,{}],"items":[{}]}`:      "",
		`{}`:                                 "",
		`[]`:                                 "flow list has [ in place of {",
		`"text"`:                             "flow list has text in place of {",
		`{"items":null}`:                     "flow list has <nil> in place of [",
		`{"items":[1]}`:                      "cannot unmarshal number",
		`{"items":[{}}`:                      "invalid character '}'",
	} {
		if _, err := readFlows(text); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got error %v, want %q", text, err, want)
		}
	}
	stop := errors.New("stop")
	if err := api.ReadFlowList(strings.NewReader(`{"items":[{},{}]}`), func(api.Flow) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got error %v of visit, want %v", err, stop)
	}
	// What is only written at the end fails then.
	full := errors.New("disk full")
	w, err := api.NewFlowListWriter(failing{full}, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Write(api.Flow{}), w.Close()); !errors.Is(err, full) {
		t.Errorf("got error %v, want %v", err, full)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"net/netip"
	"net/url"
	"testing"

	"github.com/podshunt/podshunt/api"
)

func TestSelector(t *testing.T) {
	pod := func(name string) api.PodRef { return api.PodRef{Namespace: "default", Name: name, UID: "uid"} }
	f := api.Flow{
		Client:  api.FlowEnd{Pod: pod("client"), Address: netip.MustParseAddrPort("10.0.0.1:5000")},
		Server:  api.FlowEnd{Pod: pod("web"), Address: netip.MustParseAddrPort("10.0.0.2:8080")},
		OrigDst: netip.MustParseAddrPort("10.96.0.1:80"),
	}
	for _, tc := range []struct {
		query string
		want  bool
	}{
		{"", true},
		{"pod=&port=0", true},
		{"pod=default/client", true},
		{"pod=default/web&port=8080", true},
		{"port=80", true}, // the Service's
		{"pod=default/other", false},
		{"pod=default/web&port=5000", false}, // the client's
		{"port=443", false},
	} {
		query, err := url.ParseQuery(tc.query)
		if err != nil {
			t.Fatal(err)
		}
		s, err := api.ParseSelector(query)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Chooses(f); got != tc.want {
			t.Errorf("%q chooses the flow: got %v, want %v", tc.query, got, tc.want)
		}
		again, err := url.ParseQuery(s.Query())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := api.ParseSelector(again); got != s || err != nil {
			t.Errorf("%+v written and read: got %+v (%v)", s, got, err)
		}
	}
	for _, port := range []string{"65536", "-1", "http"} {
		if s, err := api.ParseSelector(url.Values{"port": {port}}); err == nil {
			t.Errorf("port %s: got %+v, want an error", port, s)
		}
	}
}

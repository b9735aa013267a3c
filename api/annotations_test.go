// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

func TestParseAnnotations(t *testing.T) {
	for _, tc := range []struct {
		name        string
		annotations map[string]string
		want        api.Settings
		// wantErr are parts of the error's text.
		wantErr []string
	}{
		{name: "none"},
		{name: "of others", annotations: map[string]string{"example.com/shortcut": "yes", "podshunt.io": "x"}},
		{name: "enabled", annotations: map[string]string{"podshunt.io/shortcut": "enabled"}, want: api.Settings{Enabled: true}},
		{name: "disabled", annotations: map[string]string{"podshunt.io/shortcut": "disabled"}},
		{
			name: "all",
			annotations: map[string]string{
				"podshunt.io/shortcut":         "enabled",
				"podshunt.io/ports":            "1, 8000-8010 ,65535",
				"podshunt.io/exclude-ports":    "8001-8001",
				"podshunt.io/paused-until":     "2026-01-31T18:00:00Z",
				"podshunt.io/blocking-sockets": "accept",
				"example.com/other":            "",
			},
			want: api.Settings{
				Enabled:        true,
				Ports:          []api.PortRange{{First: 1, Last: 1}, {First: 8000, Last: 8010}, {First: 65535, Last: 65535}},
				ExcludePorts:   []api.PortRange{{First: 8001, Last: 8001}},
				PausedUntil:    time.Date(2026, 1, 31, 18, 0, 0, 0, time.UTC),
				AcceptBlocking: true,
			},
		},
		{
			name:        "pause in another zone",
			annotations: map[string]string{"podshunt.io/paused-until": "2026-01-31T20:00:00.5+02:00"},
			want:        api.Settings{PausedUntil: time.Date(2026, 1, 31, 18, 0, 0, 5e8, time.UTC)},
		},
		{
			name:        "ports before they are opted in",
			annotations: map[string]string{"podshunt.io/ports": "80"},
			want:        api.Settings{Ports: []api.PortRange{{First: 80, Last: 80}}},
		},
		{
			name:        "unknown name",
			annotations: map[string]string{"podshunt.io/shortcut": "enabled", "podshunt.io/port": "80"},
			wantErr: []string{
				`annotation podshunt.io/port="80": unknown annotation; accepted are podshunt.io/shortcut, ` +
					"podshunt.io/ports, podshunt.io/exclude-ports, podshunt.io/paused-until, podshunt.io/blocking-sockets",
			},
		},
		{name: "case", annotations: map[string]string{"podshunt.io/shortcut": "Enabled"}, wantErr: []string{`accepted are "enabled" and "disabled"`}},
		{name: "boolean", annotations: map[string]string{"podshunt.io/shortcut": "true"}, wantErr: []string{`podshunt.io/shortcut="true"`}},
		{name: "empty switch", annotations: map[string]string{"podshunt.io/shortcut": ""}, wantErr: []string{`accepted are "enabled"`}},
		{
			name:        "blocking sockets refused, such as against the namespace's default",
			annotations: map[string]string{"podshunt.io/shortcut": "enabled", "podshunt.io/blocking-sockets": "refuse"},
			want:        api.Settings{Enabled: true},
		},
		{
			name:        "blocking sockets by a word that is not accepted",
			annotations: map[string]string{"podshunt.io/shortcut": "enabled", "podshunt.io/blocking-sockets": "true"},
			wantErr:     []string{`annotation podshunt.io/blocking-sockets="true": accepted are "accept" and "refuse"`},
		},
		{name: "blocking sockets by nothing", annotations: map[string]string{"podshunt.io/blocking-sockets": ""}, wantErr: []string{`podshunt.io/blocking-sockets=""`}},
		{name: "pause without zone", annotations: map[string]string{"podshunt.io/paused-until": "2026-01-31T18:00:00"}, wantErr: []string{"RFC 3339"}},
		{name: "pause as duration", annotations: map[string]string{"podshunt.io/paused-until": "10m"}, wantErr: []string{"RFC 3339"}},
		{
			name: "all faults at once",
			annotations: map[string]string{
				"podshunt.io/shortcut":      "on",
				"podshunt.io/ports":         "http",
				"podshunt.io/exclude-ports": "0",
				"podshunt.io/paused-until":  "",
				"podshunt.io/":              "",
			},
			wantErr: []string{
				"podshunt.io/shortcut=", "podshunt.io/ports=", "podshunt.io/exclude-ports=", "podshunt.io/paused-until=", `podshunt.io/=""`,
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := api.ParseAnnotations(tc.annotations)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("settings (-want +got):\n%s", diff)
			}
			checkError(t, err, tc.wantErr)
		})
	}
}

func TestParseAnnotationsRefusesPorts(t *testing.T) {
	for _, list := range []string{
		"", " ", ",", "80,", ",80", "0", "65536", "-1", "-", "80-", "-80", "81-80", "0-80", "80-65536", "1-2-3",
		"+80", "080", "8 0", "80 - 81", "80;81", "0x50", "http", "*", "１",
	} {
		for _, name := range []string{api.AnnotationPorts, api.AnnotationExcludePorts} {
			got, err := api.ParseAnnotations(map[string]string{api.AnnotationShortcut: "enabled", name: list})
			if diff := cmp.Diff(api.Settings{}, got); diff != "" {
				t.Errorf("%s=%q: settings (-want +got):\n%s", name, list, diff)
			}
			checkError(t, err, []string{name, "accepted are ports from 1 to 65535 and ranges"})
		}
	}
}

func TestParseAnnotationsLimits(t *testing.T) {
	list := func(n int) string { return strings.TrimSuffix(strings.Repeat("80,", n), ",") }
	if got, err := api.ParseAnnotations(map[string]string{api.AnnotationPorts: list(api.MaxPortRanges)}); err != nil || len(got.Ports) != api.MaxPortRanges {
		t.Errorf("got %d ranges and error %v, want all", len(got.Ports), err)
	}
	for _, name := range []string{api.AnnotationPorts, api.AnnotationExcludePorts} {
		_, err := api.ParseAnnotations(map[string]string{name: list(30_000)})
		checkError(t, err, []string{name, `80,80..."`, "30000 ports and ranges: accepted are at most 64; join neighbours to ranges"})
		if n := len(err.Error()); n > 500 {
			t.Errorf("got an error of %d bytes", n)
		}
	}

	// What is of any length, and any number of them.
	long := strings.Repeat("ü", 100_000)
	_, err := api.ParseAnnotations(map[string]string{api.AnnotationPorts: long})
	checkError(t, err, []string{`ü..."`, "accepted are ports"})
	if n := len(err.Error()); n > 1000 || !utf8.ValidString(err.Error()) {
		t.Errorf("got an error of %d bytes: %v", n, err)
	}
	many := map[string]string{}
	for i := range 1000 {
		many[fmt.Sprint("podshunt.io/x", i)] = long
	}
	_, err = api.ParseAnnotations(many)
	checkError(t, err, []string{"podshunt.io/x0=", "and 992 more annotations that are not accepted"})
	if n := len(err.Error()); n > 5000 {
		t.Errorf("got an error of %d bytes", n)
	}
}

func TestShorten(t *testing.T) {
	for _, test := range []struct {
		text string
		most int
		want string
	}{
		{"", 0, ""},
		{"abc", 3, "abc"},
		{"abc", 2, "ab..."},
		{"abc", 0, "..."},
		{"aü", 2, "a..."},
		{"ü", 1, "..."},
		{"a\U0001f600", 4, "a..."},
		// No character begins here.
		{"\x80\x80\x80\x80\x80\x80", 5, "\x80\x80\x80\x80\x80..."},
		{"\x80\x80\x80", 2, "\x80\x80..."},
		{"\x80", 0, "..."},
	} {
		if got := api.Shorten(test.text, test.most); got != test.want {
			t.Errorf("Shorten(%q, %d): got %q, want %q", test.text, test.most, got, test.want)
		}
	}
}

func FuzzParseAnnotations(f *testing.F) {
	f.Add("podshunt.io/shortcut", "\xff", strings.Repeat("\x80", 4096))
	f.Add("podshunt.io/shortcut", "enabled", "80,8000-8010")
	f.Add("podshunt.io/paused-until", "2026-01-31T18:00:00Z", "1-65535")
	f.Add("podshunt.io/exclude-ports", "80-", "080")
	f.Add("podshunt.io/ports", "0", "")
	f.Add("example.com/x", "\x00", "99999999999999999999")
	f.Fuzz(func(t *testing.T, name, value, ports string) {
		annotations := map[string]string{name: value, api.AnnotationPorts: ports}
		got, err := api.ParseAnnotations(annotations)
		if err != nil {
			if diff := cmp.Diff(api.Settings{}, got); diff != "" {
				t.Errorf("settings with error %v (-want +got):\n%s", err, diff)
			}
			return
		}
		items := make([]string, len(got.Ports))
		for i, r := range got.Ports {
			if r.First < 1 || r.First > r.Last {
				t.Errorf("got range %s from %q", r, ports)
			}
			items[i] = r.String()
		}
		if len(items) > api.MaxPortRanges {
			t.Errorf("got %d ranges from %q", len(items), ports)
		}
		annotations[api.AnnotationPorts] = strings.Join(items, ",")
		again, err := api.ParseAnnotations(annotations)
		if err != nil {
			t.Fatalf("got error %v from the printed form of %q", err, ports)
		}
		if diff := cmp.Diff(got, again); diff != "" {
			t.Errorf("settings of the printed form (-first +again):\n%s", diff)
		}
	})
}

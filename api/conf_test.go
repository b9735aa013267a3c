// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

func TestParseConf(t *testing.T) {
	defaults := api.PluginConf{
		AgentSocket:    "/run/podshunt/agent.sock",
		AgentTimeout:   200 * time.Millisecond,
		AttachmentsDir: "/run/podshunt/attachments",
	}
	for _, tc := range []struct {
		name, section string
		want          api.PluginConf
		// wantErr are parts of the error's text.
		wantErr []string
	}{
		{name: "empty", section: `{}`, want: defaults},
		{
			name: "keys of the specification",
			section: `{"cniVersion":"1.1.0","name":"n","type":"podshunt","args":{"x":1},"capabilities":{"a":true},
				"dns":{},"ipam":{"type":"x"},"prevResult":{},"runtimeConfig":{},"cni.dev/valid-attachments":[],"cni.dev/new":1}`,
			want: defaults,
		},
		{
			name:    "all of ours",
			section: `{"agentSocket":"/a.sock","agentTimeout":"1.5s","attachmentsDir":"/b"}`,
			want:    api.PluginConf{AgentSocket: "/a.sock", AgentTimeout: 1500 * time.Millisecond, AttachmentsDir: "/b"},
		},
		{
			name:    "shortest timeout",
			section: `{"agentTimeout":"1ms"}`,
			want:    api.PluginConf{AgentSocket: api.Socket, AgentTimeout: time.Millisecond, AttachmentsDir: api.AttachmentsDir},
		},
		{
			name:    "longest timeout",
			section: `{"agentTimeout":"10s"}`,
			want:    api.PluginConf{AgentSocket: api.Socket, AgentTimeout: 10 * time.Second, AttachmentsDir: api.AttachmentsDir},
		},
		{
			name:    "longest socket",
			section: `{"agentSocket":"/` + strings.Repeat("s", 102) + `"}`,
			want: api.PluginConf{
				AgentSocket:  "/" + strings.Repeat("s", 102),
				AgentTimeout: api.PluginTimeout, AttachmentsDir: api.AttachmentsDir,
			},
		},
		{name: "no JSON", section: `{`, wantErr: []string{"decode plugin section"}},
		{name: "no object", section: `[]`, wantErr: []string{"decode plugin section"}},
		{name: "unknown key", section: `{"agentsocket":"/a"}`, wantErr: []string{`"agentsocket"`, "agentSocket, agentTimeout and attachmentsDir"}},
		{name: "key of another plugin", section: `{"ipMasq":true}`, wantErr: []string{`"ipMasq": unknown key`}},
		{name: "relative socket", section: `{"agentSocket":"a.sock"}`, wantErr: []string{`"agentSocket": "a.sock": accepted is an absolute path`}},
		{name: "empty socket", section: `{"agentSocket":""}`, wantErr: []string{"absolute path"}},
		{name: "null socket", section: `{"agentSocket":null}`, wantErr: []string{"absolute path"}},
		{name: "long socket", section: `{"agentSocket":"/` + strings.Repeat("s", 103) + `"}`, wantErr: []string{"at most 103 bytes"}},
		{name: "relative directory", section: `{"attachmentsDir":"b"}`, wantErr: []string{`"attachmentsDir": "b": accepted is an absolute path`}},
		{name: "timeout without unit", section: `{"agentTimeout":"200"}`, wantErr: []string{`accepted is a duration from "1ms" to "10s"`}},
		{name: "timeout as number", section: `{"agentTimeout":200}`, wantErr: []string{`accepted is a duration`}},
		{name: "short timeout", section: `{"agentTimeout":"999us"}`, wantErr: []string{`accepted is a duration`}},
		{name: "long timeout", section: `{"agentTimeout":"10.001s"}`, wantErr: []string{`accepted is a duration`}},
		{name: "null timeout", section: `{"agentTimeout":null}`, wantErr: []string{`accepted is a duration`}},
		{
			name:    "all faults at once",
			section: `{"agentTimeout":"x","b":1,"attachmentsDir":2}`,
			wantErr: []string{`"agentTimeout": "x"`, `"attachmentsDir": 2`, `"b": unknown key`},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := api.ParseConf([]byte(tc.section))
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("conf (-want +got):\n%s", diff)
			}
			checkError(t, err, tc.wantErr)
		})
	}
}

// checkError wants every part in the error's text, or no error without parts.
func checkError(t testing.TB, err error, parts []string) {
	t.Helper()
	if len(parts) == 0 && err != nil {
		t.Errorf("got error %v, want none", err)
	}
	if len(parts) > 0 && err == nil {
		t.Fatalf("got no error, want one with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got error %q, want %q in it", err, part)
		}
	}
}

func TestSection(t *testing.T) {
	defaults := api.PluginConf{AgentSocket: api.Socket, AgentTimeout: api.PluginTimeout, AttachmentsDir: api.AttachmentsDir}
	for _, tc := range []struct {
		name string
		conf api.PluginConf
		want string
	}{
		{"defaults", defaults, `{"type":"podshunt"}`},
		{
			"others",
			api.PluginConf{AgentSocket: "/a", AgentTimeout: 1500 * time.Millisecond, AttachmentsDir: "/b"},
			`{"type":"podshunt","agentSocket":"/a","agentTimeout":"1.5s","attachmentsDir":"/b"}`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := tc.conf.Section()
			if string(got) != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			if back, err := api.ParseConf(got); err != nil || back != tc.conf {
				t.Errorf("parsed: got %+v and error %v, want %+v", back, err, tc.conf)
			}
		})
	}
}

func FuzzParseConf(f *testing.F) {
	for _, seed := range []string{
		`{}`, `null`, `[]`, `{"agentSocket":"/a","agentTimeout":"5s","attachmentsDir":"/b"}`,
		`{"cniVersion":"1.1.0","name":"n","type":"podshunt","prevResult":{"ips":[]},"cni.dev/valid-attachments":[]}`,
		`{"agentTimeout":"-1s","agentTimeout":null,"x":"\u0000"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, section []byte) {
		conf, err := api.ParseConf(section)
		if err != nil {
			if conf != (api.PluginConf{}) {
				t.Errorf("got %+v with error %v, want the zero value", conf, err)
			}
			return
		}
		if conf.AgentSocket == "" || conf.AttachmentsDir == "" || conf.AgentTimeout < time.Millisecond || conf.AgentTimeout > 10*time.Second {
			t.Errorf("got %+v out of bounds", conf)
		}
	})
}

func TestFileName(t *testing.T) {
	safe := regexp.MustCompile(`^[0-9a-f]{32}\.json$`)
	seen := map[string]api.AttachmentID{}
	for _, id := range []api.AttachmentID{
		{},
		{Network: "n", ContainerID: "c", IfName: "eth0"},
		{Network: "n", ContainerID: "c", IfName: "eth1"},
		{Network: "m", ContainerID: "c", IfName: "eth0"},
		{Network: "nc", IfName: "eth0"},
		{ContainerID: "nc", IfName: "eth0"},
		{Network: "../..", ContainerID: "/", IfName: strings.Repeat("x", 300)},
	} {
		name := id.FileName()
		if !safe.MatchString(name) {
			t.Errorf("got name %q of %+v, want one of %s", name, id, safe)
		}
		if other, dup := seen[name]; dup {
			t.Errorf("got name %q for both %+v and %+v", name, id, other)
		}
		seen[name] = id
	}
	// An agent reads what a plugin of another version wrote.
	got := api.AttachmentID{Network: "pods", ContainerID: "c1", IfName: "eth0"}.FileName()
	if want := "39a7199053c6502ea6ae79c3d34d8ec4.json"; got != want {
		t.Errorf("got name %q, want %q", got, want)
	}
}

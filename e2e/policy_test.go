// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/podshunt/podshunt/api"
)

// TestChanges changes what a pod asks for while its connections are in use.
func TestChanges(t *testing.T) {
	n := mustNode(t)
	n.MustWritePods(t, "client "+on)
	n.mustStart(t)
	s := mustService(t, n)
	l := newLoad(t)
	early := l.mustStream(t, s.client, s.streams[0])
	notListed := "not opted in: no entry in " + n.PodsFile
	wantDiff(t, "pods", []string{"client: takes part", "web: " + notListed}, n.MustStates(t))
	if f := early.flow(t, n.MustFlows(t)); f.Paired || f.Message != "default/web: "+notListed {
		t.Errorf("got %+v, want it unpaired because %s", f, notListed)
	}

	// Opted in at run time: from now on connections are paired.
	n.MustWritePods(t, "client "+on, "web "+on)
	mustBecome(t, "opted in", []string{"client: takes part", "web: takes part"}, func() []string { return n.MustStates(t) })
	for _, to := range s.streams {
		l.mustStream(t, s.client, to)
	}
	l.mustStream(t, s.client, endpoint{netip.AddrPortFrom(s.web.IPv6, 7000), s.streams[0].listener})
	for _, loopback := range []string{"127.0.0.1:7000", "[::1]:7000"} {
		l.mustStream(t, s.web, endpoint{netip.MustParseAddrPort(loopback), s.streams[0].listener})
	}
	l.churn(s.client, s.shorts[:]...)
	paired := l.streams[1:]
	n.mustShortcut(t, paired...)

	pausedFor := func(d time.Duration) string {
		return on + ", podshunt.io/paused-until: '" + time.Now().Add(d).Format(time.RFC3339Nano) + "'"
	}
	for _, tc := range []struct {
		name, web string
		// detail explains the streams, which stay on the shortcut if it is empty.
		detail string
		// state is the pod's, if it does not take part.
		state string
	}{
		{name: "opted out", web: "podshunt.io/shortcut: disabled", detail: "not opted in by podshunt.io/shortcut", state: "not opted in by podshunt.io/shortcut"},
		{name: "opted in again", web: on},
		{name: "port excluded", web: on + ", podshunt.io/exclude-ports: '22,6990-7001'", detail: "server port in podshunt.io/exclude-ports"},
		{name: "other port excluded", web: on + ", podshunt.io/exclude-ports: '7002-7200'"},
		{name: "port not listed", web: on + ", podshunt.io/ports: '7100-7101'", detail: "server port not in podshunt.io/ports"},
		{name: "port listed", web: on + ", podshunt.io/ports: '22,7000-7001'"},
		{
			name: "bad annotation", web: on + ", podshunt.io/ports: 'http'", detail: `annotation podshunt.io/ports="http"`,
			state: `annotation podshunt.io/ports="http": "http" is not a port or a range: accepted are ports from 1 to 65535 ` +
				`and ranges, separated by commas, such as "6379,8000-8010"`,
		},
		{name: "good again", web: on},
		{name: "paused", web: pausedFor(time.Hour), detail: "paused by podshunt.io/paused-until"},
	} {
		n.MustWritePods(t, "client "+on, "web "+tc.web)
		if tc.detail == "" {
			n.mustShortcut(t, paired...)
		} else {
			mustBecome(t, tc.name, "", func() string { return n.notOnTCP(t, paired, tc.detail) })
		}
		state := "takes part"
		if tc.state != "" {
			state = tc.state
		}
		wantDiff(t, tc.name, []string{"client: takes part", "web: " + state}, n.MustStates(t))
		n.mustMove(t, tc.name, paired, tc.detail == "")
	}

	// A pause ends by itself.
	n.MustWritePods(t, "client "+on, "web "+pausedFor(time.Second))
	n.mustShortcut(t, paired...)

	// A file that is not accepted changes nothing.
	for _, text := range []string{"pods: {", "pods:\n- {namespace: default, name: web, annotation: {}}\n", ""} {
		if err := n.WritePodsFile(text); err != nil {
			t.Fatal(err)
		}
		mustBecome(t, "source error", true, func() bool {
			return strings.HasPrefix(n.MustStatus(t).SourceError, "pods file "+n.PodsFile+": ")
		})
		wantDiff(t, "pods with a bad file", []string{"client: takes part", "web: takes part"}, n.MustStates(t))
		n.mustMove(t, "bad file", paired, true)
		n.MustWritePods(t, "client "+on, "web "+on)
		mustBecome(t, "source error", "", func() string { return n.MustStatus(t).SourceError })
	}

	if n.MustStatus(t).OpenConnections.Join {
		n.mustShortcut(t, early)
	} else if f := early.flow(t, n.MustFlows(t)); f.Paired || !strings.Contains(f.Message, "made before both pods took part") {
		t.Errorf("got %+v, want the first connection unpaired", f)
	}
	l.finish(t)
}

// notOnTCP returns the streams that are not on TCP both ways with what is wanted in their message.
func (n *node) notOnTCP(t testing.TB, streams []*stream, want string) (not string) {
	t.Helper()
	flows := n.MustFlows(t)
	for _, s := range streams {
		f := s.flow(t, flows)
		for _, d := range []*api.Direction{f.ToServer, f.ToClient} {
			if d == nil || d.Shortcut || !strings.Contains(d.Message, want) {
				not += fmt.Sprintf("%s: %+v\n", s.origDst, d)
			}
		}
	}
	return not
}

// mustMove waits until each direction of the streams has sent by the shortcut, or
// by TCP and nothing else.
func (n *node) mustMove(t testing.TB, what string, streams []*stream, shortcut bool) {
	t.Helper()
	before := n.MustFlows(t)
	mustBecome(t, what, "", func() (not string) {
		after := n.MustFlows(t)
		for _, s := range streams {
			old, now := s.flow(t, before), s.flow(t, after)
			for _, d := range [][2]*api.Direction{{old.ToServer, now.ToServer}, {old.ToClient, now.ToClient}} {
				byShortcut, byTCP := d[1].ShortcutBytes-d[0].ShortcutBytes, d[1].TCPBytes-d[0].TCPBytes
				moved := fmt.Sprintf("%s: %d bytes by the shortcut and %d by TCP: %+v\n", s.origDst, byShortcut, byTCP, d[1])
				if !shortcut && byShortcut > 0 {
					t.Fatalf("%s: to %s", what, moved)
				}
				if shortcut && byShortcut == 0 || !shortcut && byTCP == 0 {
					not += moved
				}
			}
		}
		return not
	})
}

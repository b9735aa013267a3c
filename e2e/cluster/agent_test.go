// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// inForce is how long a change of an annotation or a policy may take, as it was promised.
	inForce = time.Second
	// enabled opts a pod in.
	annotation, enabled, disabled = "podshunt.io/shortcut", "enabled", "disabled"
)

// status and flow are what podshunt-agent prints with -o json, as far as the
// suite looks at it.
type (
	status struct {
		Version, Kernel string
		Unloaded        bool
		NewConnections  struct{ Watched bool }
		OpenConnections struct {
			Join    bool
			Message string
		}
		Pods []struct {
			Pod      podRef
			Enrolled bool
			Message  string
		}
		Maps []struct {
			Name    string
			Entries int
		}
	}
	flow struct {
		Client, Server     flowEnd
		OrigDst            string `json:"originalDestination"`
		Paired             bool
		Reason, Message    string
		ToServer, ToClient *direction
	}
	flowList struct{ Items []flow }
	flowEnd  struct {
		Pod     podRef
		Address string
	}
	podRef    struct{ Namespace, Name string }
	direction struct {
		Shortcut                             bool
		Reason, Message                      string
		ShortcutBytes, TCPBytes, UnreadBytes int64
	}
)

// String returns what matters of a flow's way.
func (f flow) String() string {
	way := func(d *direction) string {
		if d == nil {
			return "-"
		}
		return fmt.Sprintf("shortcut=%v %s (%d by shortcut, %d by TCP)", d.Shortcut, d.Message, d.ShortcutBytes, d.TCPBytes)
	}
	return fmt.Sprintf("%s/%s %s -> %s/%s %s (%s): paired=%v %s; to server %s; to client %s", f.Client.Pod.Namespace, f.Client.Pod.Name,
		f.Client.Address, f.Server.Pod.Namespace, f.Server.Pod.Name, f.Server.Address, f.OrigDst, f.Paired, f.Message, way(f.ToServer), way(f.ToClient))
}

// show runs a command of podshunt-agent on the node, and decodes what it prints.
func show[T any](n *node, command string) (T, error) {
	var answer T
	out, err := n.output(stepTimeout, nil, n.cluster.agent, command, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &answer)
	}
	return answer, err
}

// flows returns the connections of the client to its server, as the agent of its node lists them.
func (t *traffic) flows() []flow {
	t.Helper()
	all, err := show[flowList](t.node, "flows")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all.Items, func(f flow) bool {
		return f.Client.Pod != podRef{t.namespace, t.client} || strings.HasSuffix(f.Server.Address, ":9090")
	})
}

// mustBecome waits until accept takes all of the client's flows, at least one,
// and returns how long that took. accept says what is wrong with one.
func (t *traffic) mustBecome(what string, within time.Duration, accept func(flow) bool) time.Duration {
	t.Helper()
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		asked := time.Now()
		flows := t.flows()
		if len(flows) > 0 && !slices.ContainsFunc(flows, func(f flow) bool { return !accept(f) }) {
			return asked.Sub(began)
		}
		if asked.Sub(began) > within {
			text := ""
			for _, f := range flows {
				text += "\n" + f.String()
			}
			t.Fatalf("%s: not %s after %v:%s", t.client, what, within, text)
		}
	}
}

func isShortcut(f flow) bool {
	return f.Paired && f.ToServer.Shortcut && f.ToClient.Shortcut
}

// mustBeShortcut returns when all of the client's connections take the shortcut
// both ways, and their counters agree with what the client has sent and
// received to the byte. It returns the share of bytes that took the shortcut.
func (t *traffic) mustBeShortcut() float64 {
	t.Helper()
	t.mustBecome("on the shortcut", settleTime, isShortcut)
	return t.mustBeCounted()
}

// settleTime is how long traffic may take to get from TCP onto the shortcut, on a busy machine.
const settleTime = 10 * time.Second

// mustBeCounted compares the counters of live connections with what the client
// has counted. None may have ended so far.
func (t *traffic) mustBeCounted() (share float64) {
	t.Helper()
	r := t.must("post", "pause")
	defer t.must("post", "resume")
	var toServer, toClient, byShortcut int64
	for _, f := range t.flows() {
		for total, d := range map[*int64]*direction{&toServer: f.ToServer, &toClient: f.ToClient} {
			if d == nil {
				t.Fatalf("not paired: %v", f)
			}
			*total += d.ShortcutBytes + d.TCPBytes
			byShortcut += d.ShortcutBytes
		}
	}
	if toServer != r.Sent || toClient != r.Received || byShortcut == 0 {
		t.Errorf("%s: the agent counts %d bytes to the server and %d to the client, %d by the shortcut; the client %d and %d",
			t.client, toServer, toClient, byShortcut, r.Sent, r.Received)
	}
	return float64(byShortcut) / float64(toServer+toClient)
}

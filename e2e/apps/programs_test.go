// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// bare shows what the advice is for.
var bare = flag.Bool("bare", false, "accept the kernel's hazards without the advice of docs/limits.md: some programs fail")

const (
	optedIn  = api.AnnotationShortcut + ": enabled"
	optedOut = api.AnnotationShortcut + ": disabled"

	// Reasons of the agent for a connection on TCP.
	notOptedIn = "pod_out"
	excluded   = "port_excluded"

	// Reasons of the agent for a direction on TCP.
	notSeen    = "not_seen"
	draining   = "draining"
	trial      = "trial"
	unobserved = "unobserved"
)

// program is one that people run, with what docs/limits.md says about it.
type program struct {
	name    string
	version string
	run     func(*stage)
	// stays is why all of it is on TCP with the default settings, where it is so.
	stays string
	// toProxy is set where the proxy reads by splice, if it is let: the reasons for
	// which what is sent to it stays on TCP.
	toProxy []string
	// hazards break the program, if the kernel has one of them and it is accepted.
	hazards []string
	// The advice for that case: annotations of one of the pods, which keep the
	// program on TCP, and the reason that the agent then shows.
	pod, annotations, reason string
}

// asksBeforeReading are the hazards of programs that use FIONREAD.
func asksBeforeReading() []string { return []string{"fionread-tcp", "fionread-redirected"} }

// exclude are the annotations of a pod that keeps one of its ports on TCP.
func exclude(port uint16) string {
	return fmt.Sprintf("%s, %s: '%d'", optedIn, api.AnnotationExcludePorts, port)
}

// namespace is where the pods of the program are.
func (p program) namespace() string {
	return strings.ToLower(strings.NewReplacer(",", "", " ", "-").Replace(p.name))
}

// advised reports whether a hazard of this kernel makes the advice necessary.
func (p program) advised(hazards []api.Hazard) bool {
	return !*bare && len(p.hazards) > 0 && fatal(hazards, p.hazards...)
}

// fatal reports whether a kernel has one of the named hazards, or with no name any
// hazard, and only refusing pods saves programs from it.
func fatal(hazards []api.Hazard, names ...string) bool {
	return slices.ContainsFunc(hazards, func(h api.Hazard) bool {
		return h.Present && h.Fatal && (names == nil || slices.Contains(names, h.Name))
	})
}

func programs() []program {
	splice, fionread := []string{"splice"}, asksBeforeReading()
	exclude := exclude(webPort)
	nginx, haproxy := version("nginx", "-v"), version("haproxy", "-v")
	newer := version(append(newerHAProxy(), "-v")...)
	return slices.Concat([]program{
		{name: "redis", version: version("redis-server", "--version"), run: redis, stays: blockingClient},
		{name: "memcached", version: version("memcached", "--version"), run: memcached},
		{name: "nginx, sendfile", version: nginx, run: nginxSendfile},
		{name: "nginx, no sendfile", version: nginx, run: nginxNoSendfile},
		{name: "nginx, wrk", version: nginx, run: nginxWrk},
		{name: "nginx, PUT", version: nginx, run: nginxPut, hazards: fionread, pod: "server", annotations: exclude, reason: excluded, stays: "sendfile"},
		{name: "nginx, proxy", version: nginx, run: nginxProxy, hazards: fionread, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "postgresql", version: version("postgres", "--version"), run: postgres},
		{name: "haproxy, TCP", version: haproxy, run: haproxyTCP},
		{name: "haproxy, TCP, splice", version: haproxy, run: haproxyTCPSplice, hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "haproxy, HTTP, splice", version: haproxy, run: haproxyHTTPSplice, hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "haproxy, TCP, POST", version: haproxy, run: haproxyPosts("mode tcp")},
		{name: "haproxy, TCP, splice, POST", version: haproxy, run: haproxyPosts("mode tcp", spliceAll), hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "haproxy, HTTP, POST", version: haproxy, run: haproxyPosts("mode http")},
		{name: "haproxy, HTTP, splice, POST", version: haproxy, run: haproxyPosts("mode http", spliceAll), hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "haproxy 3, HTTP, POST", version: newer, run: newerPosts("mode http")},
		{name: "haproxy 3, HTTP, splice, POST", version: newer, run: newerPosts("mode http", spliceAll), hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "nginx, proxy, buffering, POST", version: nginx, run: nginxPosts("on"), hazards: fionread, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "nginx, proxy, no buffering, POST", version: nginx, run: nginxPosts("off"), hazards: fionread, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "nginx, PUT of 20 MB", version: nginx, run: nginxPut20, hazards: fionread, pod: "server", annotations: exclude, reason: excluded, stays: "sendfile"},
		{name: "Go TCP proxy, POST", version: runtime.Version(), run: goCopyProxy, toProxy: []string{notSeen, trial}},
		{name: "Go SOCKS proxy, POST", version: runtime.Version(), run: goSocksProxy, hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "Python http.server, curl", version: version("python3", "--version"), run: pythonServer, stays: blocking},
		{name: "iperf3", version: version("iperf3", "--version"), run: iperf3, stays: blockingClient},
		{name: "Go HTTP proxy", version: runtime.Version(), run: goHTTPProxy},
		{name: "websocket by it", version: runtime.Version(), run: websockets},
		{name: "Go TCP proxy", version: runtime.Version(), run: goTCPProxy, toProxy: []string{notSeen, trial}},
		{name: "Go TCP proxy, peeking", version: runtime.Version(), run: goPeekingProxy, toProxy: []string{notSeen, draining, trial, unobserved}},
		{name: "Go CONNECT proxy", version: runtime.Version(), run: goConnectProxy, hazards: splice, pod: "proxy", annotations: optedOut, reason: notOptedIn},
		{name: "gRPC streams", version: grpc.Version, run: grpcStreams},
		{name: "gRPC, keepalive", version: grpc.Version, run: grpcKeepalive},
		{name: "OpenSSH", version: version("ssh", "-V"), run: openssh, stays: blockingClient},
		{name: "rsync", version: version("rsync", "--version"), run: rsync, stays: blockingClient},
	}, databases(), languages(), frontends(), brokers(), halfClosing(), encrypted())
}

var versionPattern = regexp.MustCompile(`[0-9]+(\.[0-9]+)+[^\s,)"]*`)

// version returns what a program says of itself, or why it does not.
func version(command ...string) string {
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if v := versionPattern.Find(out); v != nil {
		return string(v)
	}
	return fmt.Sprint(err)
}

// row is a line of the report. What was not run is empty.
type row struct {
	tcp, shortcut string
	traffic       traffic
	note          string
}

func TestPrograms(t *testing.T) {
	n, all := mustNode(t), programs()
	rows, answers := make([]row, len(all)), make([][]string, len(all))
	var hazards []api.Hazard

	t.Run("tcp", func(t *testing.T) {
		hazards = n.mustStart(t, map[string]string{"default/opted-in": optedIn}).Hazards
		n.mustRefuseFatal(t, hazards)
		for i, p := range all {
			t.Run(p.name, func(t *testing.T) {
				defer func() { rows[i].tcp = result(t) }()
				s := newStage(t, n, n.mustCast(t, p.namespace()))
				if got := s.perform(p); got != (traffic{}) {
					t.Errorf("got %+v, want nothing of pods that are not opted in", got)
				}
				answers[i] = s.answers
			})
		}
	})

	t.Run("shortcut", func(t *testing.T) {
		annotations := map[string]string{}
		for _, p := range all {
			for _, pod := range []string{"client", "proxy", "server"} {
				annotations[p.namespace()+"/"+pod] = optedIn
			}
			if p.advised(hazards) {
				annotations[p.namespace()+"/"+p.pod] = p.annotations
			}
		}
		n.mustStart(t, annotations, sandboxtest.AcceptFatal+",blocking-recv")
		for i, p := range all {
			r := &rows[i]
			t.Run(p.name, func(t *testing.T) {
				defer func() { r.shortcut = result(t) }()
				s := newStage(t, n, n.mustCast(t, p.namespace()))
				r.traffic = s.perform(p)
				if diff := gocmp.Diff(answers[i], s.answers); diff != "" {
					t.Errorf("answers (-tcp +shortcut):\n%s", diff)
				}
				flows := slices.DeleteFunc(n.MustFlows(t), func(f api.Flow) bool {
					return f.Client.Pod.Namespace != p.namespace()
				})
				switch {
				case p.advised(hazards):
					r.note = "kept on TCP: " + p.reason
					wantRefused(t, p.reason, r.traffic, flows)
				case r.traffic.shortcut == 0 && (p.stays == "" || p.stays == blockingClient):
					t.Errorf("got %+v, want some bytes by the shortcut", r.traffic)
				case p.toProxy != nil && fatal(hazards, "splice"):
					r.note = "what is sent to the proxy is on TCP: it reads by splice"
					wantSpliced(t, p.toProxy, flows)
				}
			})
		}
	})
	report(t, all, rows)
}

// mustRefuseFatal sees that an opted-in pod stays out as long as the kernel has
// fatal hazards and the settings are the default: it has what the programs have
// on TCP.
func (n *node) mustRefuseFatal(t *testing.T, hazards []api.Hazard) {
	t.Helper()
	p := sandboxtest.MustAddPod(t, n, "opted-in", sandbox.PodOptions{})
	for _, pod := range n.MustStatus(t).Pods {
		if want := !fatal(hazards); pod.Enrolled != want {
			t.Errorf("pod takes part: got %v (%s), want %v, as the kernel's hazards say: %+v", pod.Enrolled, pod.Message, want, hazards)
		}
	}
	if err := n.DelPod(p); err != nil {
		t.Fatal(err)
	}
}

// perform runs a program and returns what was counted meanwhile.
func (s *stage) perform(p program) traffic {
	s.Helper()
	before := s.node.MustStatus(s)
	p.run(s)
	return between(before, s.node.MustStatus(s))
}

// wantRefused sees that the advice was followed, and that the agent says so.
func wantRefused(t *testing.T, reason string, got traffic, flows []api.Flow) {
	t.Helper()
	if got != (traffic{}) {
		t.Errorf("got %+v, want all of it on TCP", got)
	}
	if len(flows) == 0 {
		t.Errorf("got no flow that is still open, want one with its reason")
	}
	for _, f := range flows {
		if f.Paired || f.Reason != reason {
			t.Errorf("got %+v, want it unpaired, because: %s", f, reason)
		}
	}
}

// wantSpliced sees that what is sent to the proxy stays on TCP for one of the
// reasons, and that the rest does not.
func wantSpliced(t *testing.T, reasons []string, flows []api.Flow) {
	t.Helper()
	if len(flows) == 0 {
		t.Errorf("got no flow that is still open, want those of the proxy")
	}
	for _, f := range flows {
		if !f.Paired {
			t.Errorf("got %+v, want it paired", f)
			continue
		}
		toProxy, fromProxy := f.ToServer, f.ToClient
		if f.Client.Pod.Name == "proxy" {
			toProxy, fromProxy = f.ToClient, f.ToServer
		}
		if toProxy.ShortcutBytes > 0 || !slices.Contains(reasons, toProxy.Reason) || fromProxy.ShortcutBytes == 0 {
			t.Errorf("got %+v to the proxy and %+v from it, want TCP (%q) and the shortcut", toProxy, fromProxy, reasons)
		}
	}
}

// result is what the report says of a test at its end.
func result(t *testing.T) string {
	if t.Failed() {
		return "FAILED"
	}
	return "ok"
}

func report(t *testing.T, all []program, rows []row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "program\tversion\tTCP\tshortcut\tby shortcut\tnote")
	for i, p := range all {
		r := rows[i]
		if r == (row{}) {
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", p.name, p.version, r.tcp, r.shortcut, r.traffic.share(), r.note)
	}
	if err := w.Flush(); err != nil {
		t.Error(err)
	}
}

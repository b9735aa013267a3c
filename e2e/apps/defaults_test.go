// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
)

var (
	list = flag.Bool("list", false, "print the names of all programs and end")
	only = flag.String("programs", "", "regular expression for the names of programs to run (default all)")
)

// outcome is what TestDefaults has found of a program on a kernel. hack/programs reads it.
type outcome struct {
	Program string `json:"program"`
	Version string `json:"version"`
	Kernel  string `json:"kernel"`
	// Works is true when all three runs were as they have to be.
	Works bool `json:"works"`
	// First and Again are the runs of pods that take part.
	First taken `json:"first"`
	Again taken `json:"again"`
}

// taken is the way that bytes of one run took.
type taken struct {
	// Sent is in bytes of paired connections, Shortcut what of them took the shortcut.
	Sent     uint64 `json:"sent"`
	Shortcut uint64 `json:"shortcut"`
	Paired   uint64 `json:"paired"`
	// Reasons are why the rest did not, the one of most bytes first, by `podshunt-agent flows` at the end of the run.
	Reasons []string `json:"reasons,omitempty"`
	// Counted are the kernel programs' own counters of messages and connections.
	Counted map[string]counted `json:"counted"`
	// UnsupportedPorts are the ports that are known not to fit, with the calls.
	Unsupported []string `json:"unsupportedPorts,omitempty"`
}

type counted struct {
	Count uint64 `json:"count"`
	Bytes uint64 `json:"bytes,omitempty"`
}

// TestDefaults runs each program on a node whose agent has the default settings:
// first with its pods opted out, then with new ones that are opted in, of which
// nothing is known, and then once more with those, with what that has taught. All
// three times the program has to deliver the same.
//
// It is for kernels on which pods take part by default.
func TestDefaults(t *testing.T) {
	wanted, err := regexp.Compile(*only)
	if err != nil {
		t.Fatalf("-programs: %v", err)
	}
	chosen := slices.DeleteFunc(programs(), func(p program) bool { return !wanted.MatchString(p.name) })
	if len(chosen) == 0 {
		t.Fatalf("no program has a name that matches %q", *only)
	}
	annotations := map[string]string{}
	for _, p := range chosen {
		for _, pod := range []string{"client", "proxy", "server"} {
			annotations[p.namespace()+"/"+pod] = optedIn
		}
	}
	n := mustNode(t)
	n.mustStart(t, annotations)
	for _, p := range chosen {
		t.Run(p.name, func(t *testing.T) { p.defaults(t, n) })
	}
}

func (p program) defaults(t *testing.T, n *node) {
	o := outcome{Program: p.name, Version: p.version, Kernel: kernel(t)}
	defer func() {
		o.Works = !t.Failed()
		text, err := json.Marshal(o)
		if err != nil {
			t.Error(err)
		}
		fmt.Printf("outcome %s\n", text)
	}()

	var answers []string
	if !t.Run("tcp", func(t *testing.T) {
		s := newStage(t, n, n.mustCast(t, p.namespace()+"-opted-out"))
		if got := s.perform(p); got != (traffic{}) {
			t.Errorf("got %+v, want nothing of pods that are not opted in", got)
		}
		answers = s.answers
	}) {
		return
	}
	pods := n.mustCast(t, p.namespace())
	for _, pod := range n.MustStatus(t).Pods {
		if !pod.Enrolled {
			t.Fatalf("a pod does not take part: %+v", pod)
		}
	}
	for i, name := range []string{"first", "again"} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, n, pods)
			before := n.MustStatus(t)
			// Of a run that fails, too.
			defer func() { *[]*taken{&o.First, &o.Again}[i] = s.taken(before) }()
			p.run(s)
			if diff := gocmp.Diff(answers, s.answers); diff != "" {
				s.logFlows()
				t.Errorf("answers (-tcp +%s):\n%s", name, diff)
			}
		})
	}
	if !t.Failed() && o.First.Shortcut+o.Again.Shortcut == 0 && p.stays == "" {
		t.Errorf("got %+v and then %+v, want some bytes by the shortcut", o.First, o.Again)
	}
}

// taken is what has been counted since a status.
func (s *stage) taken(before api.Status) taken {
	after := s.node.MustStatus(s)
	sum := between(before, after)
	way := taken{Sent: sum.sent, Shortcut: sum.shortcut, Paired: sum.paired, Counted: map[string]counted{}}
	for i, o := range after.Outcomes { // in a fixed order
		if c := (counted{o.Count - before.Outcomes[i].Count, o.Bytes - before.Outcomes[i].Bytes}); c != (counted{}) {
			way.Counted[o.String()] = c
		}
	}
	for _, m := range after.UnsupportedPorts {
		unsupported := fmt.Sprintf("%s:%d %s", m.Pod.Name, m.Port, strings.Join(m.Reasons, ", "))
		if m.Client != nil {
			unsupported += " by " + m.Client.Name
		}
		way.Unsupported = append(way.Unsupported, unsupported)
	}
	bytesBy := map[string]uint64{}
	for _, f := range s.node.MustFlows(s) {
		if !f.Paired {
			bytesBy[f.Message]++
			continue
		}
		for _, d := range []*api.Direction{f.ToServer, f.ToClient} {
			if d != nil && d.TCPBytes > 0 {
				bytesBy[d.Message] += d.TCPBytes
			}
		}
	}
	for reason := range bytesBy {
		way.Reasons = append(way.Reasons, reason)
	}
	slices.SortFunc(way.Reasons, func(a, b string) int {
		return cmp.Or(cmp.Compare(bytesBy[b], bytesBy[a]), cmp.Compare(a, b))
	})
	return way
}

// debian matches the version of Debian's kernels, which their release does not tell.
var debian = regexp.MustCompile(`Debian ([0-9.]+)`)

// kernel is the running kernel's version.
func kernel(t *testing.T) string {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	if match := debian.FindStringSubmatch(unix.ByteSliceToString(name.Version[:])); match != nil {
		return match[1]
	}
	return unix.ByteSliceToString(name.Release[:])
}

// printPrograms is what -list is for.
func printPrograms() {
	for _, p := range programs() {
		fmt.Fprintln(os.Stdout, p.name)
	}
}

// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

const (
	uid1 = "11111111-1111-4111-8111-111111111111"
	uid2 = "22222222-2222-4222-8222-222222222222"
	hash = "0123456789abcdef0123456789abcdef"
)

// fakeSource is a source that the test sets.
type fakeSource struct {
	mu      sync.Mutex
	content *Content
	err     error
	changed chan struct{}
}

func (s *fakeSource) Content() (*Content, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.content, s.err
}

func (s *fakeSource) Changed() <-chan struct{} { return s.changed }

func (s *fakeSource) String() string { return "the API server" }

// set makes the source know the pods by name, all in the namespace default.
func (s *fakeSource) set(pods map[string]Intent) {
	content := &Content{Pods: map[string]Intent{}, Unlisted: "not known to the API server"}
	for name, w := range pods {
		content.Pods["default/"+name] = w
	}
	s.mu.Lock()
	s.content, s.err = content, nil
	s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// enabled is the intent of an opted-in pod that has its network.
func enabled(uids ...string) Intent {
	return Intent{
		UIDs: uids, Settings: api.Settings{Enabled: true},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
	}
}

func newClusterFixture(t testing.TB, change func(*Config)) (*fixture, *fakeSource) {
	t.Helper()
	source := &fakeSource{changed: make(chan struct{}, 1)}
	f := newFixture(t, func(cfg *Config, _ *fakeKernel) {
		cfg.Source = source
		if change != nil {
			change(cfg)
		}
	})
	// The first process of the node, with its mounts.
	first := filepath.Join(f.cfg.Proc, "1")
	for _, dir := range []string{"root/cg/kubepods", "root/cg/open"} {
		if err := os.MkdirAll(filepath.Join(first, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(first, "root/cg/open"), 0o777); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(first, "mountinfo"), "41 31 0:38 / /cg rw - cgroup2 cgroup2 rw\n")
	return f, source
}

// process makes a process of a pod.
func (f *fixture) process(t testing.TB, pid int, uid string, cookie uint64) {
	t.Helper()
	f.processIn(t, pid, "/kubepods/pod"+uid+"/c", cookie)
}

func (f *fixture) processIn(t testing.TB, pid int, cgroup string, cookie uint64) {
	t.Helper()
	dir := filepath.Join(f.cfg.Proc, fmt.Sprint(pid))
	if err := os.MkdirAll(filepath.Join(dir, "ns"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "cgroup"), "0::"+cgroup+"\n")
	write(t, filepath.Join(dir, "stat"), fmt.Sprintf("%d (c) S %s%d\n", pid, strings.Repeat("0 ", 18), pid))
	write(t, filepath.Join(dir, "ns", "net"), fmt.Sprint(cookie))
}

func (f *fixture) kill(t testing.TB, pid int) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(f.cfg.Proc, fmt.Sprint(pid))); err != nil {
		t.Fatal(err)
	}
}

func TestUIDs(t *testing.T) {
	for _, tc := range []struct {
		name, uid string
		intent    []string
		want      api.Admission
	}{
		{"same", uid1, []string{uid1}, api.Admission{Enrolled: true}},
		{"static pod", hash, []string{uid1, hash}, api.Admission{Enrolled: true}},
		{"not given by the runtime", "", []string{uid1}, api.Admission{Enrolled: true}},
		{"recreated under its name", uid1, []string{uid2}, api.Admission{Message: "another pod of the same name is known to the API server"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, source := newClusterFixture(t, nil)
			source.set(map[string]Intent{"db-0": enabled(tc.intent...)})
			a := f.attachment(t, "db-0", 10)
			a.Pod.UID = tc.uid
			wantDiff(t, "admission", tc.want, f.mustPut(t, a))
		})
	}
}

// A StatefulSet makes its pod again: the attachments of both are there for a while.
func TestRecreatedPod(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	source.set(map[string]Intent{"db-0": enabled(uid1)})
	old := f.attachment(t, "db-0", 10)
	old.Pod.UID = uid1
	f.mustPut(t, old)
	wantDiff(t, "enrolled", []uint64{10}, f.kernel.enrolled)

	// The runtime is ahead of the API server.
	next := f.attachment(t, "db-0", 20)
	next.ContainerID, next.Pod.UID = "next", uid2
	wantDiff(t, "admission", api.Admission{Message: "another pod of the same name is known to the API server"}, f.mustPut(t, next))

	source.set(map[string]Intent{"db-0": enabled(uid2)})
	f.Sync()
	wantDiff(t, "enrolled", []uint64{20}, f.kernel.enrolled)
	if err := f.Remove(old.AttachmentID); err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "enrolled after DEL of the old one", []uint64{20}, f.kernel.enrolled)
}

func TestPodOlderThanPlugin(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	f.process(t, 100, uid1, 10)
	f.process(t, 101, uid1, 11)
	f.process(t, 102, hash, 12)
	f.process(t, 103, uid2, 13)
	host := enabled("host")
	hostNetwork := HostNetwork()
	host.Excluded = &hostNetwork
	finished := enabled("finished")
	finished.Excluded = &Standing{api.PodOut, api.PodFinished, "it has finished"}
	starting := enabled("starting")
	starting.Addresses = nil
	source.set(map[string]Intent{
		"web": enabled(uid1), "static": enabled("api", hash), "out": {UIDs: []string{uid2}},
		"host": host, "finished": finished, "starting": starting, "hidden": enabled("hidden"),
	})
	f.Sync()
	wantDiff(t, "states", map[string]string{
		"web": "in", "static": "in", "host": "out " + hostNetwork.Message,
		"starting": "out waiting for its network", "hidden": "out no process of the pod has been found yet",
	}, f.states())
	wantDiff(t, "codes", map[string]api.PodState{
		"web": api.PodEnrolled, "static": api.PodEnrolled, "host": api.PodRefused, "starting": api.PodWaiting, "hidden": api.PodWaiting,
	}, f.codes())
	slices.Sort(f.kernel.enrolled)
	wantDiff(t, "enrolled", []uint64{10, 12}, f.kernel.enrolled)
	for _, p := range f.Snapshot().Pods {
		if p.Pod.Name == "web" {
			wantDiff(t, "status", api.PodStatus{
				Pod:   api.PodRef{Namespace: "default", Name: "web", UID: uid1},
				Netns: filepath.Join(f.cfg.Proc, "100", "ns", "net"), NetnsCookie: 10, State: api.PodEnrolled, Enrolled: true,
			}, withoutAddresses(p.PodStatus))
		}
	}
	f.take()

	// Opted out and in again.
	source.set(map[string]Intent{"web": {UIDs: []string{uid1}}})
	f.Sync()
	wantDiff(t, "states", map[string]string{"web": "out not opted in by podshunt.io/shortcut"}, f.states())
	wantDiff(t, "enrolled", []uint64{}, f.kernel.enrolled)
	source.set(map[string]Intent{"web": enabled(uid1)})
	f.Sync()
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())

	// An attachment takes over without a gap.
	f.take()
	a := f.attachment(t, "web", 10)
	a.Pod.UID = uid1
	wantDiff(t, "admission", api.Admission{Enrolled: true}, f.mustPut(t, a))
	wantDiff(t, "calls", []string(nil), f.take())
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
}

// Two pods claim one UID, one of them before and one after it was found by it: it
// is nobody's, so that neither gets the other's network namespace.
func TestUIDClaimedTwice(t *testing.T) {
	const contested = "out another pod of this node claims its UID, so that its processes are not known"
	f, source := newClusterFixture(t, nil)
	f.process(t, 100, hash, 10)
	f.process(t, 101, uid1, 11)
	victim := enabled("victim", hash)
	victim.Settings = api.Settings{} // it has not opted in
	source.set(map[string]Intent{"victim": victim, "thief": enabled(uid1, hash), "pure-thief": enabled(hash)})
	f.Sync()
	// The thief is found by what is its own.
	wantDiff(t, "states", map[string]string{"thief": "in", "pure-thief": contested}, f.states())
	wantDiff(t, "codes", map[string]api.PodState{"thief": api.PodEnrolled, "pure-thief": api.PodRefused}, f.codes())
	wantDiff(t, "enrolled", []uint64{11}, f.kernel.enrolled)

	source.set(map[string]Intent{"victim": enabled(hash)})
	f.now = f.now.Add(2 * searchInterval)
	f.Sync()
	wantDiff(t, "states", map[string]string{"victim": "in"}, f.states())
	wantDiff(t, "enrolled", []uint64{10}, f.kernel.enrolled)
	source.set(map[string]Intent{"victim": enabled(hash), "thief": enabled(uid1, hash)})
	f.now = f.now.Add(2 * searchInterval)
	f.Sync()
	wantDiff(t, "states", map[string]string{"victim": contested, "thief": "in"}, f.states())
	wantDiff(t, "enrolled", []uint64{11}, f.kernel.enrolled)
}

// A user of the node has made a cgroup that is named as the pod's is.
func TestForgedCgroup(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	f.processIn(t, 100, "/open/pod"+uid1+"/c", 10)
	source.set(map[string]Intent{"web": enabled(uid1)})
	f.Sync()
	wantDiff(t, "states", map[string]string{"web": "out no process of the pod has been found yet, and one in a cgroup with its name does not count: " +
		"others than root may make cgroups in " + filepath.Join(f.cfg.Proc, "1/root/cg/open") +
		fmt.Sprintf(": its owner is %d, its mode 0777", os.Geteuid())}, f.states())
	wantDiff(t, "enrolled", []uint64(nil), f.kernel.enrolled)

	f.process(t, 101, uid1, 11)
	f.now = f.now.Add(2 * searchInterval)
	f.Sync()
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
	wantDiff(t, "enrolled", []uint64{11}, f.kernel.enrolled)

	// It ends, and the other is all there is again.
	f.kill(t, 101)
	f.now = f.now.Add(2 * searchInterval)
	f.Sync()
	wantDiff(t, "enrolled", []uint64{}, f.kernel.enrolled)
	f.kill(t, 100)
	f.now = f.now.Add(4 * searchInterval)
	f.Sync()
	wantDiff(t, "states", map[string]string{"web": "out no process of the pod has been found yet"}, f.states())
}

// A process of the pod's own UID comes before one of the hash that it has, too.
func TestOwnUIDFirst(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	f.process(t, 100, hash, 10)
	f.process(t, 101, uid1, 11)
	source.set(map[string]Intent{"web": enabled(uid1, hash)})
	f.Sync()
	wantDiff(t, "enrolled", []uint64{11}, f.kernel.enrolled)
}

func withoutAddresses(s api.PodStatus) api.PodStatus {
	s.Addresses = nil
	return s
}

// An agent that starts again finds first what an earlier one had found.
func TestRestartKeepsFoundPods(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	f.process(t, 100, uid1, 10)
	f.enrolled[10], f.enrolled[99] = false, false
	source.set(map[string]Intent{"web": enabled(uid1), "late": enabled(uid2)})
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 1", "enrol 10", "release 99"}, f.take())

	// After that no start of a pod waits for a search.
	wantDiff(t, "admission", api.Admission{Enrolled: true}, f.mustPut(t, f.attachment(t, "late", 20)))
}

func TestFoundProcessEnds(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	f.process(t, 100, uid1, 10)
	source.set(map[string]Intent{"web": enabled(uid1)})
	f.Sync()
	f.take()

	// Another process of the pod is in the same namespace: nothing changes for it.
	f.process(t, 101, uid1, 10)
	f.kill(t, 100)
	f.Sync()
	f.now = f.now.Add(searchInterval)
	f.Sync()
	wantDiff(t, "calls", []string(nil), f.take())
	wantDiff(t, "netns", filepath.Join(f.cfg.Proc, "101", "ns", "net"), f.Snapshot().Pods[0].Netns)

	// Its number is given to a process of another pod.
	f.process(t, 101, uid2, 20)
	f.now = f.now.Add(searchInterval)
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 0", "release 10"}, f.take())
	wantDiff(t, "states", map[string]string{"web": "out no process of the pod has been found yet"}, f.states())

	// Opted out, it is not looked for, nor is anything said of it.
	source.set(map[string]Intent{"web": {UIDs: []string{uid1}}})
	f.Sync()
	wantDiff(t, "states", map[string]string{}, f.states())

	// The pod has a new sandbox.
	source.set(map[string]Intent{"web": enabled(uid1)})
	f.process(t, 102, uid1, 30)
	f.now = f.now.Add(2 * searchInterval)
	f.Sync()
	wantDiff(t, "calls", []string{"policy of 1", "enrol 30"}, f.take())
}

// A pod that is not found is looked for less and less often.
func TestSearchBacksOff(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	looks := 0
	f.cfg.NetnsCookie = readCookie
	f.finder.NetnsCookie = func(string) (uint64, error) {
		looks++
		return 0, errors.New("not now")
	}
	f.process(t, 100, uid1, 10)
	source.set(map[string]Intent{"web": enabled(uid1)})
	for range 4 * 600 {
		f.Sync()
		f.now = f.now.Add(250 * time.Millisecond)
	}
	// After 0, 1, 3, 7, 15, 31, 63 s, and then every minute.
	if want := 7 + 8; looks != want {
		t.Errorf("got %d looks in ten minutes, want %d", looks, want)
	}
}

func TestPolicyInput(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	w := enabled(uid1)
	w.Labels = map[string]string{"app": "web"}
	w.Ports = []policy.NamedPort{{Name: "http", Number: 80}}
	w.Bandwidth = "kubernetes.io/ingress-bandwidth"
	source.set(map[string]Intent{"web": w})
	source.content.Cluster = policy.Cluster{
		Namespaces: map[string]map[string]string{"default": nil},
		Policies:   []*networkingv1.NetworkPolicy{{}},
	}
	a := f.attachment(t, "web", 10)
	a.Addresses = []netip.Addr{netip.MustParseAddr("10.9.9.9")}
	f.mustPut(t, a)
	got := f.Snapshot()
	want := policy.Pod{
		ID: 10, Namespace: "default", Name: "web", Labels: w.Labels,
		Ports: w.Ports, Settings: w.Settings, Bandwidth: w.Bandwidth,
	}
	if fmt.Sprint(got.Pods[0].Policy) != fmt.Sprint(want) {
		t.Errorf("got %+v, want %+v", got.Pods[0].Policy, want)
	}
	wantDiff(t, "cluster", source.content.Cluster, got.Cluster)
}

func TestSourceAway(t *testing.T) {
	f, source := newClusterFixture(t, nil)
	a := f.attachment(t, "web", 10)
	wantDiff(t, "admission", api.Admission{Message: "waiting for the API server"}, f.mustPut(t, a))
	source.err = errors.New("refused")
	wantDiff(t, "admission", api.Admission{Message: "waiting for the API server: refused"}, f.mustPut(t, a))
	source.set(map[string]Intent{"web": enabled(uid1)})
	f.Sync()
	source.err = errors.New("refused again")
	f.Sync()
	wantDiff(t, "states", map[string]string{"web": "in"}, f.states())
	wantDiff(t, "source error", source.err.Error(), f.Snapshot().SourceError.Error())
}

func TestReport(t *testing.T) {
	var got []string
	f, source := newClusterFixture(t, func(cfg *Config) {
		cfg.Report = func(pods []Pod) {
			for _, p := range pods {
				got = append(got, strings.TrimSpace(fmt.Sprint(p.Pod.Name, " ", p.Reason)))
			}
		}
	})
	bad, host := enabled("bad"), enabled("host")
	bad.Err, bad.Settings = errors.New("bad"), api.Settings{}
	hostNetwork := HostNetwork()
	host.Excluded = &hostNetwork
	f.kernel.enrolErr = errors.New("map full")
	source.set(map[string]Intent{"bad": bad, "host": host, "web": enabled(uid1), "out": {UIDs: []string{uid2}}})
	f.mustPut(t, f.attachment(t, "web", 10))
	want := []string{"web enrol_failed", "bad invalid_annotation", "host host_network"}
	wantDiff(t, "report", want, got)
	f.Sync()
	wantDiff(t, "reports without a change", want, got)

	got, f.kernel.enrolErr = nil, nil
	f.Sync()
	wantDiff(t, "report", []string{"web", "bad invalid_annotation", "host host_network"}, got)
}

func TestReportOfRefusedKernel(t *testing.T) {
	var got []string
	f, source := newClusterFixture(t, func(cfg *Config) {
		cfg.Refused, cfg.Refusal = true, "hazard"
		cfg.Report = func(pods []Pod) {
			for _, p := range pods {
				got = append(got, fmt.Sprint(p.Pod.Name, " ", p.State, " ", p.Reason, " ", p.Message))
			}
		}
	})
	source.set(map[string]Intent{"web": enabled(uid1), "out": {UIDs: []string{uid2}}})
	f.mustPut(t, f.attachment(t, "out", 11))
	slices.Sort(got)
	wantDiff(t, "report", []string{"out out kernel_refused hazard", "web refused kernel_refused hazard"}, got)
}

// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// apiServer answers what the agent asks an API server, out of a log of changes.
type apiServer struct {
	*httptest.Server
	stop    func()        // for good
	stopped chan struct{} // closed by stop

	mu      sync.Mutex
	log     []change
	grown   chan struct{} // closed when log grows
	unknown []string      // requests that an agent has no business to make
	events  []string
}

// change is an event of a watch; its resource version is its place in the log.
type change struct {
	resource string
	Type     string        `json:"type"`
	Object   metav1.Object `json:"object"`
}

func newAPIServer(t testing.TB) *apiServer {
	s := &apiServer{grown: make(chan struct{}), stopped: make(chan struct{})}
	s.Server = httptest.NewServer(s)
	s.stop = sync.OnceFunc(func() {
		close(s.stopped) // Close waits for the watches
		s.CloseClientConnections()
		s.Close()
	})
	t.Cleanup(s.stop)
	return s
}

// mustKubeconfig writes a kubeconfig file for the server.
func (s *apiServer) mustKubeconfig(t testing.TB) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, clusters: [{name: c, cluster: {server: %q}}],
		contexts: [{name: c, context: {cluster: c}}], current-context: c}`, s.URL)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// put makes a change; its object must not be used after it.
func (s *apiServer) put(verb, resource string, object metav1.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	object.SetResourceVersion(strconv.Itoa(len(s.log) + 1))
	s.log = append(s.log, change{resource, verb, object})
	close(s.grown)
	s.grown = make(chan struct{})
}

// since returns the changes after a resource version, the present one, and what is
// closed when there are more.
func (s *apiServer) since(resource string, version int) (changes []change, now int, grown <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.log[version:] {
		if c.resource == resource {
			changes = append(changes, c)
		}
	}
	return changes, len(s.log), s.grown
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	query, resource := r.URL.Query(), path.Base(r.URL.Path)
	kind := map[string]string{
		"/api/v1/pods": "PodList", "/api/v1/namespaces": "NamespaceList",
		"/apis/networking.k8s.io/v1/networkpolicies": "NetworkPolicyList",
	}[r.URL.Path]
	switch {
	case r.Method == http.MethodPost && resource == "events":
		s.addEvent(w, r)
	case r.Method != http.MethodGet || kind == "" || resource == "pods" && query.Get("fieldSelector") != "spec.nodeName=node-1":
		s.mu.Lock()
		s.unknown = append(s.unknown, r.Method+" "+r.URL.String())
		s.mu.Unlock()
		http.NotFound(w, r)
	case query.Get("sendInitialEvents") != "":
		http.Error(w, "lists are not streamed", http.StatusBadRequest)
	case query.Get("watch") != "":
		version, err := strconv.Atoi(query.Get("resourceVersion"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		s.watch(w, r, resource, version)
	default:
		s.list(w, resource, kind)
	}
}

func (s *apiServer) list(w http.ResponseWriter, resource, kind string) {
	changes, now, _ := s.since(resource, 0)
	objects := map[string]metav1.Object{}
	for _, c := range changes {
		objects[c.Object.GetNamespace()+"/"+c.Object.GetName()] = c.Object
		if c.Type == "DELETED" {
			delete(objects, c.Object.GetNamespace()+"/"+c.Object.GetName())
		}
	}
	items := []metav1.Object{}
	for _, o := range objects {
		items = append(items, o)
	}
	version := "v1"
	if resource == "networkpolicies" {
		version = "networking.k8s.io/v1"
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"kind": kind, "apiVersion": version, "items": items, "metadata": map[string]string{"resourceVersion": strconv.Itoa(now)},
	})
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, resource string, version int) {
	for {
		changes, now, grown := s.since(resource, version)
		for _, c := range changes {
			if json.NewEncoder(w).Encode(c) != nil {
				return
			}
		}
		w.(http.Flusher).Flush()
		version = now
		select {
		case <-grown:
		case <-r.Context().Done():
			return
		case <-s.stopped:
			return
		}
	}
}

func (s *apiServer) addEvent(w http.ResponseWriter, r *http.Request) {
	var e corev1.Event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	s.events = append(s.events, fmt.Sprintf("%s %s: %s", e.InvolvedObject.Name, e.Reason, e.Message))
	s.mu.Unlock()
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(e)
}

// clusterPod is the object of a pod of the sandbox.
func clusterPod(p *sandbox.Pod, annotations map[string]string) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID), Labels: map[string]string{"app": p.Name}, Annotations: annotations},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: p.IPv4.String()}}},
	}
}

// mustRunProcess runs a process in the pod and in a cgroup as a kubelet makes it.
func (a *agent) mustRunProcess(t testing.TB, p *sandbox.Pod) {
	t.Helper()
	cgroup, err := a.AddCgroup("kubepods/burstable/pod" + p.UID + "/c1")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "300")
	if err := sandbox.StartIn(cgroup, p.Start, cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func TestCluster(t *testing.T) {
	a := mustAgent(t)
	server := newAPIServer(t)
	a.Source = []string{"--node-name=node-1", "--kubeconfig=" + server.mustKubeconfig(t)}
	on := map[string]string{api.AnnotationShortcut: "enabled"}

	// The first pod is older than podshunt: nothing tells of it.
	old := sandboxtest.MustAddPod(t, a, "old", sandbox.PodOptions{UID: "0f1e2d3c-1111-4222-8333-444455556666"})
	a.mustRunProcess(t, old)
	if err := os.RemoveAll(a.AttachmentsDir); err != nil {
		t.Fatal(err)
	}
	server.put("ADDED", "namespaces", &corev1.Namespace{
		TypeMeta: metav1.TypeMeta{Kind: "Namespace", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "default", Annotations: on},
	})
	server.put("ADDED", "pods", clusterPod(old, nil))
	bad := &sandbox.Pod{Namespace: "default", Name: "bad", UID: "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee", IPv4: netip.MustParseAddr("192.0.2.1")}
	server.put("ADDED", "pods", clusterPod(bad, map[string]string{api.AnnotationPorts: "http"}))
	a.mustStart(t, sandboxtest.AcceptFatal)
	web := sandboxtest.MustAddPod(t, a, "web", sandbox.PodOptions{UID: "12345678-1111-4222-8333-444455556666"})
	server.put("ADDED", "pods", clusterPod(web, on))
	sandboxtest.WaitFor(t, "pods", func() []string { return a.MustStates(t) }, func(s []string) bool {
		return len(s) == 3 && strings.HasPrefix(s[0], "bad: annotation podshunt.io/ports") && s[1] == "old: takes part" && s[2] == "web: takes part"
	})
	c := mustConnect(t, old, web, sandboxtest.MustListen(t, web, "tcp4", ":0"))
	c.mustPing(t)
	if f := c.flow(t, a); !shortcut(f) || f.Client.Pod.UID != old.UID || f.Server.Pod.UID != web.UID {
		t.Errorf("got %+v, want a shortcut from old to web", f)
	}

	// A NetworkPolicy moves the live connection to TCP and is named.
	deny := func() *networkingv1.NetworkPolicy {
		return &networkingv1.NetworkPolicy{
			TypeMeta:   metav1.TypeMeta{Kind: "NetworkPolicy", APIVersion: "networking.k8s.io/v1"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "deny-all"},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
				PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			},
		}
	}
	ping := func() api.Flow { c.mustPing(t); return c.flow(t, a) }
	server.put("ADDED", "networkpolicies", deny())
	sandboxtest.WaitFor(t, "NetworkPolicy", ping, func(f api.Flow) bool {
		return !f.ToServer.Shortcut && !f.ToClient.Shortcut && strings.Contains(f.ToServer.Message, "NetworkPolicy default/deny-all")
	})
	server.put("DELETED", "networkpolicies", deny())
	sandboxtest.WaitFor(t, "NetworkPolicy deleted", ping, shortcut)

	// Opted out of the namespace's default, and in again.
	server.put("MODIFIED", "pods", clusterPod(old, map[string]string{api.AnnotationShortcut: "disabled"}))
	sandboxtest.WaitFor(t, "opted out", ping, func(f api.Flow) bool {
		return !f.ToServer.Shortcut && !f.ToClient.Shortcut && f.ToServer.Message == "not allowed (default/old: not opted in by podshunt.io/shortcut)"
	})
	server.put("MODIFIED", "pods", clusterPod(old, nil))
	sandboxtest.WaitFor(t, "opted in again", ping, shortcut)

	sent := func() []string {
		server.mu.Lock()
		defer server.mu.Unlock()
		return slices.Clone(server.events)
	}
	wantDiff(t, "events", []string{
		`bad InvalidAnnotation: stays on TCP: annotation podshunt.io/ports="http": "http" is not a port or a range: ` +
			`accepted are ports from 1 to 65535 and ranges, separated by commas, such as "6379,8000-8010"`,
	}, sandboxtest.WaitFor(t, "event", sent, func(events []string) bool { return len(events) > 0 }))

	// Without the API server what is known goes on.
	server.stop()
	status := sandboxtest.WaitFor(t, "source error", func() api.Status { return a.MustStatus(t) }, func(s api.Status) bool { return s.SourceError != "" })
	if !strings.HasPrefix(status.SourceError, "not up to date since 2") {
		t.Errorf("got source error %q, want it to say since when", status.SourceError)
	}
	if f := ping(); !shortcut(f) {
		t.Errorf("got %+v without the API server, want it on the shortcut", f)
	}

	server.mu.Lock()
	defer server.mu.Unlock()
	wantDiff(t, "other requests", []string(nil), server.unknown)
}

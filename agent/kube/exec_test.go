// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Channels of v5.channel.k8s.io, the first byte of each message.
const (
	channelStdout = 1
	channelStderr = 2
	channelError  = 3
)

// mustServeExec serves the pods and their exec, and returns a kubeconfig. An
// exec prints its command to stdout and the pod's name to stderr, fails in pods
// named "bad" and does not end in pods named "slow".
func mustServeExec(t testing.TB, pods ...corev1.Pod) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/namespaces/shunt/pods", func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.Query().Get("labelSelector"); got != "app=agent" {
			t.Errorf("got selector %q, want app=agent", got)
		}
		w.Header().Set("Content-Type", "application/json")
		list := corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: pods}
		if err := json.NewEncoder(w).Encode(list); err != nil {
			t.Error(err)
		}
	})
	mux.HandleFunc("GET /api/v1/nodes", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}}
		for name, status := range map[string]corev1.ConditionStatus{"node-good": corev1.ConditionTrue, "node-lost": corev1.ConditionUnknown} {
			list.Items = append(list.Items, corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status, Reason: "NodeStatusUnknown"}},
			}})
		}
		if err := json.NewEncoder(w).Encode(list); err != nil {
			t.Error(err)
		}
	})
	mux.HandleFunc("GET /api/v1/namespaces/shunt/pods/{pod}/exec", func(w http.ResponseWriter, r *http.Request) {
		conn, err := (&websocket.Upgrader{Subprotocols: []string{"v5.channel.k8s.io"}}).Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		pod, query := r.PathValue("pod"), r.URL.Query()
		if pod == "slow" {
			_, _, _ = conn.ReadMessage() // until the client gives up
			return
		}
		status := metav1.Status{Status: metav1.StatusSuccess}
		if pod == "bad" {
			status = metav1.Status{
				Status: metav1.StatusFailure, Reason: "NonZeroExitCode",
				Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: "1"}}},
			}
		}
		end, err := json.Marshal(status)
		if err != nil {
			t.Error(err)
		}
		for channel, text := range map[byte]string{
			channelStdout: query.Get("container") + ": " + strings.Join(query["command"], " ") + "\n",
			channelStderr: pod + "\n",
		} {
			if err := conn.WriteMessage(websocket.BinaryMessage, append([]byte{channel}, text...)); err != nil {
				t.Error(err)
			}
		}
		if err := conn.WriteMessage(websocket.BinaryMessage, append([]byte{channelError}, end...)); err != nil {
			t.Error(err)
		}
		normal := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
		if err := conn.WriteMessage(websocket.CloseMessage, normal); err != nil {
			t.Error(err)
		}
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	config := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c}}],
clusters: [{name: c, cluster: {server: "%s"}}]}`, server.URL)
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func agentPod(name string, phase corev1.PodPhase) corev1.Pod {
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shunt", Name: name},
		Spec:       corev1.PodSpec{NodeName: "node-" + name},
		Status:     corev1.PodStatus{Phase: phase},
	}
}

func TestExec(t *testing.T) {
	type result struct{ Node, Pod, Output, Err, Absent string }
	unscheduled := agentPod("unscheduled", corev1.PodPending)
	unscheduled.Spec = corev1.PodSpec{Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
		RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"node-full"}}},
		}}},
	}}}
	waiting := agentPod("waiting", corev1.PodPending)
	waiting.Status.InitContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff"}}}}
	var got []result
	run := func(timeout time.Duration, agents ...corev1.Pod) {
		exec := Exec{
			Kubeconfig: mustServeExec(t, agents...), Namespace: "shunt", Selector: "app=agent", Container: "agent",
			Command: []string{"podshunt-agent", "uninstall"}, Parallel: 2, PodTimeout: timeout,
		}
		if err := exec.Run(t.Context(), func(r ExecResult) {
			text := ""
			if r.Err != nil {
				text = r.Err.Error()
			}
			got = append(got, result{r.Node, r.Pod, r.Output, text, r.Absent})
		}); err != nil {
			t.Fatal(err)
		}
	}
	run(time.Minute, agentPod("good", corev1.PodRunning), agentPod("bad", corev1.PodRunning), agentPod("lost", corev1.PodRunning), unscheduled, waiting)
	run(time.Second, agentPod("slow", corev1.PodRunning))
	slices.SortFunc(got, func(a, b result) int { return strings.Compare(a.Pod, b.Pod) })
	want := []result{
		{"node-bad", "bad", "agent: podshunt-agent uninstall\nbad\n", "command terminated with exit code 1", ""},
		{"node-good", "good", "agent: podshunt-agent uninstall\ngood\n", "", ""},
		{"node-lost", "lost", "", "", "the node is not ready (NodeStatusUnknown)"},
		{"node-slow", "slow", "", "no answer within 1s", ""},
		{"node-full", "unscheduled", "", "", "the pod unscheduled is pending"},
		{"node-waiting", "waiting", "", "", "the pod waiting is pending (ImagePullBackOff)"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results (-want +got)\n%s", diff)
	}
}

func TestExecErrors(t *testing.T) {
	exec := Exec{Kubeconfig: filepath.Join(t.TempDir(), "none"), Parallel: 1}
	if err := exec.Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "read kubeconfig") {
		t.Errorf("got error %v, want one of the kubeconfig", err)
	}
	exec.Kubeconfig, exec.Namespace = mustServeExec(t), "other"
	if err := exec.Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "list pods of namespace other") {
		t.Errorf("got error %v, want one of the list", err)
	}
}

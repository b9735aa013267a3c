// SPDX-License-Identifier: Apache-2.0

// Commands in the agents' pods, for `uninstall --all-nodes`.

package kube

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
)

// Exec is a command to be run in all pods that a selector names.
type Exec struct {
	// Kubeconfig is the path of a kubeconfig file; empty means the cluster that
	// this process runs in as a pod.
	Kubeconfig                     string
	Namespace, Selector, Container string
	Command                        []string
	// Parallel bounds the number of pods in which it runs at a time, PodTimeout how long it
	// may take in each.
	Parallel   int
	PodTimeout time.Duration
}

// ExecResult says how the command ended in one pod.
type ExecResult struct {
	Node, Pod string
	// Output has what the command printed to stdout and stderr.
	Output string
	Err    error
	// Absent says why nobody runs the command there, and it was not tried: the pod does not run,
	// or its node is not ready.
	Absent string
}

// Run runs the command and calls done once for each pod, one at a time, in the
// order in which they end. It returns an error only if pods or nodes cannot be listed.
func (e Exec) Run(ctx context.Context, done func(ExecResult)) error {
	config, err := connect(e.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("make a client of the API server: %w", err)
	}
	pods, err := client.CoreV1().Pods(e.Namespace).List(ctx, metav1.ListOptions{LabelSelector: e.Selector})
	if err != nil {
		return fmt.Errorf("list pods of namespace %s with labels %s: %w", e.Namespace, e.Selector, err)
	}
	down, err := nodesDown(ctx, client)
	if err != nil {
		return err
	}
	results := make(chan ExecResult)
	go func() {
		defer close(results)
		var group errgroup.Group
		group.SetLimit(e.Parallel)
		for _, pod := range pods.Items {
			group.Go(func() error {
				result := ExecResult{Node: nodeOf(&pod), Pod: pod.Name, Absent: absence(&pod, down)}
				if result.Absent == "" {
					result.Output, result.Err = e.runIn(ctx, config, client, &pod)
				}
				results <- result
				return nil
			})
		}
		_ = group.Wait() // its functions return no error
	}()
	for r := range results {
		done(r)
	}
	return nil
}

// nodesDown lists the nodes that are not ready, with the reason.
func nodesDown(ctx context.Context, client kubernetes.Interface) (map[string]string, error) {
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	down := map[string]string{}
	for _, node := range nodes.Items {
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				down[node.Name] = fmt.Sprintf("the node is not ready (%s)", c.Reason)
			}
		}
	}
	return down, nil
}

// absence says why the command cannot run in a pod, or returns "".
func absence(pod *corev1.Pod, down map[string]string) string {
	if reason, ok := down[pod.Spec.NodeName]; ok {
		return reason
	}
	if pod.Status.Phase == corev1.PodRunning {
		return ""
	}
	text := "the pod " + pod.Name + " is " + strings.ToLower(string(pod.Status.Phase))
	for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		if c.State.Waiting != nil && c.State.Waiting.Reason != "" {
			return text + " (" + c.State.Waiting.Reason + ")"
		}
	}
	return text
}

// nodeOf returns the node that a pod of a DaemonSet is for, also before it is scheduled.
func nodeOf(pod *corev1.Pod) string {
	if pod.Spec.NodeName != "" || pod.Spec.Affinity == nil || pod.Spec.Affinity.NodeAffinity == nil ||
		pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return pod.Spec.NodeName
	}
	for _, term := range pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		for _, field := range term.MatchFields {
			if field.Key == "metadata.name" && len(field.Values) == 1 {
				return field.Values[0]
			}
		}
	}
	return ""
}

func (e Exec) runIn(ctx context.Context, config *rest.Config, client kubernetes.Interface, pod *corev1.Pod) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.PodTimeout, fmt.Errorf("no answer within %s", e.PodTimeout))
	defer cancel()
	target := client.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: e.Container, Command: e.Command, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	executor, err := newExecutor(config, target)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr})
	if ctx.Err() != nil { // the streams may still be written to
		return "", context.Cause(ctx)
	}
	return stdout.String() + stderr.String(), err
}

// newExecutor prefers WebSockets, and takes SPDY where the API server or a proxy
// before it does not know how to pass them on, as kubectl does.
func newExecutor(config *rest.Config, url *url.URL) (remotecommand.Executor, error) {
	webSocket, err := remotecommand.NewWebSocketExecutor(config, http.MethodGet, url.String())
	if err != nil {
		return nil, fmt.Errorf("prepare exec: %w", err)
	}
	spdy, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, url)
	if err != nil {
		return nil, fmt.Errorf("prepare exec: %w", err)
	}
	return remotecommand.NewFallbackExecutor(webSocket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
}

// SPDX-License-Identifier: Apache-2.0

// Commands in the agents' pods, for `uninstall --all-nodes`.

package kube

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
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
}

// Run runs the command and calls done once for each pod, one at a time, in the
// order in which they end. It returns an error only if the pods cannot be listed.
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
	results := make(chan ExecResult)
	go func() {
		defer close(results)
		var group errgroup.Group
		group.SetLimit(e.Parallel)
		for _, pod := range pods.Items {
			group.Go(func() error {
				output, err := e.runIn(ctx, config, client, &pod)
				results <- ExecResult{Node: pod.Spec.NodeName, Pod: pod.Name, Output: output, Err: err}
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

func (e Exec) runIn(ctx context.Context, config *rest.Config, client kubernetes.Interface, pod *corev1.Pod) (string, error) {
	if pod.Status.Phase != corev1.PodRunning {
		return "", fmt.Errorf("the pod is %s", strings.ToLower(string(pod.Status.Phase)))
	}
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

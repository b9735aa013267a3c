// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/podshunt/podshunt/agent/pods"
)

// breakable are reactors of a client whose API server can go away.
type breakable struct {
	err     atomic.Pointer[error]
	refused atomic.Int64 // requests
	watches chan watch.Interface
}

func newBreakable(client *fake.Clientset) *breakable {
	b := &breakable{watches: make(chan watch.Interface, 100)}
	client.PrependReactor("list", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
		if err := b.err.Load(); err != nil {
			b.refused.Add(1)
			return true, nil, *err
		}
		return false, nil, nil
	})
	client.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
		if err := b.err.Load(); err != nil {
			b.refused.Add(1)
			return true, nil, *err
		}
		w, err := client.Tracker().Watch(a.GetResource(), a.GetNamespace(), a.(clienttesting.WatchActionImpl).ListOptions)
		b.watches <- w
		return true, w, err
	})
	return b
}

func (b *breakable) leave(err error) {
	b.err.Store(&err)
	for {
		select {
		case w := <-b.watches:
			w.Stop()
		default:
			return
		}
	}
}

func TestOutage(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
	}{
		{"refused", fmt.Errorf("dial: %w", syscall.ECONNREFUSED)},
		{"unreachable", errors.New("no route to host")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client := fake.NewClientset(newPod("web", nil))
			server := newBreakable(client)
			s := mustSource(t, client, "")
			s.start(t)
			before := s.mustContent(t, "content", func(c *pods.Content) bool { return len(c.Pods) == 1 })

			select {
			case <-s.Changed():
			default:
			}
			server.leave(tc.err)
			s.changedUntil(t, "outage", func(err error) bool { return err != nil })
			content, err := s.Content()
			if content != before {
				t.Errorf("got %+v, want the content from before the outage", content)
			}
			if text := err.Error(); !strings.HasPrefix(text, "not up to date since 2") || !strings.Contains(text, ": watch ") && !strings.Contains(text, ": list ") || !errors.Is(err, tc.err) {
				t.Errorf("got error %q, want since when and %v", text, tc.err)
			}

			server.err.Store(nil)
			s.changedUntil(t, "end of the outage", func(err error) bool { return err == nil })
			if _, err := client.CoreV1().Pods("shop").Create(t.Context(), newPod("new", nil), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			s.mustContent(t, "change after the outage", func(c *pods.Content) bool { return len(c.Pods) == 2 })
		})
	}
}

// An API server that is away when the agent starts.
func TestOutageAtStart(t *testing.T) {
	client := fake.NewClientset(newPod("web", nil))
	server := newBreakable(client)
	server.leave(syscall.ECONNREFUSED)
	s := mustSource(t, client, "")
	s.start(t)
	waitFor(t, "outage", func() bool { _, err := s.Content(); return err != nil })
	if content, _ := s.Content(); content != nil {
		t.Errorf("got %+v, want nothing yet", content)
	}
	server.err.Store(nil)
	s.mustContent(t, "end of the outage", func(c *pods.Content) bool { return len(c.Pods) == 1 })
}

// An API server that is away for long. client-go by itself would now ask once a minute.
func TestLongOutage(t *testing.T) {
	client := fake.NewClientset(newPod("web", nil))
	server := newBreakable(client)
	s := mustSource(t, client, "")
	s.retry = wait.Backoff{Duration: time.Millisecond, Steps: 1}
	s.start(t)
	s.mustContent(t, "content", func(*pods.Content) bool { return true })
	server.leave(syscall.ECONNREFUSED)
	waitFor(t, "requests during the outage", func() bool { return server.refused.Load() >= 20*int64(kinds) })
	if _, err := client.CoreV1().Pods("shop").Create(t.Context(), newPod("new", nil), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	server.err.Store(nil)
	s.mustContent(t, "what was made during the outage", func(c *pods.Content) bool { return len(c.Pods) == 2 })
}

// SPDX-License-Identifier: Apache-2.0

// While the API server says nothing new: how soon it is asked again, and how long what it
// has said is relied on.

package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// outage says since when and why a kind cannot be watched; zero while it can.
type outage struct {
	since time.Time
	err   error
}

// observe notes how requests end, and repeats those that do not reach the API server. A
// reflector would wait for up to a minute in between, and calls no error handler for a
// refused connection.
func (s *Source) observe(k kind, list cache.ListWithContextFunc, open cache.WatchFuncWithContext) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return reach(ctx, s.retry, func() (runtime.Object, error) {
				objects, err := list(ctx, o)
				// A list without a watch keeps nothing up to date.
				if err != nil {
					s.note(ctx, k, "list", err)
				}
				return objects, err
			})
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return reach(ctx, s.retry, func() (watch.Interface, error) {
				w, err := open(ctx, o)
				// An older API server refuses to stream a list: an ordinary list follows.
				if o.SendInitialEvents == nil || !answered(err) {
					s.note(ctx, k, "watch", err)
				}
				return w, err
			})
		},
	}
}

// reach repeats a request until the API server has answered it, or ctx ends.
func reach[T any](ctx context.Context, retry wait.Backoff, request func() (T, error)) (T, error) {
	delay := retry.DelayFunc()
	for {
		answer, err := request()
		if err == nil || answered(err) {
			return answer, err
		}
		select {
		case <-ctx.Done():
			return answer, err
		case <-time.After(delay()):
		}
	}
}

// answered reports whether an error of a request is the API server's.
func answered(err error) bool {
	status := apierrors.APIStatus(nil)
	return errors.As(err, &status)
}

func (s *Source) note(ctx context.Context, k kind, verb string, err error) {
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &s.outages[k]
	before := fmt.Sprint(o.err)
	switch {
	case err == nil:
		*o = outage{}
	case o.err == nil:
		*o = outage{time.Now(), fmt.Errorf("%s %s: %w", verb, k, err)}
	default:
		o.err = fmt.Errorf("%s %s: %w", verb, k, err)
	}
	if fmt.Sprint(o.err) != before {
		s.notify()
	}
}

// outageTrusted bounds how long the last content is relied on while nobody can reach
// the API server: whatever enforces NetworkPolicy on the node is just as old then.
const outageTrusted = time.Hour

// Vouch returns an error if Content must not be relied on. An API server that cannot
// be reached is one only after an hour (outageTrusted); one that refuses this agent
// is one at once, since others still learn of changes.
func (s *Source) Vouch(now time.Time) error {
	for k, synced := range s.synced {
		if !synced() {
			return fmt.Errorf("the API server has not told of the %s yet", kind(k))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.outages {
		switch {
		case o.err == nil:
		case apierrors.IsUnauthorized(o.err), apierrors.IsForbidden(o.err):
			return fmt.Errorf("refused by the API server since %s: %w", o.since.UTC().Format(time.RFC3339), o.err)
		case now.Sub(o.since) > outageTrusted:
			return fmt.Errorf("not up to date since %s: %w", o.since.UTC().Format(time.RFC3339), o.err)
		}
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"errors"
	"fmt"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// TestVouch: what is known may be relied on for an hour while nobody can reach the
// API server, and not at all once it refuses this agent.
func TestVouch(t *testing.T) {
	now := time.Now()
	pods := schema.GroupResource{Resource: "pods"}
	away := errors.New("connection refused")
	for _, tc := range []struct {
		name   string
		synced bool
		since  time.Duration
		err    error
		want   bool
	}{
		{name: "watched", synced: true, want: true},
		{name: "not told of everything yet"},
		{name: "away for a minute", synced: true, since: time.Minute, err: away, want: true},
		{name: "away for an hour", synced: true, since: time.Hour, err: away, want: true},
		{name: "away for longer", synced: true, since: time.Hour + time.Second, err: away},
		{name: "ill", synced: true, since: time.Minute, err: apierrors.NewInternalError(away), want: true},
		{name: "not let in", synced: true, err: fmt.Errorf("watch pods: %w", apierrors.NewUnauthorized("who?"))},
		{name: "forbidden", synced: true, err: fmt.Errorf("watch pods: %w", apierrors.NewForbidden(pods, "", away))},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &Source{}
			for k := range s.synced {
				s.synced[k] = func() bool { return tc.synced || k > 0 }
			}
			s.outages[namespaceKind] = outage{since: now.Add(-tc.since), err: tc.err}
			if err := s.Vouch(now); (err == nil) != tc.want {
				t.Errorf("got %v, want it to vouch: %v", err, tc.want)
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

// How long what the API server has said is relied on while it says nothing new.

package kube

import (
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// outage says since when and why a kind cannot be watched; zero while it can.
type outage struct {
	since time.Time
	err   error
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

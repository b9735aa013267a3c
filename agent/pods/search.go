// SPDX-License-Identifier: Apache-2.0

// This file searches, among processes, for pods that want to take part and have no
// attachment.

package pods

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/podshunt/podshunt/agent/proc"
	"github.com/podshunt/podshunt/api"
)

const (
	// searchInterval is the least time between two looks at all processes. A pod
	// that was not found waits so long for the next, and then twice as long each
	// time, up to maxSearchDelay.
	searchInterval = time.Second
	maxSearchDelay = time.Minute
)

// search has the state of the search for one pod without an attachment.
type search struct {
	// entry has the pod, and its network namespace once that is found.
	entry
	// uids are the pod's UIDs that no other pod claims: it may be found by
	// these.
	uids []string
	// by is the UID by which it was found.
	by string
	// wanted is false while the pod cannot be found, or need not be.
	wanted bool
	// lost is set when the process has ended by which the network namespace was
	// found.
	lost  bool
	next  time.Time
	delay time.Duration
}

// forget drops what the search has found.
func (s *search) forget() {
	s.attachment.Netns, s.netns, s.cookie, s.netnsErr, s.refused, s.lost, s.by = "", stamp{}, 0, nil, nil, false, ""
}

// search brings r.searches in line with the source, and adds their pods to r.pods. If
// all is true, it looks first whether known network namespaces are still there.
func (r *Reconciler) search(attached map[string]bool, all bool) {
	searches := map[string]*search{}
	if r.content != nil {
		contested := r.content.contested()
		for _, name := range slices.Sorted(maps.Keys(r.content.Pods)) {
			w := r.content.Pods[name]
			if attached[name] || len(w.UIDs) == 0 {
				continue
			}
			key := name + " " + w.UIDs[0]
			s := r.searches[key]
			if s == nil {
				namespace, name, _ := strings.Cut(name, "/")
				s = &search{delay: searchInterval}
				s.attachment.Pod = api.PodRef{Namespace: namespace, Name: name, UID: w.UIDs[0]}
			}
			s.uids = slices.DeleteFunc(slices.Clone(w.UIDs), func(uid string) bool { return contested[uid] })
			if s.by != "" && !slices.Contains(s.uids, s.by) {
				s.forget()
			}
			standing := w.standing()
			// A pod without addresses has no network namespace yet.
			s.wanted = standing.State == api.PodWanted && len(s.uids) > 0 && len(w.Addresses) > 0 && !r.cfg.Refused && !r.stopped
			if all && s.cookie != 0 && !s.read(r.cfg.NetnsCookie) {
				if s.wanted {
					// Another process of the pod may still be in it: applySearch decides.
					s.lost, s.next = true, time.Time{}
				} else {
					s.forget()
				}
			}
			// Leave out pods that do not want to take part, or have finished.
			if s.cookie == 0 && standing.State == api.PodOut {
				continue
			}
			searches[key] = s
			if standing.State == api.PodWanted && len(s.uids) == 0 {
				standing = Standing{api.PodRefused, api.PodClaimedTwice, "another pod of this node claims its UID, so that its processes are not known"}
			}
			r.classify(&s.entry, &w, standing)
		}
	}
	r.searches = searches
}

// missing returns the UIDs of the pods that a search is due for.
func (r *Reconciler) missing() map[string]bool {
	now := r.cfg.Now()
	if now.Before(r.nextSearch) {
		return nil
	}
	uids := map[string]bool{}
	for _, s := range r.searches {
		if s.wanted && (s.cookie == 0 || s.lost) && !now.Before(s.next) {
			for _, uid := range s.uids {
				uids[uid] = true
			}
		}
	}
	return uids
}

// nextFind returns when the next search is due, or zero if no pod is missing.
func (r *Reconciler) nextFind() time.Time {
	var next time.Time
	for _, s := range r.searches {
		if !s.wanted || s.cookie != 0 && !s.lost {
			continue
		}
		due := s.next
		if due.Before(r.nextSearch) {
			due = r.nextSearch
		}
		if next.IsZero() || due.Before(next) {
			next = due
		}
	}
	return next
}

// applySearch stores the result of a look at all processes for uids.
func (r *Reconciler) applySearch(uids map[string]bool, found map[string]proc.Netns, refused map[string]error) {
	now := r.cfg.Now()
	r.nextSearch = now.Add(searchInterval)
	for _, s := range r.searches {
		if !slices.ContainsFunc(s.uids, func(uid string) bool { return uids[uid] }) {
			continue
		}
		s.forget()
		s.next = now.Add(s.delay)
		s.delay = min(2*s.delay, maxSearchDelay)
		for _, uid := range s.uids {
			if n, ok := found[uid]; ok {
				s.attachment.Netns, s.cookie, s.by = n.Path, n.Cookie, uid
				s.delay = searchInterval
				s.refused = nil
				break
			}
			if err := refused[uid]; err != nil {
				s.refused = err
			}
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

// The search for pods that want to take part and have no attachment, by their processes.

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
	// searchInterval is the least time between two looks at all processes, and the
	// first time a pod that was not found waits for the next. It doubles up to
	// maxSearchDelay.
	searchInterval = time.Second
	maxSearchDelay = time.Minute
)

// search is for a pod that wants to take part and that no attachment tells of.
type search struct {
	// entry has the pod, and its network namespace once that is found.
	entry
	// uids are those by which it may be found: no other pod claims them.
	uids []string
	// by is the one of them by which it was found.
	by string
	// wanted is false as long as there is nothing to be found, or no use for it.
	wanted bool
	// lost is set when the process is gone that the network namespace was found by.
	lost  bool
	next  time.Time
	delay time.Duration
}

// forget makes it a search for a pod that was not found.
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
			// A pod has addresses from the moment on that it has a network namespace.
			s.wanted = standing.State == api.PodWanted && len(s.uids) > 0 && len(w.Addresses) > 0 && !r.cfg.Refused && !r.stopped
			if all && s.cookie != 0 && !s.read(r.cfg.NetnsCookie) {
				if s.wanted {
					// Another process of the pod may still be in it: applySearch decides.
					s.lost, s.next = true, time.Time{}
				} else {
					s.forget()
				}
			}
			// A pod that does not want to take part, or has finished, is not asked about.
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

// missing returns the UIDs of the pods that are to be looked for now.
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

// nextFind returns when missing has something to return, zero if nothing is missing.
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

// applySearch takes up the result of a search for uids.
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

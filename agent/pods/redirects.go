// SPDX-License-Identifier: Apache-2.0

// This file looks for rules in the network namespaces of pods that redirect ports.

package pods

import (
	"cmp"
	"time"

	"github.com/podshunt/podshunt/api"
)

const (
	// lookInterval is the time from the first look at a network namespace to the
	// next, since the init container of a service mesh makes its rules after the pod
	// has started. It doubles up to maxLookInterval.
	lookInterval    = 500 * time.Millisecond
	maxLookInterval = time.Minute
	// maxLooksAgain bounds how many namespaces are looked at again at a time, as pods that
	// start wait meanwhile.
	maxLooksAgain = 8
)

// look has the result of the last look at a network namespace.
type look struct {
	netns     string
	redirects bool
	next      time.Time
	interval  time.Duration
}

// lookForRedirects sets Policy.Redirects of each pod that is to take part. It looks
// at network namespaces that are new.
func (r *Reconciler) lookForRedirects() {
	if r.cfg.Redirects == nil {
		return
	}
	looks := map[uint64]*look{}
	for i := range r.pods {
		p := &r.pods[i]
		if p.State != api.PodWanted {
			continue
		}
		l := cmp.Or(looks[p.NetnsCookie], r.looks[p.NetnsCookie])
		if l == nil {
			l = &look{netns: p.Netns, interval: lookInterval}
			r.look(l)
		}
		l.netns = p.Netns
		looks[p.NetnsCookie] = l
		p.Policy.Redirects = l.redirects
	}
	r.looks = looks
}

// lookAgain looks again at namespaces that are due, and returns true if one has
// changed.
func (r *Reconciler) lookAgain() (changed bool) {
	now, again := r.cfg.Now(), 0
	for _, l := range r.looks {
		if now.Before(l.next) || again == maxLooksAgain {
			continue
		}
		again++
		before := l.redirects
		r.look(l)
		changed = changed || l.redirects != before
	}
	return changed
}

func (r *Reconciler) look(l *look) {
	var err error
	l.redirects, err = r.cfg.Redirects(l.netns)
	r.logOnce("redirects "+l.netns, "not known whether a pod redirects ports, rules for ports keep it on TCP", err)
	l.next, l.interval = r.cfg.Now().Add(l.interval), min(2*l.interval, maxLookInterval)
}

// nextLook returns when lookAgain has something to do, or zero. Rare looks wait for
// the next pass, so that they do not wake the agent one by one.
func (r *Reconciler) nextLook() time.Time {
	now := r.cfg.Now()
	var next time.Time
	for _, l := range r.looks {
		rare := l.interval == maxLookInterval && now.Before(l.next)
		if !rare && (next.IsZero() || l.next.Before(next)) {
			next = l.next
		}
	}
	return next
}

// SPDX-License-Identifier: Apache-2.0

// The looks at the rules in the network namespaces of pods, for ports that they redirect.

package pods

import (
	"cmp"
	"time"

	"github.com/podshunt/podshunt/api"
)

const (
	// lookInterval is how long after the first look at a network namespace the next
	// is, since an init container of a service mesh makes its rules when the pod has
	// started already. It doubles up to maxLookInterval.
	lookInterval    = 500 * time.Millisecond
	maxLookInterval = time.Minute
	// maxLooksAgain is how many are looked at again at a time: a pod that starts waits for it.
	maxLooksAgain = 8
)

// look is whether a network namespace redirects ports.
type look struct {
	netns     string
	redirects bool
	next      time.Time
	interval  time.Duration
}

// lookForRedirects notes in the policy of each pod that is to take part whether its
// network namespace redirects ports. It looks at those that are new.
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

// lookAgain looks at those whose time has come, and returns true if one has changed.
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

// nextLook returns when lookAgain has something to do, zero if there is nothing. Looks
// that are rare wait for the next pass, so that they do not wake the agent one by one.
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

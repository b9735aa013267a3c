// SPDX-License-Identifier: Apache-2.0

package pods

import "time"

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
	redirects bool
	next      time.Time
	interval  time.Duration
}

// lookForRedirects notes in the policy of each pod that takes part whether its
// network namespace redirects ports.
func (r *Registry) lookForRedirects() {
	if r.cfg.Redirects == nil {
		return
	}
	now, again := r.cfg.Now(), 0
	for i := range r.pods {
		p := &r.pods[i]
		if p.Reason != "" {
			continue
		}
		l := r.looks[p.NetnsCookie]
		known := l != nil
		if !known {
			l = &look{interval: lookInterval}
			r.looks[p.NetnsCookie] = l
		}
		if !known || !now.Before(l.next) && again < maxLooksAgain {
			if known {
				again++
			}
			var err error
			l.redirects, err = r.cfg.Redirects(p.Netns)
			r.complain("redirects "+p.Netns, "not known whether a pod redirects ports, rules for ports keep it on TCP", err)
			l.next, l.interval = now.Add(l.interval), min(2*l.interval, maxLookInterval)
		}
		p.Policy.Redirects = l.redirects
	}
}

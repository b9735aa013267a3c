// SPDX-License-Identifier: Apache-2.0

// This file brings the kernel in line: it decides when to look, writes policy,
// enrols pods, and releases pods.

package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/watch"
	"github.com/podshunt/podshunt/api"
)

// After a policy could not be written whole, all of it is written again after
// policyRetry. If the map is full, that doubles each time up to maxPolicyRetry, since
// pods that start wait meanwhile. Changes are written in between.
const (
	policyRetry    = 5 * time.Second
	maxPolicyRetry = time.Minute
)

// What could not be done is tried again after tryAgain, which doubles each time up to
// passInterval.
const tryAgain = 250 * time.Millisecond

// Run keeps the kernel in line until ctx ends.
func (r *Reconciler) Run(ctx context.Context) error {
	files := make(chan struct{}, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() {
		watchDirs(ctx, func() []string { return []string{r.cfg.Dir} }, r.interval, r.cfg.Log, func() { notify(files) })
	})
	due := time.Now().Add(r.wait())
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-files:
			r.refresh()
		case <-r.cfg.Source.Changed():
			r.Sync()
		case <-timer.C:
			due = time.Time{}
			r.onTime()
		}
		// A series of events must not put off what is due.
		if next := time.Now().Add(r.wait()); due.IsZero() || next.Before(due) {
			due = next
		}
		timer.Reset(time.Until(due))
	}
}

// wait returns how long there is nothing to do, unless an event comes.
func (r *Reconciler) wait() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.nextPass
	if !r.stopped {
		for _, t := range []time.Time{r.nextTry, r.policyEnd, r.nextPolicy(), r.nextFind(), r.nextLook()} {
			if !t.IsZero() && t.Before(next) {
				next = t
			}
		}
	}
	// At least this, so that a time which stays in the past does not keep a core
	// busy.
	return max(next.Sub(r.cfg.Now()), watch.Settle)
}

// nextPolicy returns when the whole policy is to be written again, or zero.
func (r *Reconciler) nextPolicy() time.Time {
	if r.policyErr == nil {
		return time.Time{}
	}
	return r.policyNext
}

// onTime does what is due by now.
func (r *Reconciler) onTime() {
	r.mu.Lock()
	now := r.cfg.Now()
	all := !now.Before(r.nextPass)
	for _, t := range []time.Time{r.nextTry, r.policyEnd, r.nextPolicy(), r.nextFind()} {
		all = all || !t.IsZero() && !now.Before(t)
	}
	if !all && !r.stopped && r.lookAgain() {
		r.sync(false)
	}
	r.mu.Unlock()
	if all {
		r.Sync()
	}
}

// refresh takes up what others have changed in the directory of attachments.
func (r *Reconciler) refresh() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.readFiles() {
		r.sync(false)
	}
}

// readFiles reads the directory of attachments, and returns true if they have
// changed.
func (r *Reconciler) readFiles() bool {
	changed, err := r.store.refresh()
	r.logOnce("attachments", "attachments not read, the last ones stay in force", err)
	return changed
}

// Sync looks at everything, and brings the kernel in line with it. Errors are in the
// Snapshot, and the next Sync tries again.
func (r *Reconciler) Sync() {
	defer r.lookedNow()
	r.mu.Lock()
	r.nextPass = r.cfg.Now().Add(r.interval)
	r.readFiles()
	if !r.stopped {
		r.lookAgain()
	}
	r.sync(true)
	uids := r.missing()
	r.mu.Unlock()
	if len(uids) == 0 {
		return
	}
	// Without the lock, so that a pod that starts does not wait for a look at all
	// processes.
	found, refused, err := r.finder.Find(uids)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.logOnce("search", "processes not searched for pods without an attachment", err)
	r.applySearch(uids, found, refused)
	r.sync(false)
}

// sync brings the kernel in line with what is known. If all is true, it looks first
// whether known network namespaces are still there.
func (r *Reconciler) sync(all bool) {
	for _, name := range slices.Sorted(maps.Keys(r.store.entries)) {
		if e := r.store.entries[name]; all || e.cookie == 0 {
			r.findNetns(name)
		}
	}
	content, err := r.cfg.Source.Content()
	if content != nil {
		r.content = content
	}
	r.sourceErr = err
	r.logOnce("source", "what pods ask for is not up to date, what was last known stays in force", err)

	r.decide(all)
	waiting := r.waiting()
	if !r.stopped && !waiting {
		r.started = true
		r.lookForRedirects()
		// The policy is there before the pod is enrolled: a connection is judged once, when
		// it is made, and without a rule the pod's first ones would stay on TCP for life.
		r.setPolicy()
		if r.enrol() {
			r.setPolicy()
		}
		r.release()
	}
	changed := false
	for i := range r.pods {
		changed = r.report(&r.pods[i], waiting) || changed
	}
	if changed && r.cfg.Report != nil {
		r.cfg.Report(slices.Clone(r.pods))
	}
	r.planNextTry()
	notify(r.wake)
}

// planNextTry sets when to try again what has failed and no event will report: to
// enrol, to release, or to read a network namespace for the first time.
func (r *Reconciler) planNextTry() {
	unfinished := len(r.failed) > 0 || r.releaseFailed
	for _, p := range r.pods {
		unfinished = unfinished || p.entry.netnsErr != nil && p.NetnsCookie == 0
	}
	if !unfinished {
		r.nextTry, r.tryDelay = time.Time{}, 0
		return
	}
	r.tryDelay = min(max(2*r.tryDelay, tryAgain), passInterval)
	r.nextTry = r.cfg.Now().Add(r.tryDelay)
}

// findNetns reads the cookie of an attachment's network namespace if it may have
// changed, and drops the attachment if the namespace is gone.
func (r *Reconciler) findNetns(name string) {
	e := r.store.entries[name]
	if e.fileErr != nil {
		if !e.logged {
			e.logged = true
			r.cfg.Log.Warn("attachment ignored", "err", e.fileErr)
		}
		return
	}
	if e.read(r.cfg.NetnsCookie) {
		return
	}
	r.cfg.Log.Info("network namespace is gone", "pod", e.attachment.Pod.String(), "netns", e.attachment.Netns)
	r.logOnce("remove "+name, "attachment of a gone network namespace not deleted", r.store.remove(name))
	// It is dropped even if its file cannot be deleted.
	delete(r.store.entries, name)
}

func (r *Reconciler) cluster() policy.Cluster {
	if r.content == nil {
		return policy.Cluster{}
	}
	cluster := r.content.Cluster
	if r.cfg.MaxPolicies > 0 {
		cluster.Share = policy.Share(r.cfg.MaxPolicies, len(r.policyPods))
	}
	return cluster
}

// enrol enrols the pods that decide wants, and sets those that fail to refused. It
// returns true if other pods have failed than the last time: the policy was then
// written for the wrong ones.
func (r *Reconciler) enrol() bool {
	failed := map[uint64]bool{}
	for i := range r.pods {
		p := &r.pods[i]
		if p.State != api.PodWanted || r.enrolled[p.NetnsCookie] {
			continue
		}
		err := r.enrolPod(p)
		// A pod that an earlier agent has enrolled is in all the same.
		if _, in := r.enrolled[p.NetnsCookie]; err != nil && !in {
			p.set(Standing{api.PodRefused, api.PodEnrolFailed, err.Error()})
			failed[p.NetnsCookie] = true
			err = nil
		}
		r.logOnce("enrol "+p.Netns, "pod not enrolled again, it stays as the earlier agent left it", err)
	}
	changed := !maps.Equal(failed, r.failed)
	r.failed = failed
	return changed
}

func (r *Reconciler) enrolPod(p *Pod) error {
	// The cookie may have been read a while ago. If its namespace is gone, the next look
	// at namespaces drops the attachment.
	if !p.entry.read(r.cfg.NetnsCookie) {
		return fmt.Errorf("network namespace %s was replaced meanwhile", p.Netns)
	}
	if err := r.cfg.Datapath.Enrol(p.NetnsCookie); err != nil {
		return err
	}
	r.enrolled[p.NetnsCookie] = true
	return nil
}

// setPolicy writes the policy for the pods that take part if it is not in force yet.
func (r *Reconciler) setPolicy() {
	var taking []policy.Pod
	for _, p := range r.pods {
		if p.State == api.PodWanted && !r.failed[p.NetnsCookie] {
			taking = append(taking, p.Policy)
		}
	}
	slices.SortStableFunc(taking, func(a, b policy.Pod) int { return cmp.Compare(a.ID, b.ID) })
	taking = slices.CompactFunc(taking, func(a, b policy.Pod) bool { return a.ID == b.ID })

	now := r.cfg.Now()
	ended := !r.policyEnd.IsZero() && !now.Before(r.policyEnd)
	whole := r.compiler == nil || r.policyErr != nil && !now.Before(r.policyNext)
	if !whole && !ended && r.content == r.policyContent && reflect.DeepEqual(taking, r.policyPods) {
		return
	}
	err := r.writePolicy(taking, now, whole)
	switch {
	case err != nil && whole && isFull(err):
		r.policyDelay = min(max(2*r.policyDelay, policyRetry), maxPolicyRetry)
	case err != nil && (whole || r.policyErr == nil):
		r.policyDelay = policyRetry
	}
	if err != nil && (whole || r.policyErr == nil) {
		r.policyNext = now.Add(r.policyDelay)
	}
	// A change that succeeds does not write what was missing before.
	if whole || err != nil {
		r.policyErr = err
	}
	if r.policyErr == nil {
		r.policyDelay = 0
	}
	r.logOnce("policy", "policy not complete, what is missing stays on TCP", r.policyErr)
}

// isFull reports whether an error says that a kernel map is full.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) }

// writePolicy writes what has changed of the policy, or all of it.
func (r *Reconciler) writePolicy(taking []policy.Pod, now time.Time, whole bool) error {
	if r.compiler == nil {
		r.compiler = &policy.Compiler{}
	}
	r.policyPods, r.policyContent = taking, r.content
	changed, end := r.compiler.Update(taking, r.cluster(), now)
	r.policyEnd = end
	if whole {
		return r.cfg.Datapath.SetPolicy(r.compiler.Rules())
	}
	if len(changed) == 0 {
		return nil
	}
	return r.cfg.Datapath.UpdatePolicy(changed)
}

// release releases the pods that no longer take part. Their rules are deleted
// already, so their connections are back on TCP.
func (r *Reconciler) release() {
	keep := map[uint64]bool{}
	for _, p := range r.pods {
		if p.State == api.PodWanted {
			keep[p.NetnsCookie] = true
		}
	}
	r.releaseFailed = false
	for cookie := range r.enrolled {
		if keep[cookie] {
			continue
		}
		err := r.cfg.Datapath.Release(cookie)
		r.logOnce(fmt.Sprint("release ", cookie), "pod not released", err)
		if err == nil {
			delete(r.enrolled, cookie)
			r.tryDelay = 0 // there may be room now for a pod that has failed
		} else {
			r.releaseFailed = true
		}
	}
}

// logOnce logs a fault when it appears or changes.
func (r *Reconciler) logOnce(subject, msg string, err error) {
	if err == nil {
		delete(r.faults, subject)
		return
	}
	if r.faults[subject] != err.Error() {
		r.faults[subject] = err.Error()
		r.cfg.Log.Warn(msg, "err", err) //nolint:sloglint // every caller passes a constant
	}
}

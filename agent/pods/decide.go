// SPDX-License-Identifier: Apache-2.0

// This file decides the state of each pod, from its attachment or search and from
// what it asks for. Nothing here touches the kernel.

package pods

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/api"
)

// Standing is the state of a pod and the reason for it.
type Standing struct {
	State  api.PodState
	Reason api.PodReason
	// Message is for people. No code depends on it.
	Message string
}

// HostNetwork is the standing of pods in the node's own network namespace that ask to
// take part.
func HostNetwork() Standing {
	return Standing{api.PodRefused, api.PodHostNetwork, "it runs in the node's own network namespace (hostNetwork)"}
}

// waiting reports whether it is too early to release pods that an earlier agent has
// enrolled: what pods ask for is not known yet, or the first search for their
// processes has not been done.
func (r *Reconciler) waiting() bool {
	return !r.cfg.Refused && (r.content == nil || !r.started && len(r.missing()) > 0)
}

// decide fills r.pods: the attachments in the order of their file names, then the
// pods of r.searches. If all is true, it also looks whether the network namespaces
// of the latter are still there.
func (r *Reconciler) decide(all bool) {
	r.pods = nil
	attached := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(r.store.entries)) {
		e := r.store.entries[name]
		if e.fileErr != nil {
			continue
		}
		pod := e.attachment.Pod
		w, standing := r.intent(pod)
		if w != nil {
			attached[pod.String()] = true
		}
		r.classify(e, w, standing)
	}
	r.search(attached, all)

	owner := map[uint64]string{}
	shared := map[uint64]bool{}
	for _, p := range r.pods {
		pod := p.Pod.String()
		if other, ok := owner[p.NetnsCookie]; ok && p.NetnsCookie != 0 && other != pod {
			shared[p.NetnsCookie] = true
		}
		owner[p.NetnsCookie] = pod
	}
	for i, p := range r.pods {
		if shared[p.NetnsCookie] && p.State == api.PodWanted {
			r.pods[i].set(Standing{api.PodRefused, api.PodSharedNetwork, "another pod is attached to the same network namespace"})
		}
	}
}

// intent returns what a pod asks for, or nil if that is not known, and the standing that
// follows from it alone.
func (r *Reconciler) intent(pod api.PodRef) (*Intent, Standing) {
	if r.content == nil {
		message := "waiting for " + r.cfg.Source.String()
		if r.sourceErr != nil {
			message += ": " + r.sourceErr.Error()
		}
		return nil, Standing{api.PodWaiting, api.PodSourceUnknown, message}
	}
	intent, ok := r.content.Pods[pod.String()]
	switch {
	case !ok:
		return nil, Standing{api.PodOut, api.PodNotOptedIn, r.content.Unlisted}
	case !intent.matches(pod.UID):
		// Either the pod has been replaced, or the source does not have the new
		// one yet.
		return nil, Standing{api.PodWaiting, api.PodReplaced, "another pod of the same name is known to " + r.cfg.Source.String()}
	}
	return &intent, intent.standing()
}

// classify appends a pod to r.pods. It gets the standing of its intent unless something
// else keeps it out. w is nil if its intent is not known.
func (r *Reconciler) classify(e *entry, w *Intent, standing Standing) {
	p := Pod{PodStatus: api.PodStatus{
		Pod:         e.attachment.Pod,
		ContainerID: e.attachment.ContainerID,
		Netns:       e.attachment.Netns,
		Addresses:   e.attachment.Addresses,
		NetnsCookie: e.cookie,
	}, ID: e.attachment.AttachmentID, entry: e}
	p.Policy = policy.Pod{ID: e.cookie, Namespace: p.Pod.Namespace, Name: p.Pod.Name}
	if w != nil {
		p.Policy.Labels, p.Policy.Ports, p.Policy.Settings, p.Policy.Bandwidth = w.Labels, w.Ports, w.Settings, w.Bandwidth
		p.AcceptBlocking = w.Settings.AcceptBlocking
		if len(w.Addresses) > 0 {
			// They may have changed since the attachment was made.
			p.Addresses = w.Addresses
		}
	}
	wants := standing.State == api.PodWanted
	refuse := func(s Standing) {
		if standing = s; !wants {
			standing.State = api.PodOut
		}
	}
	switch {
	case r.stopped:
		standing = Standing{api.PodOut, api.PodUnloaded, r.stopMessage}
	case e.netnsErr != nil && e.cookie == 0:
		standing = Standing{api.PodWaiting, api.PodNetnsUnknown, e.netnsErr.Error()}
	case slices.Contains(r.cfg.HostNetns, e.cookie):
		refuse(HostNetwork())
	case r.cfg.Refused:
		refuse(Standing{api.PodRefused, api.PodKernelRefused, r.cfg.Refusal})
	case wants && e.cookie == 0:
		standing = Standing{api.PodWaiting, api.PodNoProcess, "no process of the pod has been found yet"}
		if e.refused != nil {
			standing.Message += ", and one in a cgroup with its name does not count: " + e.refused.Error()
		}
		if len(p.Addresses) == 0 {
			standing = Standing{api.PodWaiting, api.PodWithoutAddress, "waiting for its network"}
		}
	}
	p.set(standing)
	r.pods = append(r.pods, p)
}

func (p *Pod) set(s Standing) { p.State, p.Reason, p.Message = s.State, s.Reason, s.Message }

// report completes a pod's status after the work on the kernel. It returns true, and
// logs the status, if that has changed.
func (r *Reconciler) report(p *Pod, waiting bool) bool {
	switch _, in := r.enrolled[p.NetnsCookie]; {
	case r.stopped:
	case waiting && in:
		// An earlier agent has enrolled it, and that stays.
		p.State = api.PodEnrolled
	case !waiting && p.State == api.PodWanted:
		p.State = api.PodEnrolled
		if end := p.Policy.Settings.PausedUntil; end.After(r.cfg.Now()) {
			p.set(Standing{api.PodHeld, api.PodPaused, "paused until " + end.Format(time.RFC3339)})
		}
	}
	p.Enrolled = p.State == api.PodEnrolled || p.State == api.PodHeld
	logged := fmt.Sprint(p.State, p.NetnsCookie, p.AcceptBlocking, p.Message)
	if p.entry.lastLogged == logged {
		return false
	}
	p.entry.lastLogged = logged
	log := r.cfg.Log.With("pod", p.Pod.String(), "netns", p.Netns, "netns_cookie", p.NetnsCookie, "reason", p.Message)
	if p.AcceptBlocking {
		log = log.With("accept_blocking", true)
	}
	if p.Enrolled {
		log.Info("pod takes part")
	} else {
		log.Info("pod stays on tcp")
	}
	return true
}

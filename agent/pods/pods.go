// SPDX-License-Identifier: Apache-2.0

// Package pods knows the pods of this node and keeps the kernel in line with
// what they ask for. It owns the directory of attachments, where the CNI plugin
// leaves what the runtime told it, and takes what the pods ask for from a Source.
// A pod that the plugin has not told of is looked for among the processes of the
// node. Every change is in force within a second. It never releases a pod that
// still takes part, so that live connections do not notice a restart.
package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/proc"
	"github.com/podshunt/podshunt/api"
)

// pollInterval is how often files and network namespaces are looked at. A poll
// without a change is two stat calls per attachment.
const pollInterval = 250 * time.Millisecond

// policyRetry is how long a policy of which some is missing rests before all of it is
// written again. Where the map is full that is doubled each time, up to maxPolicyRetry:
// a pod that starts waits for it. Changes are written meanwhile.
const (
	policyRetry    = 5 * time.Second
	maxPolicyRetry = time.Minute
)

// wedged is how long a Sync takes at most: to write a whole policy map takes
// seconds, on a node that is very busy tens of them.
const wedged = 2 * time.Minute

// Datapath is what the registry does to the kernel.
type Datapath interface {
	// Enrol takes in the pod with the network namespace at path and returns its
	// cookie. It and Release are idempotent.
	Enrol(netns string) (cookie uint64, err error)
	Release(cookie uint64) error
	// Enrolled lists the pods that are in, those of an earlier agent included.
	Enrolled() ([]uint64, error)
	// SetPolicy replaces the whole policy.
	SetPolicy(rules []policy.Rule) error
	// UpdatePolicy replaces the rules of the pairs of pods that are named.
	UpdatePolicy(changed []policy.PairRules) error
}

// Config is what a Registry works with; all of it but Refusal and Report is required.
type Config struct {
	// Dir is the directory of attachments; it is made if needed.
	Dir    string
	Source Source
	// Proc is where the procfs of the node is mounted.
	Proc string
	// HostNetns are cookies of network namespaces that are the node's own.
	HostNetns []uint64
	// Refusal is why no pod at all may take part; empty if they may.
	Refusal  string
	Datapath Datapath
	// MaxPolicies is how many entries the policy map has; 0 if that does not matter.
	MaxPolicies int
	// NetnsCookie reads the cookie of the network namespace at a path.
	NetnsCookie func(path string) (uint64, error)
	// Redirects tells whether the network namespace at a path gives connections that
	// come in another port; true with an error where that is not known. If nil, none does.
	Redirects func(path string) (bool, error)
	// Report is called with all pods when one of them has changed. It must neither
	// block nor call the Registry.
	Report func([]Pod)
	// Now is the clock.
	Now func() time.Time
	Log *slog.Logger
}

// Pod is an attachment, or a pod without one that wants to take part, with what
// it asks for.
type Pod struct {
	api.PodStatus
	// ID is that of the attachment, zero if there is none.
	ID api.AttachmentID
	// Policy is what the policy goes by. Its Settings are zero if the pod's
	// annotations are not known or not accepted.
	Policy policy.Pod
	// Problem is set if the pod wants to take part and cannot.
	Problem Problem

	entry *entry
}

// Snapshot is the state of the registry.
type Snapshot struct {
	Pods []Pod
	// Cluster is what the policy was compiled with.
	Cluster policy.Cluster
	// SourceError and PolicyError are those of api.Status.
	SourceError, PolicyError error
}

// Registry is safe for concurrent use.
type Registry struct {
	cfg    Config
	finder proc.Finder

	mu         sync.Mutex
	entries    map[string]*entry  // attachments by file name
	searches   map[string]*search // by name and UID, for the pods without an attachment
	nextSearch time.Time
	content    *Content // what the source last said, nil before it has said anything
	sourceErr  error
	started    bool   // the state that an earlier agent left has been replaced
	stopped    string // why nothing is done any more
	pods       []Pod  // the result of the last sync

	// enrolled are the cookies in the kernel, and whether this agent has enrolled them itself.
	enrolled map[uint64]bool
	// The policy in the kernel is that of compiler, from policyPods and policyContent,
	// unless policyErr says what is missing. It is to be looked at again at policyEnd.
	compiler      *policy.Compiler
	policyPods    []policy.Pod
	policyContent *Content
	policyEnd     time.Time
	policyErr     error
	// All of it is written again at policyNext, and policyDelay after that.
	policyNext  time.Time
	policyDelay time.Duration

	// looks are what is known of the rules in the pods' network namespaces, by cookie.
	looks map[uint64]*look

	// faults are those that have been logged and still last.
	faults map[string]string

	// looked is when Sync last ended. It is apart from mu, which a Sync that hangs holds.
	looked atomic.Pointer[time.Time]
}

// New returns a Registry that keeps what an earlier agent has enrolled until
// the first Sync decides on it.
func New(cfg Config) (*Registry, error) {
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	cookies, err := cfg.Datapath.Enrolled()
	if err != nil {
		return nil, fmt.Errorf("list enrolled pods: %w", err)
	}
	r := &Registry{
		cfg:      cfg,
		finder:   proc.Finder{Root: cfg.Proc, HostNetns: cfg.HostNetns, NetnsCookie: cfg.NetnsCookie},
		enrolled: map[uint64]bool{},
		looks:    map[uint64]*look{},
		faults:   map[string]string{},
	}
	for _, cookie := range cookies {
		r.enrolled[cookie] = false
	}
	r.lookedNow()
	return r, nil
}

// Alive returns an error if Sync has not ended for longer than any amount of work
// takes: then neither pods nor policies are followed any more, and only a new
// process helps.
func (r *Registry) Alive() error {
	if last := *r.looked.Load(); r.cfg.Now().Sub(last) > wedged {
		return fmt.Errorf("pods and policies were last looked at at %s", last.Format(time.RFC3339))
	}
	return nil
}

func (r *Registry) lookedNow() {
	now := r.cfg.Now()
	r.looked.Store(&now)
}

// Run keeps the kernel in line until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	changed := r.cfg.Source.Changed()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-ticker.C:
		}
		r.Sync()
	}
}

// Sync brings the kernel in line with the source and the files as they are now.
// What could not be done is in the Snapshot, and is tried again by the next Sync.
func (r *Registry) Sync() {
	defer r.lookedNow()
	r.mu.Lock()
	r.sync()
	uids := r.missing()
	r.mu.Unlock()
	if len(uids) == 0 {
		return
	}
	// Without the lock: a pod that starts does not wait for a look at all processes.
	found, refused, err := r.finder.Find(uids)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.complain("search", "processes not searched for pods without an attachment", err)
	r.settle(uids, found, refused)
	r.sync()
}

// Put keeps the attachment and says whether its pod takes part from now on.
func (r *Registry) Put(a api.Attachment) (api.Admission, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := writeAttachment(r.cfg.Dir, a); err != nil {
		return api.Admission{}, fmt.Errorf("keep attachment: %w", err)
	}
	r.sync()
	for _, p := range r.pods {
		if p.ID == a.AttachmentID {
			return api.Admission{Enrolled: p.Enrolled, Reason: p.Reason}, nil
		}
	}
	return api.Admission{Reason: "network namespace " + a.Netns + " does not exist"}, nil
}

// Remove forgets an attachment. It succeeds if there is none.
func (r *Registry) Remove(id api.AttachmentID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := removeAttachment(r.cfg.Dir, id.FileName()); err != nil {
		return err
	}
	r.sync()
	return nil
}

// Collect forgets the attachments of a network that are not valid any more.
func (r *Registry) Collect(req api.GCRequest) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	valid := map[string]bool{}
	for _, id := range req.Valid {
		id.Network = req.Network
		valid[id.FileName()] = true
	}
	entries, err := readAttachments(r.cfg.Dir, r.entries)
	if err != nil {
		return err
	}
	var errs []error
	for name, e := range entries {
		if e.fileErr == nil && e.attachment.Network == req.Network && !valid[name] {
			errs = append(errs, removeAttachment(r.cfg.Dir, name))
		}
	}
	r.sync()
	return errors.Join(errs...)
}

// Stop ends all dealings with the kernel; every pod's reason is then the given one.
func (r *Registry) Stop(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = reason
	r.sync()
}

// Snapshot returns the result of the last Sync.
func (r *Registry) Snapshot() Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Snapshot{Pods: slices.Clone(r.pods), Cluster: r.cluster(), SourceError: r.sourceErr, PolicyError: r.policyErr}
}

func (r *Registry) sync() {
	var err error
	r.entries, err = readAttachments(r.cfg.Dir, r.entries)
	r.complain("attachments", "attachments not read, the last ones stay in force", err)
	for _, name := range slices.Sorted(maps.Keys(r.entries)) {
		r.findNetns(name)
	}
	content, err := r.cfg.Source.Content()
	if content != nil {
		r.content = content
	}
	r.sourceErr = err
	r.complain("source", "what pods ask for is not up to date, what was last known stays in force", err)

	r.decide()
	waiting := r.waiting()
	if r.stopped == "" && !waiting {
		r.started = true
		r.enrol()
		r.lookForRedirects()
		r.setPolicy()
		r.release()
	}
	changed := false
	for i := range r.pods {
		changed = r.finish(&r.pods[i], waiting) || changed
	}
	if changed && r.cfg.Report != nil {
		r.cfg.Report(slices.Clone(r.pods))
	}
}

// findNetns reads the cookie of an attachment's network namespace if it may have
// changed, and drops the attachment if the namespace is not there any more.
func (r *Registry) findNetns(name string) {
	e := r.entries[name]
	if e.fileErr != nil {
		if e.told == "" {
			e.told = e.fileErr.Error()
			r.cfg.Log.Warn("attachment ignored", "err", e.fileErr)
		}
		return
	}
	if e.read(r.cfg.NetnsCookie) {
		return
	}
	delete(r.entries, name)
	r.cfg.Log.Info("network namespace is gone", "pod", e.attachment.Pod.String(), "netns", e.attachment.Netns)
	r.complain("remove "+name, "attachment of a gone network namespace not deleted", removeAttachment(r.cfg.Dir, name))
}

// waiting tells whether the pods' wishes are still unknown, or where those are that
// an earlier agent has found, so that the state it left has to stay.
func (r *Registry) waiting() bool {
	return r.cfg.Refusal == "" && (r.content == nil || !r.started && len(r.missing()) > 0)
}

func (r *Registry) cluster() policy.Cluster {
	if r.content == nil {
		return policy.Cluster{}
	}
	cluster := r.content.Cluster
	if r.cfg.MaxPolicies > 0 {
		cluster.Share = policy.Share(r.cfg.MaxPolicies, len(r.policyPods))
	}
	return cluster
}

// decide fills r.pods: the attachments in the order of their file names, then
// the pods that r.searches is for. A pod without a reason is to be enrolled.
func (r *Registry) decide() {
	r.pods = nil
	attached := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(r.entries)) {
		e := r.entries[name]
		if e.fileErr != nil {
			continue
		}
		pod := e.attachment.Pod
		w, reason := r.wish(pod)
		if w != nil {
			attached[pod.String()] = true
		}
		r.add(e, w, reason)
	}
	r.search(attached)

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
		if shared[p.NetnsCookie] && p.Reason == "" {
			r.pods[i].Reason = "another pod is attached to the same network namespace"
		}
	}
}

// wish returns what a pod asks for. It is nil, and the reason says why, if that
// is not known.
func (r *Registry) wish(pod api.PodRef) (w *Wish, reason string) {
	if r.content == nil {
		reason := "waiting for " + r.cfg.Source.String()
		if r.sourceErr != nil {
			reason += ": " + r.sourceErr.Error()
		}
		return nil, reason
	}
	wish, ok := r.content.Pods[pod.String()]
	switch {
	case !ok:
		return nil, r.content.Unlisted
	case !wish.isFor(pod.UID):
		// Either the pod has been replaced, or its source does not tell of it yet.
		return nil, "another pod of the same name is known to " + r.cfg.Source.String()
	}
	return &wish, ""
}

// add appends a pod to r.pods with the first reason that keeps it out. Without
// a wish that is unknown.
func (r *Registry) add(e *entry, w *Wish, unknown string) {
	p := Pod{PodStatus: api.PodStatus{
		Pod:         e.attachment.Pod,
		ContainerID: e.attachment.ContainerID,
		Netns:       e.attachment.Netns,
		Addresses:   e.attachment.Addresses,
		NetnsCookie: e.cookie,
		Reason:      unknown,
	}, ID: e.attachment.AttachmentID, entry: e}
	p.Policy = policy.Pod{ID: e.cookie, Namespace: p.Pod.Namespace, Name: p.Pod.Name}
	if w != nil {
		p.Policy.Labels, p.Policy.Ports, p.Policy.Settings, p.Policy.Bandwidth = w.Labels, w.Ports, w.Settings, w.Bandwidth
		if len(w.Addresses) > 0 {
			// They may have changed since the attachment was made.
			p.Addresses = w.Addresses
		}
		p.Reason, p.Problem = w.out()
	}
	wants := p.Reason == ""
	out := func(reason string, problem Problem) {
		if p.Reason, p.Problem = reason, ""; wants {
			p.Problem = problem
		}
	}
	switch {
	case r.stopped != "":
		out(r.stopped, "")
	case e.netnsErr != nil && e.cookie == 0:
		out(e.netnsErr.Error(), "")
	case slices.Contains(r.cfg.HostNetns, e.cookie):
		out(ReasonHostNetwork, HostNetwork)
	case r.cfg.Refusal != "":
		out(r.cfg.Refusal, KernelRefused)
	case wants && e.cookie == 0:
		p.Reason = "no process of it is found yet"
		if e.refused != nil {
			p.Reason += ", and one in a cgroup of its name does not count: " + e.refused.Error()
		}
		if len(p.Addresses) == 0 {
			p.Reason = "waiting for its network"
		}
	}
	r.pods = append(r.pods, p)
}

// enrol takes in the pods that decide has picked; a failure becomes the reason.
func (r *Registry) enrol() {
	for i := range r.pods {
		p := &r.pods[i]
		if p.Reason != "" || r.enrolled[p.NetnsCookie] {
			continue
		}
		cookie, err := r.cfg.Datapath.Enrol(p.Netns)
		if err == nil {
			r.enrolled[cookie] = true
			if cookie != p.NetnsCookie {
				// release takes it out again, and the next findNetns drops the attachment.
				err = fmt.Errorf("network namespace %s was replaced meanwhile", p.Netns)
			}
		}
		// A pod that an earlier agent has enrolled is in all the same.
		if _, in := r.enrolled[p.NetnsCookie]; err != nil && !in {
			p.Reason, p.Problem = err.Error(), EnrolFailed
			err = nil
		}
		r.complain("enrol "+p.Netns, "pod not enrolled again, it stays as the earlier agent left it", err)
	}
}

// setPolicy writes the policy for the pods that take part if it is not in force yet.
func (r *Registry) setPolicy() {
	var taking []policy.Pod
	for _, p := range r.pods {
		if p.Reason == "" {
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
	// What was missing before a change is missing after it.
	if whole || err != nil {
		r.policyErr = err
	}
	if r.policyErr == nil {
		r.policyDelay = 0
	}
	r.complain("policy", "policy not complete, what is missing stays on TCP", r.policyErr)
}

// isFull tells whether an error is the kernel's word for a full map.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) }

// writePolicy writes what has changed, or all of it.
func (r *Registry) writePolicy(taking []policy.Pod, now time.Time, whole bool) error {
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

// release takes out the pods that do not take part any more. Their policy is
// revoked already, so that their connections are back on TCP.
func (r *Registry) release() {
	keep := map[uint64]bool{}
	for _, p := range r.pods {
		if p.Reason == "" {
			keep[p.NetnsCookie] = true
		}
	}
	for cookie := range r.enrolled {
		if keep[cookie] {
			continue
		}
		err := r.cfg.Datapath.Release(cookie)
		r.complain(fmt.Sprint("release ", cookie), "pod not released", err)
		if err == nil {
			delete(r.enrolled, cookie)
			delete(r.looks, cookie)
		}
	}
}

// finish completes a pod's status, and logs it and returns true if it has changed.
func (r *Registry) finish(p *Pod, waiting bool) bool {
	switch _, in := r.enrolled[p.NetnsCookie]; {
	case r.stopped != "":
	case waiting:
		p.Enrolled = in
	case p.Reason == "":
		p.Enrolled = true
		if end := p.Policy.Settings.PausedUntil; end.After(r.cfg.Now()) {
			p.Reason = "paused until " + end.Format(time.RFC3339)
		}
	}
	told := fmt.Sprint(p.Enrolled, p.NetnsCookie, p.Reason)
	if p.entry.told == told {
		return false
	}
	p.entry.told = told
	log := r.cfg.Log.With("pod", p.Pod.String(), "netns", p.Netns, "netns_cookie", p.NetnsCookie, "reason", p.Reason)
	if p.Enrolled {
		log.Info("pod takes part")
	} else {
		log.Info("pod stays on tcp")
	}
	return true
}

// complain logs a fault when it appears or changes.
func (r *Registry) complain(subject, msg string, err error) {
	if err == nil {
		delete(r.faults, subject)
		return
	}
	if r.faults[subject] != err.Error() {
		r.faults[subject] = err.Error()
		r.cfg.Log.Warn(msg, "err", err) //nolint:sloglint // every caller passes a constant
	}
}

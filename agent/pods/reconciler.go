// SPDX-License-Identifier: Apache-2.0

// Package pods knows the pods of this node and keeps the kernel in line with
// what they ask for. It owns the directory of attachments, where the CNI plugin
// leaves what the runtime told it, and takes what the pods ask for from a Source.
// A pod that the plugin has not told of is looked for among the processes of the
// node. Every change is in force within a second, but for the end of a network
// namespace, which nothing tells of: within ten. It never releases a pod that still
// takes part, so that live connections do not notice a restart.
//
// reconciler.go has the Reconciler and what others ask of it, store.go the attachments,
// source.go what pods ask for, search.go the pods without an attachment, decide.go
// what becomes of each pod, reconcile.go the work on the kernel, redirects.go the
// ports that pods redirect themselves, watch.go the watch of directories.
package pods

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podshunt/podshunt/agent/policy"
	"github.com/podshunt/podshunt/agent/proc"
	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

// wedged is how long a Sync takes at most: to write a whole policy map takes
// seconds, on a node that is very busy tens of them.
const wedged = 2 * time.Minute

// Datapath is what the reconciler does to the kernel.
type Datapath interface {
	// Enrol takes in the pod whose network namespace has the cookie. It and Release
	// are idempotent.
	Enrol(cookie uint64) error
	Release(cookie uint64) error
	// Enrolled lists the pods that are in, those of an earlier agent included.
	Enrolled() ([]uint64, error)
	// SetPolicy replaces the whole policy.
	SetPolicy(rules []rule.Rule) error
	// UpdatePolicy replaces the rules of the pairs of pods that are named.
	UpdatePolicy(changed []rule.PairRules) error
}

// Config is what a Reconciler works with; all of it but Refused and Report is required.
type Config struct {
	// Dir is the directory of attachments; it is made if needed.
	Dir    string
	Source Source
	// Proc is where the procfs of the node is mounted.
	Proc string
	// HostNetns are cookies of network namespaces that are the node's own.
	HostNetns []uint64
	// Refused is true if no pod at all may take part; Refusal says why.
	Refused  bool
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
	// block nor call the Reconciler.
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

	entry *entry
}

// Snapshot is the state of the reconciler.
type Snapshot struct {
	Pods []Pod
	// Cluster is what the policy was compiled with.
	Cluster policy.Cluster
	// SourceError and PolicyError are those of api.Status.
	SourceError, PolicyError error
}

// Reconciler is safe for concurrent use.
type Reconciler struct {
	cfg    Config
	finder proc.Finder

	mu          sync.Mutex
	store       store              // the attachments
	searches    map[string]*search // by name and UID, for the pods without an attachment
	nextSearch  time.Time
	content     *Content // what the source last said, nil before it has said anything
	sourceErr   error
	started     bool // the state that an earlier agent left has been replaced
	stopped     bool // nothing is done any more, for stopMessage
	stopMessage string
	pods        []Pod // the result of the last sync

	// enrolled are the cookies in the kernel, and whether this agent has enrolled them itself.
	enrolled map[uint64]bool
	// failed are the cookies that the last sync could not enrol. They have no policy
	// before they are in: it would come and go with each try.
	failed map[uint64]bool
	// releaseFailed is set if the last sync could not release a pod.
	releaseFailed bool
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

	// Run looks at everything at nextPass, and at nextTry for what could not be done;
	// tryDelay is how long that waited last. wake makes it compute anew when that is.
	nextPass, nextTry time.Time
	tryDelay          time.Duration
	wake              chan struct{}
	interval          time.Duration // passInterval, but for tests

	// looks are what is known of the rules in the pods' network namespaces, by cookie.
	looks map[uint64]*look

	// faults are those that have been logged and still last.
	faults map[string]string

	// looked is when Sync last ended. It is apart from mu, which a Sync that hangs holds.
	looked atomic.Pointer[time.Time]
}

// New returns a Reconciler that keeps what an earlier agent has enrolled until
// the first Sync decides on it.
func New(cfg Config) (*Reconciler, error) {
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	cookies, err := cfg.Datapath.Enrolled()
	if err != nil {
		return nil, fmt.Errorf("list enrolled pods: %w", err)
	}
	r := &Reconciler{
		cfg:      cfg,
		store:    store{dir: cfg.Dir, entries: map[string]*entry{}},
		wake:     make(chan struct{}, 1),
		interval: passInterval,
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
func (r *Reconciler) Alive() error {
	if last := *r.looked.Load(); r.cfg.Now().Sub(last) > wedged {
		return fmt.Errorf("pods and policies were last looked at at %s", last.Format(time.RFC3339))
	}
	return nil
}

func (r *Reconciler) lookedNow() {
	now := r.cfg.Now()
	r.looked.Store(&now)
}

// Put keeps the attachment and says whether its pod takes part from now on.
func (r *Reconciler) Put(a api.Attachment) (api.Admission, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.store.put(a); err != nil {
		return api.Admission{}, fmt.Errorf("keep attachment: %w", err)
	}
	r.sync(false)
	for _, p := range r.pods {
		if p.ID == a.AttachmentID {
			return api.Admission{Enrolled: p.Enrolled, Message: p.Message}, nil
		}
	}
	return api.Admission{Message: "network namespace " + a.Netns + " does not exist"}, nil
}

// Remove forgets an attachment. It succeeds if there is none.
func (r *Reconciler) Remove(id api.AttachmentID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.store.remove(id.FileName()); err != nil {
		return err
	}
	r.sync(false)
	return nil
}

// Collect forgets the attachments of a network that are not valid any more.
func (r *Reconciler) Collect(req api.GCRequest) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	valid := map[string]bool{}
	for _, id := range req.Valid {
		id.Network = req.Network
		valid[id.FileName()] = true
	}
	if _, err := r.store.refresh(); err != nil {
		return err
	}
	var errs []error
	for name, e := range r.store.entries {
		if e.fileErr == nil && e.attachment.Network == req.Network && !valid[name] {
			errs = append(errs, r.store.remove(name))
		}
	}
	r.sync(false)
	return errors.Join(errs...)
}

// Stop ends all dealings with the kernel; every pod's message is then the given one.
func (r *Reconciler) Stop(message string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped, r.stopMessage = true, message
	r.sync(false)
}

// Snapshot returns the result of the last Sync.
func (r *Reconciler) Snapshot() Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Snapshot{Pods: slices.Clone(r.pods), Cluster: r.cluster(), SourceError: r.sourceErr, PolicyError: r.policyErr}
}

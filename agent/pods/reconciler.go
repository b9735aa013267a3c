// SPDX-License-Identifier: Apache-2.0

// Package pods knows the pods of this node and keeps the kernel in line with what
// they ask for. It owns the directory of attachments, where the CNI plugin leaves
// what the runtime told it, and takes what the pods ask for from a Source. A pod
// that the plugin has not told of is looked for among the processes of the node.
// Every change is in force within a second, except the end of a network namespace,
// which causes no event: within ten. It never releases a pod that still takes part,
// so that live connections do not notice a restart.
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

// wedged bounds the time of a Sync: one that takes longer hangs. To write a whole
// policy map takes seconds, and tens of seconds on a very busy node.
const wedged = 2 * time.Minute

// Datapath is the part of datapath.Datapath that the reconciler uses.
type Datapath interface {
	// Enrol lets the pod whose network namespace has the cookie take part. It and
	// Release are idempotent.
	Enrol(cookie uint64) error
	Release(cookie uint64) error
	// Enrolled lists the cookies of pods that take part, including those that an
	// earlier agent has enrolled.
	Enrolled() ([]uint64, error)
	// SetPolicy replaces the whole policy.
	SetPolicy(rules []rule.Rule) error
	// UpdatePolicy replaces the rules of the given pairs of pods.
	UpdatePolicy(changed []rule.PairRules) error
}

// Config configures a Reconciler; all fields are required unless they say otherwise.
type Config struct {
	// Dir is the directory of attachments; it is made if needed.
	Dir    string
	Source Source
	// Proc is the path where the procfs of the node is mounted.
	Proc string
	// HostNetns are the cookies of the node's own network namespaces.
	HostNetns []uint64
	// Refused keeps all pods on TCP; Refusal says why. Optional.
	Refused  bool
	Refusal  string
	Datapath Datapath
	// MaxPolicies is the size of the policy map in entries; 0 sets no limit for a
	// pair of pods.
	MaxPolicies int
	// NetnsCookie reads the cookie of the network namespace at a path.
	NetnsCookie func(path string) (uint64, error)
	// Redirects reports whether the network namespace at a path gives incoming connections
	// another port, as nat.Redirects does. If nil, none does.
	Redirects func(path string) (bool, error)
	// Report is called with all pods when one of them has changed. It must neither
	// block nor call the Reconciler. Optional.
	Report func([]Pod)
	// Now is the clock.
	Now func() time.Time
	Log *slog.Logger
}

// Pod is an attachment, or a pod without one that wants to take part, with what
// it asks for.
type Pod struct {
	api.PodStatus
	// ID is the attachment's ID; zero if there is no attachment.
	ID api.AttachmentID
	// Policy is the pod as the policy sees it. Its Settings are zero if the
	// pod's annotations are not known or not accepted.
	Policy policy.Pod

	entry *entry
}

// Snapshot is the state of the reconciler.
type Snapshot struct {
	Pods []Pod
	// Cluster was used to compile the policy.
	Cluster policy.Cluster
	// SourceError and PolicyError become the fields of the same names in
	// api.Status.
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

	// enrolled has the cookies in the kernel; true for those that this agent has enrolled
	// itself.
	enrolled map[uint64]bool
	// failed has the cookies that the last sync could not enrol. Their policy is
	// written only after they are enrolled: otherwise it would come and go with each
	// try.
	failed map[uint64]bool
	// releaseFailed is set if the last sync could not release a pod.
	releaseFailed bool
	// compiler made the policy in the kernel, from policyPods and policyContent;
	// policyErr says what of it is missing. At policyEnd it changes by time alone.
	compiler      *policy.Compiler
	policyPods    []policy.Pod
	policyContent *Content
	policyEnd     time.Time
	policyErr     error
	// The whole policy is written again at policyNext, and policyDelay after
	// that.
	policyNext  time.Time
	policyDelay time.Duration

	// Run looks at everything at nextPass, and tries again at nextTry what has
	// failed, tryDelay after the last try. wake makes Run compute these times anew.
	nextPass, nextTry time.Time
	tryDelay          time.Duration
	wake              chan struct{}
	interval          time.Duration // passInterval, but for tests

	// looks has, by cookie, what is known of the rules in the pods' network
	// namespaces.
	looks map[uint64]*look

	// faults has the faults that have been logged and still last, by subject.
	faults map[string]string

	// looked has the time when Sync last ended. It does not need mu, which a Sync that
	// hangs would hold.
	looked atomic.Pointer[time.Time]
}

// New returns a Reconciler. Pods that an earlier agent has enrolled stay so until
// the source has said what they ask for.
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

// Alive returns an error if the last Sync ended too long ago: the agent then follows
// neither pods nor policies, and only a new process helps.
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

// Put keeps the attachment and returns whether its pod takes part from now on.
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

// Stop ends all work on the kernel for good. Every pod gets the state out and the
// message.
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

// SPDX-License-Identifier: Apache-2.0

// The agent's answers to the commands.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/cri"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/explain"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

// node answers the command line.
type node struct {
	reconciler *pods.Reconciler
	datapath   *datapath.Datapath
	installer  *cniconf.Installer // nil if the plugin is not to be installed
	log        *slog.Logger
	// attachmentsDir and proc are where an unload with force looks for network
	// namespaces.
	attachmentsDir, proc string
	// fixed has the parts of the status that do not change.
	fixed    api.Status
	runtime  *cri.Node
	lease    *lease
	unloaded atomic.Bool
	drained  atomic.Bool // the agent is about to load, and cannot unload before
	claiming sync.Mutex  // held to set one of the two, unless the other one is set
	listing  sync.Mutex  // held by Flows: its requests wait for each other
}

var _ server.Node = (*node)(nil)

func newNode(r *pods.Reconciler, d *datapath.Datapath, cfg config, e api.KernelReport, log *slog.Logger) *node {
	return &node{reconciler: r, datapath: d, log: log, attachmentsDir: attachmentsIn(cfg.runDir), proc: cfg.proc, fixed: api.Status{
		TypeMeta:        api.TypeMeta{APIVersion: api.Version, Kind: api.KindStatus},
		Version:         version,
		Kernel:          e.Kernel,
		Observer:        d.Observer(),
		NewConnections:  newConnections(d.JoinAfter() > 0, d.NoWatch()),
		OpenConnections: openConnections(d.NoJoin()),
		Cgroup:          d.Cgroup(),
		PinDir:          cfg.datapath.PinDir,
		Hazards:         e.Hazards,
		AcceptedHazards: e.AcceptedHazards,
		Node:            e.Node,
	}}
}

// Status returns the state of the agent, its pods and its kernel objects.
func (n *node) Status() (api.Status, error) {
	status := n.fixed
	status.Unloaded = n.unloaded.Load()
	if err := n.replacing(); err != nil {
		status.Replacing = err.Error()
	}
	snapshot := n.reconciler.Snapshot()
	for _, p := range snapshot.Pods {
		status.Pods = append(status.Pods, p.PodStatus)
	}
	if err := snapshot.SourceError; err != nil {
		status.SourceError = err.Error()
	}
	if err := snapshot.PolicyError; err != nil {
		status.PolicyError = err.Error()
	}
	r, _ := n.runtime.Runtime()
	status.Runtime = &r
	if n.installer != nil {
		state := n.installer.State()
		status.CNI = &state
	}
	status.Guards = n.datapath.Guards()
	untraced, err0 := n.datapath.UpdateTraced()
	if untraced != nil {
		status.Untraced = untraced.Error()
	}
	if errors.Is(err0, datapath.ErrUnloaded) {
		err0 = nil
	}
	status.Lease = n.lease.state()
	ports, err1 := n.ports()
	view := explain.NewView(snapshot.Pods, snapshot.Cluster, ports, time.Now())
	status.UnsupportedPorts, status.JoinPorts = view.UnsupportedPorts(ports.Unsupported), view.JoinPorts(ports.Join)
	var err2, err3 error
	status.Maps, err2 = n.datapath.Maps()
	status.Outcomes, err3 = n.datapath.Outcomes()
	return status, errors.Join(err0, err1, err2, err3)
}

// ports returns what is known of server ports.
func (n *node) ports() (explain.Ports, error) {
	unsupported, err1 := n.datapath.UnsupportedPorts()
	join, err2 := n.datapath.JoinPorts()
	return explain.Ports{Unsupported: unsupported, Join: join, JoinAfter: n.datapath.JoinAfter()}, errors.Join(err1, err2)
}

// Forget lets new connections to server ports be paired again.
func (n *node) Forget(req api.Selector) (api.ForgetResult, error) {
	cookies := map[uint64]bool{}
	for _, p := range n.reconciler.Snapshot().Pods {
		if p.Pod.String() == req.Pod && p.NetnsCookie != 0 {
			cookies[p.NetnsCookie] = true
		}
	}
	if req.Pod != "" && len(cookies) == 0 {
		return api.ForgetResult{}, fmt.Errorf("pod %s: not on this node; `podshunt-agent status` lists those that are", req.Pod)
	}
	forgotten, err := n.datapath.Forget(func(server, client uint64, port uint16) bool {
		return (req.Pod == "" || cookies[server] || cookies[client]) && (req.Port == 0 || req.Port == port)
	})
	return api.ForgetResult{Forgotten: forgotten}, err
}

// Flows returns the chosen connections of pods that want to take part, paired or
// not.
func (n *node) Flows(ctx context.Context, chosen api.Selector) ([]api.Flow, error) {
	n.listing.Lock()
	defer n.listing.Unlock()
	snapshot := n.reconciler.Snapshot()
	ports, err := n.ports()
	if err != nil {
		return nil, err
	}
	view := explain.NewView(snapshot.Pods, snapshot.Cluster, ports, time.Now())
	// Read before and after, because connections come and go while sockets are listed.
	before, err := n.datapath.Flows()
	if err != nil {
		return nil, err
	}
	var sockets []explain.Socket
	if view.NeedsSockets() {
		if sockets, err = n.sockets(ctx, view.Pods()); err != nil {
			return nil, err
		}
	}
	paired, err := n.datapath.Flows()
	if err != nil {
		return nil, err
	}
	flows := view.Paired(paired)
	flows = append(flows, view.Unpaired(sockets, before, paired)...)
	flows = slices.DeleteFunc(flows, func(f api.Flow) bool { return !chosen.Chooses(f) })
	explain.Sort(flows)
	return flows, nil
}

// sockets lists the sockets of pods, as far as that works. The kernel walks all sockets
// of the node for each pod, so that as many pods are asked at a time as there are cores.
func (n *node) sockets(ctx context.Context, all []pods.Pod) ([]explain.Socket, error) {
	found := make([][]explain.Socket, len(all))
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, p := range all {
		group.Go(func() (err error) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if found[i], err = explain.Sockets(p.Netns, p.NetnsCookie); err != nil {
				n.log.Debug("sockets of a pod not listed", "pod", p.Pod.String(), "err", err)
			}
			return nil
		})
	}
	err := group.Wait()
	return slices.Concat(found...), err
}

// Unload takes everything out of the kernel. The agent does nothing more after it,
// even if it fails. With force, connections that have not read before ctx ends are
// reset.
func (n *node) Unload(ctx context.Context, force bool) (api.UnloadResult, error) {
	if !n.claim(&n.unloaded, &n.drained) {
		return api.UnloadResult{}, errors.New("the agent has just taken out what another build had loaded, and is about to load: try again")
	}
	n.reconciler.Stop("podshunt was unloaded: restart the agent to take part again")
	snapshot := n.reconciler.Snapshot()
	view := explain.NewView(snapshot.Pods, snapshot.Cluster, explain.Ports{JoinAfter: n.datapath.JoinAfter()}, time.Now())
	return unloader{n.datapath, view, force, n.attachmentsDir, n.proc}.run(ctx)
}

// claim sets one of unloaded and drained, unless the other one is set.
func (n *node) claim(one, other *atomic.Bool) bool {
	n.claiming.Lock()
	defer n.claiming.Unlock()
	if other.Load() {
		return false
	}
	one.Store(true)
	return true
}

// Uninstall takes the plugin out of the CNI configuration, and then unloads. In this
// order, no new pod asks an agent that does nothing more.
func (n *node) Uninstall(ctx context.Context, force bool) (api.UnloadResult, error) {
	var remarks []string
	if n.installer != nil {
		var err error
		if remarks, err = n.installer.Uninstall(); err != nil {
			return api.UnloadResult{}, err
		}
	}
	result, err := n.Unload(ctx, force)
	result.Remarks = remarks
	return result, err
}

// ready returns an error if the kernel objects are not loaded. It returns nil if no
// pod may take part: the agent still does all that it should.
func (n *node) ready() error {
	if n.unloaded.Load() {
		return errors.New("unloaded: nothing is shortcut until the agent is started again")
	}
	return n.replacing()
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/cniconf"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/agent/pods"
	"github.com/podshunt/podshunt/agent/server"
	"github.com/podshunt/podshunt/api"
)

// node answers the command line.
type node struct {
	registry *pods.Registry
	datapath *datapath.Datapath
	keeper   *cniconf.Keeper // nil if the plugin is not to be installed
	log      *slog.Logger
	// fixed is the part of the status that does not change.
	fixed    api.Status
	unloaded atomic.Bool
	listing  sync.Mutex // held while sockets are listed, so that many askers cost no more than one
}

var _ server.Node = (*node)(nil)

func newNode(r *pods.Registry, d *datapath.Datapath, cfg config, hazards []api.Hazard, log *slog.Logger) (*node, error) {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return nil, fmt.Errorf("read the kernel's release: %w", err)
	}
	return &node{registry: r, datapath: d, log: log, fixed: api.Status{
		Version:         version,
		Kernel:          unix.ByteSliceToString(uname.Release[:]),
		Observer:        d.Observer(),
		Cgroup:          d.Cgroup(),
		PinDir:          cfg.datapath.PinDir,
		Hazards:         hazards,
		HazardsAccepted: cfg.hazards == "accept",
	}}, nil
}

// Status returns the state of the agent, its pods and its kernel objects.
func (n *node) Status() (api.Status, error) {
	status := n.fixed
	status.Unloaded = n.unloaded.Load()
	snapshot := n.registry.Snapshot()
	for _, p := range snapshot.Pods {
		status.Pods = append(status.Pods, p.PodStatus)
	}
	if err := snapshot.SourceError; err != nil {
		status.SourceError = err.Error()
	}
	if err := snapshot.PolicyError; err != nil {
		status.PolicyError = err.Error()
	}
	if n.keeper != nil {
		state := n.keeper.State()
		status.CNI = &state
	}
	var err1, err2 error
	status.Maps, err1 = n.datapath.Maps()
	status.Outcomes, err2 = n.datapath.Outcomes()
	return status, errors.Join(err1, err2)
}

// Flows returns the paired connections, and those of opted-in pods that are not
// paired with the reason.
func (n *node) Flows(ctx context.Context) ([]api.Flow, error) {
	n.listing.Lock()
	defer n.listing.Unlock()
	snapshot := n.registry.Snapshot()
	v := newView(snapshot.Pods, snapshot.Cluster, time.Now())
	// Asked before and after, because connections come and go while sockets are listed.
	before, err := n.datapath.Flows()
	if err != nil {
		return nil, err
	}
	var sockets []socket
	if v.anyWants() {
		for _, p := range v.pods {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			found, err := listSockets(p.Netns, p.NetnsCookie)
			if err != nil {
				n.log.Debug("sockets of a pod not listed", "pod", p.Pod.String(), "err", err)
			}
			sockets = append(sockets, found...)
		}
	}
	paired, err := n.datapath.Flows()
	if err != nil {
		return nil, err
	}
	flows := v.paired(paired)
	flows = append(flows, v.unpaired(sockets, append(before, paired...))...)
	sortFlows(flows)
	return flows, nil
}

// Unload takes everything out of the kernel. The agent does nothing any more
// after it, whether it succeeds or not.
func (n *node) Unload(ctx context.Context) (api.UnloadResult, error) {
	n.unloaded.Store(true)
	n.registry.Stop("podshunt was unloaded: restart the agent to take part again")
	snapshot := n.registry.Snapshot()
	return unload(ctx, n.datapath, newView(snapshot.Pods, snapshot.Cluster, time.Now()))
}

// Uninstall takes the plugin out of the CNI configuration first, so that no new
// pod asks for an agent that does nothing any more, and unloads.
func (n *node) Uninstall(ctx context.Context) (api.UnloadResult, error) {
	if n.keeper != nil {
		if err := n.keeper.Uninstall(); err != nil {
			return api.UnloadResult{}, err
		}
	}
	return n.Unload(ctx)
}

// ready returns why the kernel objects are not there. That no pod may take part
// is no such reason: the agent does all that it should.
func (n *node) ready() error {
	if n.unloaded.Load() {
		return errors.New("unloaded: nothing is shortcut until the agent is started again")
	}
	return nil
}

func unload(ctx context.Context, d *datapath.Datapath, v *view) (api.UnloadResult, error) {
	waiting, err := d.Unload(ctx)
	if len(waiting) > 0 {
		return api.UnloadResult{Waiting: v.paired(waiting)}, nil
	}
	return api.UnloadResult{Done: err == nil}, err
}

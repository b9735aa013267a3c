// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// cniTimeout limits one verb, which runs a handful of short-lived processes.
const cniTimeout = time.Minute

// PodOptions are a pod's settings; the zero value is useful.
type PodOptions struct {
	// Conflist is the JSON of the pod's network configuration. Default: Sandbox.Conflist().
	Conflist string
	// Namespace is the Kubernetes namespace. Default: "default".
	Namespace string
	// UID is the Kubernetes UID. Default: one made from the container id.
	UID string
	// CapabilityArgs are arguments for the plugins that declare the capability, such as portMappings.
	CapabilityArgs map[string]any
}

// Pod is a network namespace that CNI plugins have wired.
type Pod struct {
	*Netns
	Namespace, Name, UID string
	// ContainerID differs between pods of one name.
	ContainerID string
	// IPv4 and IPv6 are the first address of each family, or the zero Addr.
	IPv4, IPv6 netip.Addr
	// Result is what the last plugin printed.
	Result *types100.Result

	network *libcni.NetworkConfigList
	runtime *libcni.RuntimeConf
}

// AddPod makes a pod, with interface eth0, by a CNI ADD. Close deletes it if
// DelPod has not.
func (s *Sandbox) AddPod(name string, opts PodOptions) (_ *Pod, err error) {
	network, err := s.parse(opts.Conflist)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.added++
	id := fmt.Sprintf("%s-%d", name, s.added)
	s.mu.Unlock()
	p := &Pod{
		Namespace: cmp.Or(opts.Namespace, "default"), Name: name, UID: cmp.Or(opts.UID, "uid-"+id),
		ContainerID: id, network: network,
	}
	if p.Netns, err = newNetns(s.netnsPath(id)); err != nil {
		return nil, err
	}
	p.runtime = &libcni.RuntimeConf{
		ContainerID: id, NetNS: p.Path, IfName: "eth0", CapabilityArgs: opts.CapabilityArgs,
		Args: [][2]string{
			// Plugins otherwise refuse names that they do not know.
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_UID", p.UID},
			{"K8S_POD_INFRA_CONTAINER_ID", id},
		},
	}
	s.mu.Lock()
	s.pods = append(s.pods, p)
	s.mu.Unlock()
	if err := s.add(p); err != nil {
		// The specification wants a DEL after an ADD that failed.
		return nil, errors.Join(fmt.Errorf("add pod %s: %w", id, err), s.DelPod(p))
	}
	return p, nil
}

// add runs ADD and fills in what it answers.
func (s *Sandbox) add(p *Pod) error {
	var result types.Result
	err := s.onNode(func(ctx context.Context) (err error) {
		result, err = s.cni.AddNetworkList(ctx, p.network, p.runtime)
		return err
	})
	if err != nil {
		return err
	}
	if p.Result, err = types100.NewResultFromResult(result); err != nil {
		return err
	}
	for _, ip := range p.Result.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return fmt.Errorf("result has no address in %v", ip)
		}
		if addr = addr.Unmap(); addr.Is4() {
			p.IPv4 = cmp.Or(p.IPv4, addr)
		} else {
			p.IPv6 = cmp.Or(p.IPv6, addr)
		}
	}
	return nil
}

// DelPod undoes AddPod: a CNI DEL, after which the network namespace is given
// up even if DEL reports an error. It may be called again; each time runs DEL.
func (s *Sandbox) DelPod(p *Pod) error {
	s.mu.Lock()
	s.pods = slices.DeleteFunc(s.pods, func(other *Pod) bool { return other == p })
	s.mu.Unlock()
	err := s.onNode(func(ctx context.Context) error { return s.cni.DelNetworkList(ctx, p.network, p.runtime) })
	if err != nil {
		err = fmt.Errorf("delete pod %s: %w", p.ContainerID, err)
	}
	return errors.Join(err, p.remove())
}

// Check runs the CNI verb CHECK for a pod. Its error is that of the plugin.
func (s *Sandbox) Check(p *Pod) error {
	return s.onNode(func(ctx context.Context) error { return s.cni.CheckNetworkList(ctx, p.network, p.runtime) })
}

// Status runs the CNI verb STATUS for a conflist, by default Conflist(). Its
// error is that of the first plugin that has one.
func (s *Sandbox) Status(conflist string) error {
	network, err := s.parse(conflist)
	if err != nil {
		return err
	}
	return s.onNode(func(ctx context.Context) error { return s.cni.GetStatusNetworkList(ctx, network) })
}

// GC runs the CNI verb GC for a conflist, by default Conflist(): every
// attachment of its network but those of the valid pods is deleted. A deleted
// pod's namespace stays until DelPod.
func (s *Sandbox) GC(conflist string, valid ...*Pod) error {
	network, err := s.parse(conflist)
	if err != nil {
		return err
	}
	args := &libcni.GCArgs{}
	for _, p := range valid {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: p.ContainerID, IfName: p.runtime.IfName})
	}
	return s.onNode(func(ctx context.Context) error { return s.cni.GCNetworkList(ctx, network, args) })
}

func (s *Sandbox) parse(conflist string) (*libcni.NetworkConfigList, error) {
	if conflist == "" {
		conflist = s.Conflist()
	}
	return libcni.NetworkConfFromBytes([]byte(conflist))
}

// onNode calls fn so that plugins that it starts run in the node's network
// namespace, where they put the host end of a pod's link.
func (s *Sandbox) onNode(fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), cniTimeout)
	defer cancel()
	return s.Node.Do(func() error { return fn(ctx) })
}

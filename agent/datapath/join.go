// SPDX-License-Identifier: Apache-2.0

// Open connections become flows: when the agent looks at them, and how it finds the ends
// that belong together. joinrounds.go lets these join; bpf/late.h is the kernel's half.

package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// Netns is a network namespace: its cookie, and a path by which it can be entered.
type Netns struct {
	Cookie uint64
	Path   string
}

// joiner lets open connections join. It is nil in a Datapath on a kernel that cannot.
type joiner struct {
	objects    *ebpf.Collection
	find, join *link.Iter

	// killed ends joinAll before a round, as if the agent was killed; nil but in tests.
	killed func() error

	mu      sync.Mutex // held while connections join
	ended   bool       // an unload has begun
	evicted uint64     // the counter of sockets to be evicted, when the last of them was
}

// joinPrograms returns the names of the iterators.
func joinPrograms() []string {
	return []string{bpf.ShortcutProgFindSockets, bpf.ShortcutProgJoinSockets}
}

// newJoiner loads the iterators. The map joining is not pinned: what an agent that was
// killed has left in it is found again.
func newJoiner(shared map[string]*ebpf.Map, types *btf.Cache) (_ *joiner, err error) {
	if err := CheckJoin(); err != nil {
		return nil, err
	}
	j := &joiner{}
	defer func() {
		if err != nil {
			err = errors.Join(err, j.close())
		}
	}()
	if j.objects, err = loadIterators(shared, joinPrograms(), types); err != nil {
		return nil, err
	}
	for name, to := range map[string]**link.Iter{bpf.ShortcutProgFindSockets: &j.find, bpf.ShortcutProgJoinSockets: &j.join} {
		if *to, err = link.AttachIter(link.IterOptions{Program: j.objects.Programs[name]}); err != nil {
			return nil, fmt.Errorf("attach iterator %s: %w", name, err)
		}
	}
	return j, nil
}

// loadIterators loads iterators that use the shared maps.
func loadIterators(shared map[string]*ebpf.Map, names []string, types *btf.Cache) (*ebpf.Collection, error) {
	spec, err := bpf.LoadShortcut()
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return !slices.Contains(names, name) })
	replacements := map[string]*ebpf.Map{}
	for name, m := range sharedMaps(spec) {
		replacements[name] = shared[name]
		m.MaxEntries = shared[name].MaxEntries()
	}
	spec.Maps[bpf.ShortcutMapJoining].MaxEntries = shared[bpf.ShortcutMapSockets].MaxEntries()
	objects, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements, Cache: types})
	if err != nil {
		return nil, fmt.Errorf("load the iterators: %w", err)
	}
	return objects, nil
}

// CheckJoin returns why open connections cannot join on the running kernel, or nil.
func CheckJoin() error {
	v, err := RunningVersion()
	if err != nil {
		return err
	}
	if !v.iteratesTCP() {
		return fmt.Errorf("to look at the open connections of a pod would put the memory of kernel %s at risk (CVE-2026-74714): "+
			"needed is 6.1.183, 6.6.152, 6.12.104, 6.18.45, 7.1.9, or 7.2 and later", release())
	}
	return nil
}

// iteratesTCP reports whether an iterator over TCP sockets is safe. Hazard: while a SYN
// arrives, it may free a connection that is being made and is still used (CVE-2026-74714,
// fixed by e5fd3f514e27). It goes by the version, because a measurement would do the
// damage. The kernels with the fix can also put a socket into a SOCKHASH meanwhile, where
// others hang (before 6.1.42, 6.4.7 and 6.5).
func (v KernelVersion) iteratesTCP() bool {
	if v.Major > 7 || v.Major == 7 && v.Minor >= 2 {
		return true
	}
	since, ok := map[[2]int]int{{6, 1}: 183, {6, 6}: 152, {6, 12}: 104, {6, 18}: 45, {7, 1}: 9}[[2]int{v.Major, v.Minor}]
	return ok && v.Patch >= since
}

// LateCallbacks reports whether an iterator can ask for the callbacks of a socket
// (TCP_BPF_SOCK_OPS_CB_FLAGS by bpf_setsockopt, 6.12).
func (v KernelVersion) LateCallbacks() bool { return v.Major > 6 || v.Major == 6 && v.Minor >= 12 }

// joinWithoutCallbacks reports whether open connections join, and get no callbacks.
func (c Config) joinWithoutCallbacks() bool {
	v, err := RunningVersion()
	return err == nil && v.iteratesTCP() && (!v.LateCallbacks() || c.noLateCallbacks)
}

func (j *joiner) close() error {
	if j == nil {
		return nil
	}
	var errs []error
	for _, l := range []*link.Iter{j.find, j.join} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	if j.objects != nil {
		j.objects.Close()
	}
	return errors.Join(errs...)
}

// end waits until no connection joins any more, and lets none join later.
func (j *joiner) end() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = true
}

// getJoiner returns the joiner, or nil on a kernel that has none and after an unload. Who
// calls its methods holds its mu, which comes before that of d.
func (d *Datapath) getJoiner() *joiner {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.joiner
}

// NoJoin returns why open connections cannot join, or nil.
func (d *Datapath) NoJoin() error { return d.noJoin }

// JoinDue says that something new is allowed: call Join.
func (d *Datapath) JoinDue() <-chan struct{} { return d.joinDue }

// due notes the pairs of pods for which something new is allowed. The caller holds mu.
func (d *Datapath) due(pods podPair, had []entry) {
	if d.joiner == nil {
		return
	}
	for _, e := range d.policy[pods] {
		if e.value.Verdict == bpf.ShortcutVerdictVERDICT_REFUSE {
			continue
		}
		at, found := slices.BinarySearchFunc(had, e, compareKeys)
		if !found || had[at].value.Verdict == bpf.ShortcutVerdictVERDICT_REFUSE || e.value.Blocking > had[at].value.Blocking {
			d.duePairs[pods] = true
			return
		}
	}
}

// announceDue tells JoinDue if pairs are due.
func (d *Datapath) announceDue() {
	if len(d.duePairs) == 0 {
		return
	}
	select {
	case d.joinDue <- struct{}{}:
	default:
	}
}

// takeDue returns the pairs that are due and of which both pods take part and are among
// the given ones. These are not due any more.
func (d *Datapath) takeDue(pods map[uint64]Netns) (map[podPair]bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, ErrUnloaded
	}
	enrolled, err := entries[uint64, uint32](d.objects.Maps[bpf.ShortcutMapPods])
	if err != nil {
		return nil, fmt.Errorf("read the pods map: %w", err)
	}
	takesPart := func(cookie uint64) bool {
		_, known := pods[cookie]
		_, in := enrolled[cookie]
		return known && in
	}
	taken := map[podPair]bool{}
	for pair := range d.duePairs {
		switch {
		case len(d.policy[pair]) == 0:
			delete(d.duePairs, pair)
		case takesPart(pair.client) && takesPart(pair.server):
			taken[pair] = true
			delete(d.duePairs, pair)
		}
	}
	return taken, nil
}

// Join lets the open connections join for which something new is allowed since the last
// call: these are now flows, as if they had been paired when they were made. pods are
// all pods that take part. It returns how many connections have joined. What could not
// be looked at is due again. It takes up to some seconds, during which other methods may
// be called; Unload waits for it.
func (d *Datapath) Join(ctx context.Context, pods []Netns) (joined int, err error) {
	j := d.getJoiner()
	if j == nil {
		return 0, nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ended {
		return 0, ErrUnloaded
	}
	known := map[uint64]Netns{}
	for _, p := range pods {
		known[p.Cookie] = p
	}
	pairs, err := d.takeDue(known)
	if err != nil || len(pairs) == 0 {
		return 0, err
	}
	sockets, err := j.findSockets(ctx, pairs, known)
	found := match(sockets, pairs)
	left, joinErr := j.joinAll(ctx, found, known)
	if err = errors.Join(err, joinErr, ctx.Err()); err != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		maps.Copy(d.duePairs, pairs)
	}
	return len(found) - left, err
}

// findSockets lists the sockets of the pods of some pairs that may join. It looks first at
// the pods that have most peers: such a pod may be new, and have no connections, so that
// the others need not be looked at.
func (j *joiner) findSockets(ctx context.Context, pairs map[podPair]bool, pods map[uint64]Netns) ([]bpf.ShortcutOpenSocket, error) {
	peers := map[uint64]map[uint64]bool{}
	for pair := range pairs {
		for _, ends := range [][2]uint64{{pair.client, pair.server}, {pair.server, pair.client}} {
			if peers[ends[0]] == nil {
				peers[ends[0]] = map[uint64]bool{}
			}
			peers[ends[0]][ends[1]] = true
		}
	}
	order := slices.SortedFunc(maps.Keys(peers), func(a, b uint64) int { return len(peers[b]) - len(peers[a]) })
	var (
		all  []bpf.ShortcutOpenSocket
		errs []error
	)
	none := map[uint64]bool{} // pods that have no such socket
	for _, cookie := range order {
		needed := false
		for peer := range peers[cookie] {
			needed = needed || !none[peer]
		}
		if !needed || ctx.Err() != nil {
			continue
		}
		listed, err := iterate(j.find, pods[cookie].Path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		sockets := make([]bpf.ShortcutOpenSocket, len(listed)/binary.Size(bpf.ShortcutOpenSocket{}))
		if _, err := binary.Decode(listed, binary.NativeEndian, sockets); err != nil {
			return nil, fmt.Errorf("read the sockets of netns %s: %w", pods[cookie].Path, err)
		}
		none[cookie] = len(sockets) == 0
		all = append(all, sockets...)
	}
	return all, errors.Join(errs...)
}

// openIterator is it.Open. That gives the descriptor to an object which nobody refers to any
// more when it gives it up, so that the garbage collector may close the number once more,
// whatever it stands for by then (the documentation of runtime.Cleanup.Stop; ebpf 0.22.0).
func openIterator(it *link.Iter) (io.ReadCloser, error) {
	attr := struct{ link, flags uint32 }{link: uint32(it.FD())} // of BPF_ITER_CREATE
	fd, _, no := unix.Syscall(unix.SYS_BPF, unix.BPF_ITER_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(it)
	if no != 0 {
		return nil, fmt.Errorf("open the iterator: %w", no)
	}
	return os.NewFile(fd, "bpf_iter"), nil // the kernel has made it close on exec
}

// iterate runs an iterator over the sockets of a network namespace, and returns what it
// writes.
func iterate(it *link.Iter, path string) ([]byte, error) {
	var r io.ReadCloser
	// The kernel takes the network namespace of the thread that opens the iterator.
	if err := ns.WithNetNSPath(path, func(ns.NetNS) (err error) {
		r, err = openIterator(it)
		return err
	}); err != nil {
		return nil, fmt.Errorf("look at the sockets of netns %s: %w", path, err)
	}
	defer r.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("look at the sockets of netns %s: %w", path, err)
	}
	return out, nil
}

// numbers are where the two streams of a connection began, as one of its ends sees it.
type numbers struct{ sends, receives uint32 }

// match finds the sockets that belong together. TCP counts the SYN of the client among the
// bytes that were acknowledged, and no other. For example, a client whose stream began at
// 4001 has the numbers 4000 and 7001, and its server 7001 and 4001. Sockets with equal
// numbers cannot be told apart, and do not join.
func match(sockets []bpf.ShortcutOpenSocket, pairs map[podPair]bool) (found []bpf.ShortcutJoinEntry) {
	ends := map[numbers]int{}
	for i, s := range sockets {
		n := numbers{s.SendsFrom, s.ReceivesFrom}
		if _, twice := ends[n]; twice {
			i = -1
		}
		ends[n] = i
	}
	for i, c := range sockets {
		at, ok := ends[numbers{c.ReceivesFrom, c.SendsFrom + 1}]
		if !ok || at < 0 || at == i || ends[numbers{c.SendsFrom, c.ReceivesFrom}] < 0 {
			continue
		}
		s := sockets[at]
		if !pairs[podPair{c.Netns, s.Netns}] {
			continue
		}
		found = append(found, bpf.ShortcutJoinEntry{
			Flow:        c.Cookie,
			Cookie:      [2]uint64{client: c.Cookie, server: s.Cookie},
			Netns:       [2]uint64{client: c.Netns, server: s.Netns},
			ClientAddr:  c.LocalAddr,
			ClientPort:  c.LocalPort,
			OrigDstAddr: c.RemoteAddr,
			OrigDstPort: c.RemotePort,
			ServerAddr:  s.LocalAddr,
			ServerPort:  s.LocalPort,
			ClientSeq:   c.SendsFrom + 1,
			ServerSeq:   c.ReceivesFrom,
		})
	}
	return found
}

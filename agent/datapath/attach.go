// SPDX-License-Identifier: Apache-2.0

// Attaching programs: links that are pinned with them, and taken over.

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/bpf"
)

// Names of the pinned links; the observer's is followed by its kind.
const (
	pinTrack   = "link_track"
	pinDeliver = "link_deliver"
	pinObserve = "link_observe_"
	pinNoMPTCP = "link_keep_mptcp_out"
	pinEndLate = "link_end_late"
)

// openLink opens a pinned link, or returns nil if there is none. same is true if the
// link runs the same program as prog.
func openLink(path string, prog *ebpf.Program) (l link.Link, same bool, err error) {
	l, err = link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("open link %s: %w", path, err)
	}
	info, err := l.Info()
	if err == nil {
		same, err = sameProgram(info.Program, prog)
	}
	if err != nil {
		return nil, false, errors.Join(fmt.Errorf("inspect link %s: %w", path, err), l.Close())
	}
	return l, same, nil
}

// sameProgram compares by tag, the kernel's hash of the instructions.
func sameProgram(id ebpf.ProgramID, prog *ebpf.Program) (bool, error) {
	attached, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false, fmt.Errorf("open the attached program: %w", err)
	}
	defer attached.Close()
	have, err := attached.Info()
	if err != nil {
		return false, fmt.Errorf("inspect the attached program: %w", err)
	}
	want, err := prog.Info()
	if err != nil {
		return false, fmt.Errorf("inspect our program: %w", err)
	}
	return have.Tag == want.Tag, nil
}

// keep pins a link and remembers it.
func (d *Datapath) keep(path string, l link.Link) error {
	if err := l.Pin(path); err != nil {
		return errors.Join(fmt.Errorf("pin link %s: %w", path, err), l.Close())
	}
	d.links = append(d.links, l)
	return nil
}

// attachTrack attaches the sock_ops program to the cgroup. Other programs
// there are left alone (bpf_link implies BPF_F_ALLOW_MULTI).
func (d *Datapath) attachTrack(dir string) error {
	prog := d.objects.Programs[bpf.ShortcutProgTrack]
	path := filepath.Join(dir, pinTrack)
	old, same, err := openLink(path, prog)
	if err != nil {
		return err
	}
	if old != nil {
		ok, err := attachedTo(old, d.cfg.Cgroup)
		if ok && !same {
			d.log.Info("program of another build replaced", "program", bpf.ShortcutProgTrack)
			err = old.Update(prog)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("update link %s: %w", path, err), old.Close())
		}
		if ok {
			d.links = append(d.links, old)
			return nil
		}
		d.log.Warn("pairing moves to another cgroup", "cgroup", d.cfg.Cgroup)
		if err := errors.Join(old.Unpin(), old.Close()); err != nil {
			return fmt.Errorf("detach from the former cgroup: %w", err)
		}
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: d.cfg.Cgroup, Attach: ebpf.AttachCGroupSockOps, Program: prog})
	if err != nil {
		return fmt.Errorf("attach sock_ops to %s: %w", d.cfg.Cgroup, err)
	}
	return d.keep(path, l)
}

// attachedTo reports whether a link is on this very cgroup; a cgroup's id is its inode
// number.
func attachedTo(l link.Link, cgroup string) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Stat(cgroup, &st); err != nil {
		return false, fmt.Errorf("stat cgroup %s: %w", cgroup, err)
	}
	return info.Cgroup() != nil && info.Cgroup().CgroupId == st.Ino, nil
}

// attachDeliver attaches the sk_msg program to the SOCKHASH: by a bpf_link from
// Linux 6.10 on (699c23f02c65), before that by BPF_PROG_ATTACH, which lasts as
// long as the map. Sockets take the program over when they join.
func (d *Datapath) attachDeliver(dir string) error {
	prog := d.objects.Programs[bpf.ShortcutProgDeliver]
	sockets := d.objects.Maps[bpf.ShortcutMapSockets]
	path := filepath.Join(dir, pinDeliver)
	old, same, err := openLink(path, prog)
	if err != nil {
		return err
	}
	if old != nil {
		if !same {
			d.log.Info("program of another build replaced", "program", bpf.ShortcutProgDeliver)
			if err := old.Update(prog); err != nil {
				return errors.Join(fmt.Errorf("update link %s: %w", path, err), old.Close())
			}
		}
		d.links = append(d.links, old)
		return nil
	}
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: sockets.FD(), Program: prog, Attach: ebpf.AttachSkMsgVerdict})
	if err == nil {
		return d.keep(path, l)
	}
	// On a kernel without the link this also replaces what is attached.
	rawErr := link.RawAttachProgram(link.RawAttachProgramOptions{Target: sockets.FD(), Program: prog, Attach: ebpf.AttachSkMsgVerdict})
	if rawErr != nil {
		return fmt.Errorf("attach sk_msg to the SOCKHASH: %w", errors.Join(err, rawErr))
	}
	return nil
}

// attachObserver attaches one of the two observers and detaches the other. A link of
// this kind cannot be updated. If the new one came first, both would count a read
// for a moment, which would hide another read that is not finished. So the old one
// goes first: a read that nobody counts only keeps its flow on TCP.
func (d *Datapath) attachObserver(dir, observer string, prog *ebpf.Program) error {
	for _, kind := range []string{ObserverFexit, ObserverTracepoint} {
		path := filepath.Join(dir, pinObserve+kind)
		old, same, err := openLink(path, prog)
		if err != nil {
			return err
		}
		if old == nil {
			continue
		}
		if kind == observer && same {
			d.links = append(d.links, old)
			return nil
		}
		d.log.Info("observer replaced: flows that are read meanwhile stay on TCP", "from", kind, "to", observer)
		if err := errors.Join(old.Unpin(), old.Close()); err != nil {
			return fmt.Errorf("detach observer %s: %w", kind, err)
		}
	}
	l, err := link.AttachTracing(link.TracingOptions{Program: prog})
	if err != nil {
		return fmt.Errorf("attach observer %s: %w", observer, err)
	}
	return d.keep(filepath.Join(dir, pinObserve+observer), l)
}

// attachKeepMPTCPOut attaches the program that marks the ports of MPTCP listeners if
// they are to be kept out.
func (d *Datapath) attachKeepMPTCPOut(dir string) error {
	return d.attachIf(d.mptcpListenersKeptOut(), filepath.Join(dir, pinNoMPTCP), bpf.ShortcutProgKeepMptcpOut)
}

// attachEndLate attaches the program that sees the end of sockets without callbacks, on
// kernels where those that have joined late have none.
func (d *Datapath) attachEndLate(dir string) error {
	return d.attachIf(d.noCallbacks, filepath.Join(dir, pinEndLate), bpf.ShortcutProgEndLate)
}

// attachIf attaches a program to a tracepoint if it is wanted, and detaches it otherwise.
// One of another build is detached only after ours is attached, since it does no harm if
// both run.
func (d *Datapath) attachIf(wanted bool, path, program string) error {
	prog := d.objects.Programs[program]
	old, same, err := openLink(path, prog)
	if err != nil {
		return err
	}
	if old != nil && same && wanted {
		d.links = append(d.links, old)
		return nil
	}
	var l link.Link
	if wanted {
		if l, err = link.AttachTracing(link.TracingOptions{Program: prog}); err != nil {
			return fmt.Errorf("attach %s to inet_sock_set_state: %w", program, err)
		}
	}
	if old != nil {
		err = errors.Join(old.Unpin(), old.Close())
	}
	if l != nil {
		err = errors.Join(err, d.keep(path, l))
	}
	return err
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podshunt/podshunt/agent/cri/critest"
	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/api"
)

const (
	mountsV2     = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\ncgroup2 /run/calico/cgroup cgroup2 rw 0 0\n"
	mountsHybrid = "tmpfs /sys/fs/cgroup tmpfs ro 0 0\nnone /run/calico/cgroup cgroup2 rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
	mountsV1     = "tmpfs /sys/fs/cgroup tmpfs ro 0 0\ncgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n"
)

// TestNodeReport names what of a node keeps podshunt from working, and what to do.
func TestNodeReport(t *testing.T) {
	for _, tc := range []struct {
		name, lockdown, mounts string
		want                   api.NodeReport
		doctor                 []string // what doctor prints, each in one line
	}{
		{name: "nothing is known"},
		{
			name: "usual", lockdown: "[none] integrity confidentiality\n", mounts: mountsV2,
			want: api.NodeReport{Lockdown: "none", Cgroups: api.CgroupsV2, Cgroup2: "/sys/fs/cgroup"}, doctor: []string{"lockdown  none", "cgroups   v2"},
		},
		{
			name: "Secure Boot", lockdown: "none [integrity] confidentiality\n", mounts: mountsV2,
			want:   api.NodeReport{Lockdown: "integrity", Cgroups: api.CgroupsV2, Cgroup2: "/sys/fs/cgroup"},
			doctor: []string{"lockdown  integrity, which changes nothing for podshunt"},
		},
		{
			name: "confidentiality", lockdown: "none integrity [confidentiality]\n", mounts: mountsV2,
			want: api.NodeReport{
				Lockdown: "confidentiality", Cgroups: api.CgroupsV2, Cgroup2: "/sys/fs/cgroup",
				Warnings: []api.Warning{{Code: api.WarningLockdown, Message: "the kernel is locked down (confidentiality), which forbids BPF programs to read its memory: boot the node with lockdown=integrity or none"}},
			},
			doctor: []string{"warning   the kernel is locked down (confidentiality)"},
		},
		{
			name: "both cgroup versions", mounts: mountsHybrid,
			want:   api.NodeReport{Cgroups: api.CgroupsHybrid, Cgroup2: "/sys/fs/cgroup/unified"},
			doctor: []string{"cgroups  hybrid: --cgroup (in the chart: agent.cgroup) has to be /sys/fs/cgroup/unified"},
		},
		{
			name: "cgroup v1", mounts: mountsV1,
			want: api.NodeReport{Cgroups: api.CgroupsV1, Warnings: []api.Warning{{
				Code: api.WarningNoCgroup2, Message: "the node has cgroup v1 only, and podshunt needs cgroup2: boot it with systemd.unified_cgroup_hierarchy=1",
			}}},
			doctor: []string{"warning  the node has cgroup v1 only"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := map[string]string{}
			if tc.lockdown != "" {
				files["/sys/kernel/security/lockdown"] = tc.lockdown
			}
			n := critest.New(t, files)
			if tc.mounts != "" {
				n.MustWrite(filepath.Join(n.Proc, "1/mounts"), tc.mounts)
			}
			got := nodeReport(n.Proc, api.Runtime{})
			wantDiff(t, "report", tc.want, got)
			var out bytes.Buffer
			if err := writeKernelReport(&out, api.KernelReport{Node: got}); err != nil {
				t.Fatal(err)
			}
			for _, line := range tc.doctor {
				if !strings.Contains(collapse(out.String()), "\n"+collapse(line)) {
					t.Errorf("got %s\nwant a line with %q", out.String(), line)
				}
			}
		})
	}
}

// collapse leaves one of many spaces.
func collapse(text string) string {
	for strings.Contains(text, "  ") {
		text = strings.ReplaceAll(text, "  ", " ")
	}
	return text
}

// TestNodeRefuses: what of a node keeps all pods on TCP is the reason of doctor and of run.
func TestNodeRefuses(t *testing.T) {
	confidential := api.NodeReport{Lockdown: api.LockdownConfidentiality}
	lacks := withNode(api.KernelReport{Reason: api.KernelLacksFeatures, Message: "kernel 6.12 refuses the programs"}, confidential)
	if want := "boot the node with lockdown=integrity or none; kernel 6.12 refuses the programs"; !strings.HasSuffix(lacks.Message, want) || lacks.Reason != api.KernelLacksFeatures {
		t.Errorf("got %+v, want the message %q", lacks, want)
	}
	v1 := withNode(api.KernelReport{TakesPart: true}, api.NodeReport{Cgroups: api.CgroupsV1})
	if v1.TakesPart || v1.Reason != api.NodeNoCgroup2 || !strings.Contains(v1.Message, "systemd.unified_cgroup_hierarchy=1") {
		t.Errorf("got %+v, want one that names cgroup v1", v1)
	}
	hybrid := api.NodeReport{Cgroups: api.CgroupsHybrid, Cgroup2: "/sys/fs/cgroup/unified"}
	if e := withNode(api.KernelReport{TakesPart: true}, hybrid); !e.TakesPart || e.Reason != "" {
		t.Errorf("got %+v for a node with both versions", e)
	}
	err := withCgroupAdvice(fmt.Errorf("cgroup /host/cgroup: %w", datapath.ErrNoCgroup2), hybrid)
	if want := "give --cgroup (in the chart: agent.cgroup) the directory of cgroup2, /sys/fs/cgroup/unified"; !strings.HasSuffix(err.Error(), want) {
		t.Errorf("got %v, want %q at its end", err, want)
	}
	if other := errors.New("other"); !errors.Is(withCgroupAdvice(other, hybrid), other) {
		t.Error("another error is gone")
	}
}

// TestReadOnlyDirs needs a file system that is read-only, which only root can make.
func TestReadOnlyDirs(t *testing.T) {
	n := critest.New(t, nil)
	runtime := api.Runtime{Name: api.Containerd, ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin", "/usr/libexec/cni"}}
	for _, dir := range []string{"etc/cni/net.d", "opt", "usr/libexec/cni"} {
		n.MustMkdir(filepath.Join(n.Root, dir))
	}
	warnings := func() (all []string) {
		for _, w := range nodeReport(n.Proc, runtime).Warnings {
			all = append(all, string(w.Code)+": "+w.Message)
		}
		return all
	}
	if got := warnings(); got != nil {
		t.Errorf("got %q, want none", got)
	}
	if os.Geteuid() != 0 {
		return
	}
	inMountNamespace(t, func(mountReadOnly func(dir string) error) error {
		if err := mountReadOnly(filepath.Join(n.Root, "opt")); err != nil {
			return err
		}
		// Of two directories one is enough.
		if got := warnings(); got != nil {
			return fmt.Errorf("got %q, want none", got)
		}
		if err := mountReadOnly(filepath.Join(n.Root, "usr")); err != nil {
			return err
		}
		want := "read_only_dir: /opt/cni/bin and /usr/libexec/cni: containerd uses this for CNI"
		if got := warnings(); len(got) != 1 || !strings.HasPrefix(got[0], want) {
			return fmt.Errorf("got %q, want one that begins with %q", got, want)
		}
		// A runtime that is not known has no directories to look at.
		runtime.Error = "not known"
		if got := warnings(); got != nil {
			return fmt.Errorf("got %q, want none", got)
		}
		return nil
	})
}

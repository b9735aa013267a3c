// SPDX-License-Identifier: Apache-2.0

package proc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const systemdUID1 = "0f1e2d3c_1111_4222_8333_444455556666"

func TestPodPart(t *testing.T) {
	for _, tc := range []struct{ name, path, uid, parent string }{
		{"cgroupfs", "/kubepods/besteffort/pod" + uid1 + "/c1", uid1, "/kubepods/besteffort"},
		{"cgroupfs guaranteed", "/kubepods/pod" + uid1 + "/c1", uid1, "/kubepods"},
		{
			"systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + systemdUID1 + ".slice/cri-containerd-c1.scope",
			uid1, "/kubepods.slice/kubepods-burstable.slice",
		},
		{"systemd guaranteed", "/kubepods.slice/kubepods-pod" + systemdUID1 + ".slice/crio-c1.scope", uid1, "/kubepods.slice"},
		{
			"systemd below a root", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" +
				systemdUID1 + ".slice/x.scope", uid1, "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice",
		},
		{"the pod's own cgroup", "/kubepods/pod" + uid1, uid1, "/kubepods"},
		{"at the root", "/pod" + uid1, uid1, ""},
		{"static", "/kubepods/burstable/pod" + hash + "/c1", hash, "/kubepods/burstable"},
		{"named by a container", "/kubepods/pod" + uid1 + "/c1/pod" + uid2, uid1, "/kubepods"},
		{
			"systemd and a runtime without", "/system.slice/containerd.service/kubepods-burstable-pod" + systemdUID1 + ".slice:cri-containerd:c1",
			uid1, "/system.slice/containerd.service",
		},
		{"no pod", "/system.slice/kubelet.service", "", ""},
		{"kubepods", "/kubepods/burstable", "", ""},
		{"short UID", "/kubepods/pod0f1e2d3c/c1", "", ""},
		{"upper case", "/kubepods/pod" + strings.ToUpper(uid1) + "/c1", "", ""},
		{"root", "/", "", ""},
		{"no path", "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if uid, parent := podPart(tc.path); uid != tc.uid || parent != tc.parent {
				t.Errorf("got %q below %q, want %q below %q", uid, parent, tc.uid, tc.parent)
			}
		})
	}
}

// The hierarchies of a node are directories here; what is open in them is open to all users.
func TestPod(t *testing.T) {
	const (
		unified  = "1 0 0:1 / /cg rw - cgroup2 cgroup2 rw\n"
		version1 = "2 0 0:2 / /cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n" +
			"3 0 0:3 / /systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
		others = "others than root may make cgroups in "
		unseen = "no mount shows who made cgroup "
	)
	root := t.TempDir()
	for _, dir := range []string{
		"cg/kubepods/burstable", "cg/kubelet.slice/kubelet-kubepods.slice", "cg/user.slice/open/kubepods/closed", "cg/a b",
		"cpu/kubepods", "cpu/docker/id/kubelet/kubepods", "systemd/kubepods", "systemd/user.slice/open",
	} {
		if err := os.MkdirAll(filepath.Join(root, "1", "root", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for dir, mode := range map[string]os.FileMode{"cg/user.slice/open": 0o757, "systemd/user.slice/open": 0o775} {
		if err := os.Chmod(filepath.Join(root, "1", "root", dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct{ name, mounts, content, want, err string }{
		{"cgroupfs", unified, "0::/kubepods/burstable/pod" + uid1 + "/c1\n", uid1, ""},
		{"systemd below a root", unified, "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + systemdUID1 + ".slice/c1.scope\n", uid1, ""},
		{"at the root", unified, "0::/pod" + uid1 + "\n", uid1, ""},
		{"not wanted", unified, "0::/kubepods/pod" + hash + "/c1\n", "", ""},
		{"a user's", unified, "0::/user.slice/open/pod" + uid1 + "/c1\n", uid1, others},
		{"a user's, named as a kubelet's", unified, "0::/user.slice/open/kubepods/pod" + uid1 + "/c1\n", uid1, others},
		{"further down in a user's", unified, "0::/user.slice/open/kubepods/closed/pod" + uid1 + "/c1\n", uid1, others},
		{"named twice", unified, "0::/user.slice/open/pod" + uid1 + "/kubepods/pod" + uid2 + "/c1\n", uid1, others},
		{"gone", unified, "0::/gone/pod" + uid1 + "/c1\n", uid1, unseen},
		{"above the namespace's root", unified, "0::/../kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"mounted from above", "1 0 0:1 /../.. /cg rw - cgroup2 cgroup2 rw\n", "0::/../../kubepods/pod" + uid1 + "/c1\n", uid1, ""},
		{"beside what is mounted from above", "1 0 0:1 /.. /cg rw - cgroup2 cgroup2 rw\n", "0::/../../kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"version 1", version1, "12:cpu,cpuacct:/kubepods/pod" + uid1 + "/c1\n1:name=systemd:/kubepods/pod" + uid1 + "/c1\n0::/\n", uid1, ""},
		{"hybrid", version1 + unified, "9:name=systemd:/user.slice\n0::/kubepods/burstable/pod" + uid1 + "/c1\n", uid1, ""},
		{"hierarchy that is not mounted", version1, "0::/kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"controller that is not mounted", version1, "7:cpu,memory:/kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"a user's in one hierarchy", version1, "7:name=systemd:/user.slice/open/pod" + uid1 + "\n4:cpu,cpuacct:/user.slice\n", uid1, others},
		{"a user's in one, a pod's in another", version1, "7:name=systemd:/user.slice/open/pod" + uid1 + "\n4:cpu,cpuacct:/kubepods/pod" + uid2 + "\n", uid2, ""},
		{"nested kubelet", "2 0 0:2 /docker/id /cpu/docker/id rw - cgroup cgroup rw,cpu\n", "4:cpu:/docker/id/kubelet/kubepods/pod" + uid1 + "/c1\n", uid1, ""},
		{"beside a nested kubelet", "2 0 0:2 /docker/id /cpu/docker/id rw - cgroup cgroup rw,cpu\n", "4:cpu:/docker/id2/kubepods/pod" + uid1 + "/c1\n", uid1, unseen},
		{"covered mount", "2 0 0:2 / /covered rw - cgroup cgroup rw,cpu\n" + version1, "4:cpu:/kubepods/pod" + uid1 + "/c1\n", uid1, ""},
		{"space", `1 0 0:1 /x /cg/a\040b rw - cgroup2 cgroup2 rw` + "\n", "0::/x/pod" + uid1 + "/c1\n", uid1, ""},
		{"no hierarchy", unified, "\n0:\n", "", ""},
		{"empty", unified, "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mustWrite(t, filepath.Join(root, "1", "mountinfo"), "31 23 0:28 / /sys rw - tmpfs tmpfs rw\n"+tc.mounts)
			got, err := Finder{Root: root}.readMounts().pod(tc.content, map[string]bool{uid1: true, uid2: true})
			if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.HasPrefix(err.Error(), tc.err) {
				t.Errorf("got %q and error %v, want %q and %q", got, err, tc.want, tc.err)
			}
		})
	}
}

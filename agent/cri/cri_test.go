// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/agent/cri/critest"
	"github.com/podshunt/podshunt/api"
)

const (
	k8sShim    = critest.Shim
	dockerShim = "/usr/bin/containerd-shim-runc-v2 -namespace moby -id 0123456789abcdef -address /run/containerd/containerd.sock"
	conmon     = "/usr/bin/conmon -b /run/containers/storage/overlay-containers/0123/userdata -c 0123 --exit-dir /var/run/crio/exits -r /usr/bin/crun"
)

// TestFind reads configurations as distributions and users have them.
func TestFind(t *testing.T) {
	usual := func(name string, sources ...string) api.Runtime {
		return api.Runtime{Name: name, Sources: sources, ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin"}, Networks: 1}
	}
	for _, tc := range []struct {
		name string
		// starter is the process that has started this one; the others are of the node.
		starter   string
		processes []string
		files     map[string]string
		want      api.Runtime
		wantErr   string
	}{
		{
			name: "kubeadm, without a file", starter: k8sShim,
			processes: []string{"/usr/bin/containerd"},
			want:      usual(api.Containerd),
		},
		{
			name: "containerd 2 with a drop-in", starter: k8sShim,
			processes: []string{"/usr/local/bin/containerd"},
			files: map[string]string{
				"/etc/containerd/config.toml": `
version = 3
imports = ['conf.d/*.toml']
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'runc'
`,
				"/etc/containerd/conf.d/20-cni.toml": `
version = 3
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
`,
				"/etc/containerd/conf.d/notes.txt": "not imported",
			},
			want: usual(api.Containerd, "/etc/containerd/config.toml", "/etc/containerd/conf.d/20-cni.toml"),
		},
		{
			name: "NixOS", starter: k8sShim,
			processes: []string{"/nix/store/0a-containerd-2.1/bin/containerd --config /etc/containerd/config.toml"},
			files: map[string]string{
				"/etc/containerd/config.toml":   "-> /etc/static/containerd.toml",
				"/etc/static/containerd.toml":   "-> /nix/store/1b-containerd.toml",
				"/nix/store/1b-containerd.toml": "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/nix/store/2c-plugins/bin'\nmax_conf_num = 0\n",
			},
			want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/etc/containerd/config.toml"},
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/nix/store/2c-plugins/bin"}, Networks: 0,
			},
		},
		{
			name: "version 1 of the file", starter: k8sShim,
			processes: []string{"/usr/bin/containerd"},
			files:     map[string]string{"/etc/containerd/config.toml": "[plugins.cri.cni]\nbin_dir = '/usr/lib/cni'\nmax_conf_num = 2\n"},
			want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/etc/containerd/config.toml"},
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/usr/lib/cni"}, Networks: 2,
			},
		},
		{
			name: "an import without settings of cni", starter: k8sShim,
			processes: []string{"/usr/bin/containerd"},
			files: map[string]string{
				"/etc/containerd/config.toml": "version = 2\nimports = ['/etc/containerd/nvidia.toml']\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/usr/lib/cni'\n",
				"/etc/containerd/nvidia.toml": "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndefault_runtime_name = 'nvidia'\n",
			},
			want:    api.Runtime{Name: api.Containerd, Sources: []string{"/etc/containerd/config.toml", "/etc/containerd/nvidia.toml"}},
			wantErr: "/etc/containerd/config.toml, /etc/containerd/nvidia.toml: several of them have the settings of CNI",
		},
		{
			name: "not TOML", starter: k8sShim,
			processes: []string{"/usr/bin/containerd"},
			files:     map[string]string{"/etc/containerd/config.toml": "version = 2\n[plugins\n"},
			want:      api.Runtime{Name: api.Containerd},
			wantErr:   "read the configuration of containerd: /etc/containerd/config.toml: ",
		},
		{
			name: "Docker by cri-dockerd", starter: dockerShim,
			processes: []string{
				"/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock", "/usr/bin/containerd",
				"/usr/bin/cri-dockerd --container-runtime-endpoint fd:// --network-plugin=cni --cni-bin-dir=/opt/cni/bin,/usr/lib/cni --cni-conf-dir=/etc/cni/net.mk",
			},
			files: map[string]string{"/etc/containerd/config.toml": `disabled_plugins = ["cri"]`},
			want: api.Runtime{
				Name: api.CRIDockerd, Sources: []string{commandLine},
				ConfDir: "/etc/cni/net.mk", BinDirs: []string{"/opt/cni/bin", "/usr/lib/cni"}, Networks: 1,
			},
		},
		{
			name: "CRI-O with its defaults", starter: conmon,
			processes: []string{"/usr/bin/crio"},
			files:     map[string]string{"/etc/crio/crio.conf.d/10-crio.conf": "[crio.image]\nsignature_policy = '/etc/crio/policy.json'\n"},
			want:      usual(api.CRIO, "/etc/crio/crio.conf.d/10-crio.conf"),
		},
		{
			name: "OpenShift", starter: conmon,
			processes: []string{"/usr/bin/crio", "/usr/bin/containerd"},
			files: map[string]string{
				"/etc/crio/crio.conf": "[crio.network]\nplugin_dirs = ['/usr/libexec/cni']\n",
				"/etc/crio/crio.conf.d/00-default": `
[crio.network]
network_dir = "/etc/kubernetes/cni/net.d/"
plugin_dirs = [
    "/var/lib/cni/bin",
    "/usr/libexec/cni",
]
`,
			},
			want: api.Runtime{
				Name: api.CRIO, Sources: []string{"/etc/crio/crio.conf", "/etc/crio/crio.conf.d/00-default"},
				ConfDir: "/etc/kubernetes/cni/net.d/", BinDirs: []string{"/var/lib/cni/bin", "/usr/libexec/cni"}, Networks: 1,
			},
		},
		{
			name: "MicroShift", starter: conmon,
			processes: []string{"/usr/bin/crio"},
			files: map[string]string{
				"/etc/crio/crio.conf.d/10-microshift_base.conf": "[crio.network]\nplugin_dirs = ['/run/cni/bin', '/usr/libexec/cni']\n",
				"/etc/crio/crio.conf.d/11-microshift-ovn.conf":  "[crio.network]\ncni_default_network = 'ovn-kubernetes'\n",
				// CRI-O reads what is below, too.
				"/etc/crio/crio.conf.d/old/backup.conf": "[crio.network]\ncni_default_network = 'backup'\n",
			},
			want: api.Runtime{
				Name: api.CRIO, Sources: []string{"/etc/crio/crio.conf.d/10-microshift_base.conf", "/etc/crio/crio.conf.d/11-microshift-ovn.conf", "/etc/crio/crio.conf.d/old/backup.conf"},
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/run/cni/bin", "/usr/libexec/cni"}, Network: "backup", Networks: 1,
			},
		},
		{
			name: "CRI-O by environment and command line", starter: conmon,
			processes: []string{
				"CONTAINER_CNI_DEFAULT_NETWORK=a CONTAINER_CNI_PLUGIN_DIR=/a,/b /usr/local/bin/crio --config /etc/my.conf -d /etc/my.d --cni-default-network=b --cni-plugin-dir /c --cni-plugin-dir=/d",
			},
			files: map[string]string{
				"/etc/crio/crio.conf": "[crio.network]\nnetwork_dir = '/not'\n",
				"/etc/my.conf":        "[crio.network]\nnetwork_dir = '/conf'\nplugin_dir = '/old'\ncni_default_network = 'c'\n",
			},
			want: api.Runtime{
				Name: api.CRIO, Sources: []string{"/etc/my.conf", environment, commandLine},
				ConfDir: "/conf", BinDirs: []string{"/c", "/d"}, Network: "b", Networks: 1,
			},
		},
		{
			name:      "a service of the machine, with Docker's containerd",
			processes: []string{"containerd --config /var/run/docker/containerd/containerd.toml", "/usr/bin/crio"},
			files:     map[string]string{"/var/run/docker/containerd/containerd.toml": "version = 2\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n"},
			want:      usual(api.CRIO),
		},
		{
			name:      "a service of the machine, with two runtimes",
			processes: []string{"/usr/bin/containerd", "/usr/bin/crio"},
			wantErr:   "the node runs containerd (process 100) and cri-o (process 101), and it is not known which of them starts pods",
		},
		{
			name: "no runtime that is known", starter: "/usr/bin/podman", processes: []string{"/usr/bin/dockerd"},
			wantErr: ErrNotFound.Error(),
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := critest.New(t, tc.files)
			n.AddAll(tc.starter, tc.processes)
			got, err := Find(n.Proc)
			if diff := cmp.Diff(tc.want, got.Runtime); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if text := fmt.Sprint(err); (err == nil) != (tc.wantErr == "") || !strings.Contains(text, tc.wantErr) && err != nil {
				t.Errorf("got error %v, want %q", err, tc.wantErr)
			}
			if err == nil && !got.Running() {
				t.Error("the runtime is not running")
			}
		})
	}
}

// TestFindOnPlatforms reads configurations as distributions have them.
func TestFindOnPlatforms(t *testing.T) {
	for _, p := range critest.Platforms() {
		t.Run(p.Name, func(t *testing.T) {
			n := critest.New(t, p.Files)
			n.AddAll(p.Starter, p.Processes)
			got, err := Find(n.Proc)
			if diff := cmp.Diff(p.Want, got.Runtime); diff != "" || err != nil {
				t.Errorf("got error %v (-want +got):\n%s", err, diff)
			}
		})
	}
}

// TestRunning notices that a runtime has been started anew, by its number or not.
func TestRunning(t *testing.T) {
	n := critest.New(t, nil)
	n.Add(100, 1, "pid:[1]", "/usr/bin/containerd")
	f, err := Find(n.Proc)
	n.Check(err)
	n.MustWrite(filepath.Join(n.Proc, "100/stat"), "100 (containerd) S 1"+strings.Repeat(" 0", 17)+" 99 0\n")
	if f.Running() {
		t.Error("runs after another process got its number")
	}
	n.Check(os.RemoveAll(filepath.Join(n.Proc, "100")))
	if f.Running() {
		t.Error("runs after it has ended")
	}
}

// TestFindHere looks at the real processes of this machine: whatever runs, it is no
// failure to look.
func TestFindHere(t *testing.T) {
	f, err := Find("/proc")
	t.Logf("%+v, error %v", f, err)
	if all, err := processes("/proc"); err != nil || len(all) == 0 {
		t.Errorf("got %d processes and error %v", len(all), err)
	}
	if p, err := self("/proc"); err != nil || p.pid != os.Getpid() || !p.running() {
		t.Errorf("got self %+v and error %v, want %d", p, err, os.Getpid())
	}
}

// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/api"
)

// testNode is a node with processes and files, as a procfs would show it.
type testNode struct {
	testing.TB
	proc, root string
}

const testSelf = 4000

func newTestNode(t testing.TB, files map[string]string) testNode {
	t.Helper()
	n := testNode{TB: t, proc: filepath.Join(t.TempDir(), "proc"), root: filepath.Join(t.TempDir(), "root")}
	n.mustMkdir(n.root)
	for path, content := range files {
		path = filepath.Join(n.root, path)
		n.mustMkdir(filepath.Dir(path))
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			n.check(os.Symlink(target, path))
			continue
		}
		n.mustWrite(path, content)
	}
	n.add(1, 0, "pid:[1]", "/sbin/init")
	return n
}

func (n testNode) check(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

func (n testNode) mustMkdir(dir string) { n.Helper(); n.check(os.MkdirAll(dir, 0o755)) }

func (n testNode) mustWrite(path, content string) {
	n.Helper()
	n.check(os.WriteFile(path, []byte(content), 0o644))
}

// add adds a process. A command may begin with settings of its environment.
func (n testNode) add(pid, parent int, namespace, command string) {
	n.Helper()
	var env []string
	args := strings.Fields(command)
	for len(args) > 0 && strings.Contains(args[0], "=") {
		env, args = append(env, args[0]), args[1:]
	}
	dir := filepath.Join(n.proc, fmt.Sprint(pid))
	n.mustMkdir(filepath.Join(dir, "ns"))
	n.mustWrite(filepath.Join(dir, "cmdline"), strings.Join(args, "\x00")+"\x00")
	n.mustWrite(filepath.Join(dir, "environ"), strings.Join(env, "\x00"))
	n.mustWrite(filepath.Join(dir, "stat"), fmt.Sprintf("%d (a) name) S %d%s 77%d 0 0\n", pid, parent, strings.Repeat(" 0", 17), pid))
	n.check(os.Symlink(namespace, filepath.Join(dir, "ns/pid")))
	n.check(os.Symlink(n.root, filepath.Join(dir, "root")))
}

const (
	k8sShim    = "/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id 0123456789abcdef -address /run/containerd/containerd.sock"
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
			name: "kubeadm, containerd config default of 1.7", starter: k8sShim,
			processes: []string{"/usr/bin/containerd"},
			files: map[string]string{"/etc/containerd/config.toml": `
disabled_plugins = []
imports = []
version = 2
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins]
  [plugins."io.containerd.gc.v1.scheduler"]
    deletion_threshold = 0
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.k8s.io/pause:3.8"
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/opt/cni/bin"
      conf_dir = "/etc/cni/net.d"
      conf_template = ""
      max_conf_num = 1
`},
			want: usual(api.Containerd, "/etc/containerd/config.toml"),
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
			name: "GKE", starter: k8sShim,
			processes: []string{"/usr/bin/containerd"},
			files: map[string]string{"/etc/containerd/config.toml": `
version = 2
required_plugins = ["io.containerd.grpc.v1.cri"]
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/home/kubernetes/bin"
  conf_dir = "/etc/cni/net.d"
`},
			want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/etc/containerd/config.toml"},
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/home/kubernetes/bin"}, Networks: 1,
			},
		},
		{
			name: "k3s", starter: "/var/lib/rancher/k3s/data/current/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/k3s/containerd/containerd.sock",
			// Docker runs beside it.
			processes: []string{
				"/usr/bin/containerd",
				"containerd -c /var/lib/rancher/k3s/agent/etc/containerd/config.toml -a /run/k3s/containerd/containerd.sock --state /run/k3s/containerd --root /var/lib/rancher/k3s/agent/containerd",
			},
			files: map[string]string{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml": `
version = 3
imports = ["/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"]
root = "/var/lib/rancher/k3s/agent/containerd"
[plugins.'io.containerd.cri.v1.runtime']
  enable_unprivileged_ports = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/var/lib/rancher/k3s/data/cni"]
  conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
`},
			want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml"},
				ConfDir: "/var/lib/rancher/k3s/agent/etc/cni/net.d", BinDirs: []string{"/var/lib/rancher/k3s/data/cni"}, Networks: 1,
			},
		},
		{
			name: "k3s with a CNI of its own, RKE2", starter: "/var/lib/rancher/rke2/data/v1.33/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/k3s/containerd/containerd.sock",
			processes: []string{"containerd -c /var/lib/rancher/rke2/agent/etc/containerd/config.toml"},
			files: map[string]string{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml": `
version = 3
root = "/var/lib/rancher/rke2/agent/containerd"
[grpc]
  address = "/run/k3s/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.runtime']
  enable_selinux = true
`},
			want: usual(api.Containerd, "/var/lib/rancher/rke2/agent/etc/containerd/config.toml"),
		},
		{
			name: "k0s", starter: "/var/lib/k0s/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/k0s/containerd.sock",
			processes: []string{"/var/lib/k0s/bin/containerd --root=/var/lib/k0s/containerd --state=/run/k0s/containerd --address=/run/k0s/containerd.sock --log-level=info --config=/etc/k0s/containerd.toml"},
			files: map[string]string{
				"/etc/k0s/containerd.toml": `
# k0s_managed=true
version = 2
imports = ["/run/k0s/containerd-cri.toml"]
`,
				"/run/k0s/containerd-cri.toml": `
version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/opt/cni/bin"
  conf_dir = "/etc/cni/net.d"
`,
			},
			want: usual(api.Containerd, "/etc/k0s/containerd.toml", "/run/k0s/containerd-cri.toml"),
		},
		{
			name: "MicroK8s", starter: "/snap/microk8s/8136/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /var/snap/microk8s/common/run/containerd.sock",
			processes: []string{"/snap/microk8s/8136/bin/containerd --config /var/snap/microk8s/8136/args/containerd.toml --root /var/snap/microk8s/common/var/lib/containerd --state /var/snap/microk8s/common/run/containerd --address /var/snap/microk8s/common/run/containerd.sock"},
			files: map[string]string{"/var/snap/microk8s/8136/args/containerd.toml": `
version = 2
oom_score = 0
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/var/snap/microk8s/8136/opt/cni/bin"
  conf_dir = "/var/snap/microk8s/8136/args/cni-network"
`},
			want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/var/snap/microk8s/8136/args/containerd.toml"},
				ConfDir: "/var/snap/microk8s/8136/args/cni-network", BinDirs: []string{"/var/snap/microk8s/8136/opt/cni/bin"}, Networks: 1,
			},
		},
		{
			name: "Talos, with a containerd of its own", starter: "/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/containerd/containerd.sock",
			processes: []string{
				"/bin/containerd --address /system/run/containerd/containerd.sock --state /system/run/containerd --root /system/var/lib/containerd",
				"/bin/containerd --address /run/containerd/containerd.sock --config /etc/cri/containerd.toml",
			},
			files: map[string]string{
				"/etc/containerd/config.toml": "version = 3\ndisabled_plugins = ['io.containerd.nri.v1.nri']\n",
				"/etc/cri/containerd.toml":    "version = 3\nimports = ['/etc/cri/conf.d/cri.toml']\n",
				"/etc/cri/conf.d/cri.toml":    "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/cri/conf.d/hosts'\n",
			},
			want: usual(api.Containerd, "/etc/cri/containerd.toml", "/etc/cri/conf.d/cri.toml"),
		},
		{
			name: "Bottlerocket, with a containerd of its own", starter: k8sShim,
			processes: []string{"/usr/bin/host-containerd --config /etc/host-containerd/config.toml", "/usr/bin/containerd"},
			files: map[string]string{
				"/etc/containerd/config.toml":      "version = 2\n[grpc]\naddress = '/run/containerd/containerd.sock'\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/opt/cni/bin'\nconf_dir = '/etc/cni/net.d'\n",
				"/etc/host-containerd/config.toml": "version = 2\n[grpc]\naddress = '/run/host-containerd/containerd.sock'\n",
			},
			want: usual(api.Containerd, "/etc/containerd/config.toml"),
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
				"/etc/crio/crio.conf.d/old/backup.conf":         "[crio.network]\ncni_default_network = 'backup'\n",
			},
			want: api.Runtime{
				Name: api.CRIO, Sources: []string{"/etc/crio/crio.conf.d/10-microshift_base.conf", "/etc/crio/crio.conf.d/11-microshift-ovn.conf"},
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/run/cni/bin", "/usr/libexec/cni"}, Network: "ovn-kubernetes", Networks: 1,
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
			n := newTestNode(t, tc.files)
			for i, command := range tc.processes {
				n.add(100+i, 1, "pid:[1]", command)
			}
			// A runtime in a pod, which is no runtime of the node's.
			n.add(3000, 1, "pid:[2]", "/usr/local/bin/containerd")
			n.add(3001, 1, "pid:[2]", "/usr/bin/crio")
			if tc.starter != "" {
				n.add(200, 1, "pid:[1]", tc.starter)
				n.add(300, 200, "pid:[2]", "tini -- podshunt-agent run")
				n.add(testSelf, 300, "pid:[2]", "podshunt-agent run")
				n.check(os.Symlink(fmt.Sprint(testSelf), filepath.Join(n.proc, "self")))
			}
			got, err := Find(n.proc)
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

// TestRunning notices that a runtime has been started anew, by its number or not.
func TestRunning(t *testing.T) {
	n := newTestNode(t, nil)
	n.add(100, 1, "pid:[1]", "/usr/bin/containerd")
	f, err := Find(n.proc)
	n.check(err)
	n.mustWrite(filepath.Join(n.proc, "100/stat"), "100 (containerd) S 1"+strings.Repeat(" 0", 17)+" 99 0\n")
	if f.Running() {
		t.Error("runs after another process got its number")
	}
	n.check(os.RemoveAll(filepath.Join(n.proc, "100")))
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

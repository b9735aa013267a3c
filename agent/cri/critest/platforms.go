// SPDX-License-Identifier: Apache-2.0

// The nodes of distributions of Kubernetes.

package critest

import "github.com/podshunt/podshunt/api"

// How a distribution writes its network's file again when it starts.
const (
	InPlace = "in place" // truncates it
	Renamed = "renamed"  // puts another one in its place
	Edited  = "edited"   // changes one value, and writes all of the JSON anew
)

// Platform is a distribution's node, as its documents or sources describe it.
type Platform struct {
	// Name and Values are as in the table of docs/platforms.md. Without Values, the chart's
	// own ones are right.
	Name, Values string
	// Starter is the command that starts containers, Processes are the runtimes that run.
	Starter   string
	Processes []string
	// Files are the runtimes' configurations, and links, by their paths.
	Files map[string]string
	// Want is what the runtime's configuration says.
	Want api.Runtime
	// Network names the shape (agent/cniconf/testdata/shapes) of the network's file, and
	// Rewrite says how it is written again.
	Network, Rewrite string
	// Owner is the user that the directories and files of CNI belong to.
	Owner int
}

const (
	// Shim has started a container by containerd.
	Shim  = "/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id 0123456789abcdef -address /run/containerd/containerd.sock"
	usual = "/etc/containerd/config.toml"
)

// usually returns what a containerd with the usual directories says.
func usually(sources ...string) api.Runtime {
	return api.Runtime{Name: api.Containerd, Sources: sources, ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin"}, Networks: 1}
}

// Platforms returns all of them.
func Platforms() []Platform {
	return []Platform{
		{
			Name: "kubeadm", Network: "calico", Rewrite: Renamed,
			Starter: Shim, Processes: []string{"/usr/bin/containerd"},
			// containerd config default of 1.7.
			Files: map[string]string{usual: `
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
			Want: usually(usual),
		},
		{
			Name: "kind", Network: "kindnet", Rewrite: Renamed,
			Starter: "/usr/local/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/containerd/containerd.sock", Processes: []string{"/usr/local/bin/containerd"},
			Files: map[string]string{usual: `
version = 3
[proxy_plugins.fuse-overlayfs]
  type = "snapshot"
  address = "/run/containerd-fuse-overlayfs.sock"
[plugins."io.containerd.cri.v1.runtime".containerd]
  default_runtime_name = "runc"
`},
			Want: usually(usual),
		},
		{
			Name: "kubespray", Network: "calico", Rewrite: Renamed, Owner: 998,
			Starter: "/usr/local/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/containerd/containerd.sock", Processes: []string{"/usr/local/bin/containerd"},
			Files: map[string]string{usual: `
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
[plugins."io.containerd.cri.v1.runtime"]
  max_container_log_line_size = 16384
`},
			Want: usually(usual),
		},
		{
			Name: "k3s", Values: "values-k3s.yaml", Network: "flannel", Rewrite: InPlace,
			Starter: "/var/lib/rancher/k3s/data/current/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/k3s/containerd/containerd.sock",
			Processes: []string{
				"/usr/bin/containerd", // Docker's
				"containerd -c /var/lib/rancher/k3s/agent/etc/containerd/config.toml -a /run/k3s/containerd/containerd.sock --state /run/k3s/containerd --root /var/lib/rancher/k3s/agent/containerd",
			},
			Files: map[string]string{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml": `
version = 3
imports = ["/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"]
root = "/var/lib/rancher/k3s/agent/containerd"
[plugins.'io.containerd.cri.v1.runtime']
  enable_unprivileged_ports = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/var/lib/rancher/k3s/data/cni"]
  conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
`},
			Want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml"},
				ConfDir: "/var/lib/rancher/k3s/agent/etc/cni/net.d", BinDirs: []string{"/var/lib/rancher/k3s/data/cni"}, Networks: 1,
			},
		},
		{
			// k3s with a CNI of its own is the same.
			Name: "RKE2", Network: "calico", Rewrite: Renamed,
			Starter:   "/var/lib/rancher/rke2/data/v1.33/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/k3s/containerd/containerd.sock",
			Processes: []string{"containerd -c /var/lib/rancher/rke2/agent/etc/containerd/config.toml"},
			Files: map[string]string{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml": `
version = 3
root = "/var/lib/rancher/rke2/agent/containerd"
[grpc]
  address = "/run/k3s/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.runtime']
  enable_selinux = true
`},
			Want: usually("/var/lib/rancher/rke2/agent/etc/containerd/config.toml"),
		},
		{
			Name: "k0s", Network: "kube-router", Rewrite: Edited,
			Starter:   "/var/lib/k0s/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/k0s/containerd.sock",
			Processes: []string{"/var/lib/k0s/bin/containerd --root=/var/lib/k0s/containerd --state=/run/k0s/containerd --address=/run/k0s/containerd.sock --log-level=info --config=/etc/k0s/containerd.toml"},
			Files: map[string]string{
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
			Want: usually("/etc/k0s/containerd.toml", "/run/k0s/containerd-cri.toml"),
		},
		{
			Name: "MicroK8s", Values: "values-microk8s.yaml", Network: "calico", Rewrite: Renamed,
			Starter:   "/snap/microk8s/8136/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /var/snap/microk8s/common/run/containerd.sock",
			Processes: []string{"/snap/microk8s/8136/bin/containerd --config /var/snap/microk8s/8136/args/containerd.toml --root /var/snap/microk8s/common/var/lib/containerd --state /var/snap/microk8s/common/run/containerd --address /var/snap/microk8s/common/run/containerd.sock"},
			Files: map[string]string{
				"/var/snap/microk8s/current": "-> 8136",
				"/var/snap/microk8s/8136/args/containerd.toml": `
version = 2
oom_score = 0
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/var/snap/microk8s/8136/opt/cni/bin"
  conf_dir = "/var/snap/microk8s/8136/args/cni-network"
`,
			},
			Want: api.Runtime{
				Name: api.Containerd, Sources: []string{"/var/snap/microk8s/8136/args/containerd.toml"},
				ConfDir: "/var/snap/microk8s/8136/args/cni-network", BinDirs: []string{"/var/snap/microk8s/8136/opt/cni/bin"}, Networks: 1,
			},
		},
		{
			Name: "EKS, Amazon Linux 2023", Values: "values-eks.yaml", Network: "aws-vpc", Rewrite: Renamed,
			Starter: Shim, Processes: []string{"/usr/bin/containerd"},
			Files: map[string]string{usual: `
version = 3
root = "/var/lib/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
`},
			Want: usually(usual),
		},
		{
			Name: "EKS, Bottlerocket", Values: "values-eks.yaml", Network: "aws-vpc", Rewrite: Renamed,
			Starter: Shim, Processes: []string{"/usr/bin/host-containerd --config /etc/host-containerd/config.toml", "/usr/bin/containerd"},
			Files: map[string]string{
				usual:                              "version = 2\nimports = ['/etc/containerd/config.d/*.toml']\n[grpc]\naddress = '/run/containerd/containerd.sock'\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/opt/cni/bin'\nconf_dir = '/etc/cni/net.d'\n",
				"/etc/host-containerd/config.toml": "version = 2\n[grpc]\naddress = '/run/host-containerd/containerd.sock'\n",
			},
			Want: usually(usual),
		},
		{
			Name: "GKE Standard", Values: "values-gke.yaml", Network: "gke-ptp", Rewrite: Renamed,
			Starter: Shim, Processes: []string{"/usr/bin/containerd"},
			Files: map[string]string{usual: `
version = 2
required_plugins = ["io.containerd.grpc.v1.cri"]
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/home/kubernetes/bin"
  conf_dir = "/etc/cni/net.d"
`},
			Want: api.Runtime{
				Name: api.Containerd, Sources: []string{usual},
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/home/kubernetes/bin"}, Networks: 1,
			},
		},
		{
			Name: "AKS", Values: "values-aks.yaml", Network: "azure", Rewrite: Renamed,
			Starter: Shim, Processes: []string{"/usr/bin/containerd"},
			Files: map[string]string{usual: `
version = 2
oom_score = -999
[plugins."io.containerd.grpc.v1.cri"]
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
`},
			Want: usually(usual),
		},
		{
			Name: "Talos", Network: "flannel", Rewrite: InPlace,
			Starter: "/bin/containerd-shim-runc-v2 -namespace k8s.io -id 01 -address /run/containerd/containerd.sock",
			Processes: []string{
				"/bin/containerd --address /system/run/containerd/containerd.sock --state /system/run/containerd --root /system/var/lib/containerd",
				"/bin/containerd --address /run/containerd/containerd.sock --config /etc/cri/containerd.toml",
			},
			Files: map[string]string{
				usual:                      "version = 3\ndisabled_plugins = ['io.containerd.nri.v1.nri']\n",
				"/etc/cri/containerd.toml": "version = 3\nimports = ['/etc/cri/conf.d/cri.toml']\n",
				"/etc/cri/conf.d/cri.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/cri/conf.d/hosts'\n",
			},
			Want: usually("/etc/cri/containerd.toml", "/etc/cri/conf.d/cri.toml"),
		},
		{
			Name: "Flatcar, by kubeadm", Network: "flannel", Rewrite: InPlace,
			Starter: Shim, Processes: []string{"/usr/bin/containerd --config /usr/share/containerd/config.toml"},
			Files: map[string]string{"/usr/share/containerd/config.toml": `
version = 2
root = "/var/lib/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  enable_selinux = true
`},
			Want: usually("/usr/share/containerd/config.toml"),
		},
	}
}

// SPDX-License-Identifier: Apache-2.0

// What is known of the container runtime.

package api

// Names of container runtimes.
const (
	Containerd = "containerd"
	CRIO       = "cri-o"
	CRIDockerd = "cri-dockerd"
)

// Runtime is the node's container runtime, and what its configuration says of CNI.
type Runtime struct {
	// Name is one of the constants above, or "" if the runtime is not known.
	Name string `json:"name,omitempty"`
	// Sources are the configuration files that were read, and "command line" and
	// "environment" if these say something of CNI. Without any, the runtime has its defaults.
	Sources []string `json:"sources,omitempty"`
	// ConfDir is the directory of network configurations, and BinDirs are those of
	// plugins, as the runtime sees them.
	ConfDir string   `json:"confDir,omitempty"`
	BinDirs []string `json:"binDirs,omitempty"`
	// Network is the name of the network that the runtime uses, or "" if that is the first
	// one in ConfDir (cni_default_network of CRI-O).
	Network string `json:"network,omitempty"`
	// Networks is how many networks each pod gets, 0 for all that are in ConfDir
	// (max_conf_num of containerd).
	Networks int `json:"networks"`
	// Error says why the runtime, or its configuration, is not known.
	Error string `json:"error,omitempty"`
}

// SPDX-License-Identifier: Apache-2.0

// Package sandbox makes a node without a cluster: pods that are network
// namespaces wired by real CNI plugins from a real conflist. Tests, the demo
// and the benchmark share it.
//
// A program that uses it runs inside Main, which gives it a cgroup and a mount
// namespace of its own: a sock_ops program attached to Sandbox.Cgroup sees the
// sockets of this run alone, and mounts and named network namespaces end with
// the run. Nothing in the machine's own network namespace is touched.
//
// It runs no kubelet. Agent is the one place where tests and the demo start an
// agent, and OpenDatapath where a datapath is opened without one; package
// sandboxtest has both for tests.
package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/supervise"
)

// ErrNotRoot is returned by New for a process that is not root's.
var ErrNotRoot = errors.New("root is needed for network namespaces, mounts, a cgroup and BPF")

// Config has the settings of a Sandbox; the zero value is useful.
type Config struct {
	// BinDir holds the CNI plugins and podshunt-agent. Default: the environment's
	// PODSHUNT_BIN, else bin in the directory with the go.mod at or above the
	// working one.
	BinDir string
	// Podshunt chains our plugin in the conflist.
	Podshunt bool
}

// Sandbox is a node and its pods. Its methods may be called concurrently.
type Sandbox struct {
	// Base is a directory of the sandbox's own; its path is short enough for
	// unix sockets. Whatever is mounted below it is unmounted by Close.
	Base string
	// BinDir holds the CNI plugins and podshunt-agent.
	BinDir string
	// BPF is an empty bpffs.
	BPF string
	// PinDir is where in BPF an agent or a datapath has its pins.
	PinDir string
	// Cgroup holds this process and all that it starts. Sandboxes of one
	// process share it.
	Cgroup string
	// AgentSocket is where the plugin looks for an agent.
	AgentSocket string
	// AgentTimeout is how long the plugin waits for an agent, by Conflist. New sets
	// the plugin's default.
	AgentTimeout time.Duration
	// AttachmentsDir is where the plugin leaves a file for an agent that did not
	// answer.
	AttachmentsDir string
	// Node is the network namespace with the host ends of the pods' links.
	Node *Netns

	podshunt bool
	cni      *libcni.CNIConfig

	mu   sync.Mutex
	pods []*Pod
	// added counts the pods ever added, for their container ids.
	added int
}

// New makes a node without pods. The caller closes it. It returns ErrNotRoot
// if the process is not root's.
func New(cfg Config) (_ *Sandbox, err error) {
	if os.Geteuid() != 0 {
		return nil, ErrNotRoot
	}
	r, err := current()
	if err != nil {
		return nil, err
	}
	binDir, err := findPlugins(cfg)
	if err != nil {
		return nil, err
	}
	base, err := os.MkdirTemp(r.Dir, "")
	if err != nil {
		return nil, err
	}
	s := &Sandbox{
		Base:           base,
		BinDir:         binDir,
		BPF:            filepath.Join(base, "bpf"),
		PinDir:         filepath.Join(base, "bpf", "podshunt"),
		Cgroup:         r.Cgroups[0],
		AgentSocket:    filepath.Join(base, "agent.sock"),
		AgentTimeout:   api.PluginTimeout,
		AttachmentsDir: filepath.Join(base, "attachments"),
		podshunt:       cfg.Podshunt,
		cni:            libcni.NewCNIConfigWithCacheDir([]string{binDir}, filepath.Join(base, "cni"), nil),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	for _, dir := range []string{s.BPF, s.netnsPath("")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := unix.Mount("bpf", s.BPF, "bpf", 0, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount bpffs on %s: %w", s.BPF, err)
	}
	if s.Node, err = newNetns(s.netnsPath("node")); err != nil {
		return nil, err
	}
	err = errors.Join(s.Node.Sysctl("net.ipv4.ip_forward", "1"), s.Node.Sysctl("net.ipv6.conf.all.forwarding", "1"))
	if err != nil {
		return nil, err
	}
	return s, nil
}

// netnsPath is where the namespace of a pod is kept; with "", of all.
func (s *Sandbox) netnsPath(name string) string {
	return filepath.Join(s.Base, "netns", name)
}

// findPlugins returns the directory of the CNI plugins, or an error if one that the
// conflist needs is missing.
func findPlugins(cfg Config) (string, error) {
	dir := cfg.BinDir
	if dir == "" {
		dir = os.Getenv("PODSHUNT_BIN")
	}
	if dir == "" {
		root, err := os.Getwd()
		if err != nil {
			return "", err
		}
		for {
			if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
				break
			}
			if root == "/" {
				return "", errors.New("find CNI plugins: no go.mod at or above the working directory; set PODSHUNT_BIN")
			}
			root = filepath.Dir(root)
		}
		dir = filepath.Join(root, "bin")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	plugins := []string{"bridge", "host-local"}
	if cfg.Podshunt {
		plugins = append(plugins, api.PluginType)
	}
	for _, plugin := range plugins {
		if _, err := os.Stat(filepath.Join(dir, plugin)); err != nil {
			return "", fmt.Errorf("find CNI plugin: %w; run `make build cni`", err)
		}
	}
	return dir, nil
}

// Conflist returns the network configuration of pods that have no other: a
// bridge as default gateway of 10.244.0.0/24 and fd00:244::/64 without
// masquerading; then chained, which are plugins' sections as JSON; then, if
// the sandbox was asked for it, podshunt.
func (s *Sandbox) Conflist(chained ...string) string {
	plugins := []string{fmt.Sprintf(`{"type": "bridge", "bridge": "podshunt0", "isDefaultGateway": true, "ipMasq": false,
		"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00:244::/64"}]]}}`,
		filepath.Join(s.Base, "ipam"))}
	plugins = append(plugins, chained...)
	if s.podshunt {
		own := api.PluginConf{AgentSocket: s.AgentSocket, AgentTimeout: s.AgentTimeout, AttachmentsDir: s.AttachmentsDir}
		plugins = append(plugins, string(own.Section()))
	}
	return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "podshunt", "plugins": [%s]}`, strings.Join(plugins, ", "))
}

// Close deletes the pods, the last one first, and all else that the sandbox
// has made. It goes on after errors and returns them all; closing again is no
// error.
func (s *Sandbox) Close() error {
	s.mu.Lock()
	pods := slices.Clone(s.pods)
	s.mu.Unlock()
	var errs []error
	for _, p := range slices.Backward(pods) {
		errs = append(errs, s.DelPod(p))
	}
	mounts, err := mountPoints()
	errs = append(errs, err)
	for _, m := range slices.Backward(mounts) {
		if strings.HasPrefix(m, s.Base+"/") {
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", m, err))
			}
		}
	}
	return errors.Join(append(errs, supervise.RemoveCgroup(s.ownCgroup()), os.RemoveAll(s.Base))...)
}

// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	// stepTimeout is how long one step of bringing the cluster up, or one command, may take. Other work may keep the
	// machine busy.
	stepTimeout = 90 * time.Second
	// longTimeout is for a command that has a timeout of its own.
	longTimeout = 5 * time.Minute
	// serviceAddress is the API server's ClusterIP, the first of its range.
	serviceRange, serviceAddress = "10.96.0.0/16", "10.96.0.1"
	podRange                     = "10.88.0.0/16"
	// token is that of the one user, who may do everything. It is of use on the nodes only.
	token = "suite"
)

// cluster is two nodes; the first is the control plane as well.
type cluster struct {
	run run
	// debs and bin are what build.sh has made.
	debs, bin string
	// image, agent and chart are podshunt's.
	image, agent, chart string
	helmProgram         string
	nodes               []*node
	// figures are what the tests have measured, in their order.
	mu      sync.Mutex
	figures []string
}

// cacheDir returns the directory that build.sh has filled.
func cacheDir() (string, error) {
	path := os.Getenv("PODSHUNT_CLUSTER")
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("PODSHUNT_CLUSTER=%q is no absolute path: run `make test-cluster`", path)
	}
	return path, nil
}

func newCluster(r run) (*cluster, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	repository, err := filepath.Abs("../..")
	if err != nil {
		return nil, err
	}
	image, chart, err := madeRelease(filepath.Join(cache, "release"))
	if err != nil {
		return nil, err
	}
	c := &cluster{
		run: r, debs: filepath.Join(cache, "usr"), bin: filepath.Join(cache, "bin"), image: image,
		agent: filepath.Join(repository, "bin", "podshunt-agent"), chart: chart, helmProgram: helm3,
	}
	for i, mode := range []string{"iptables", "nftables"} {
		c.nodes = append(c.nodes, &node{
			number: i + 1, name: fmt.Sprintf("node%d", i+1), proxyMode: mode, cluster: c, daemons: map[string]*daemon{},
		})
	}
	return c, nil
}

// madeRelease returns the image and the chart that `make dist` has made, as for a release.
func madeRelease(dir string) (image, chart string, err error) {
	var made [2]string
	for i, pattern := range []string{"podshunt-image-*.tar", "podshunt-[0-9]*.tgz"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(found) != 1 {
			return "", "", fmt.Errorf("%d files %s of a release in %s, want one: run `make test-cluster`", len(found), pattern, dir)
		}
		made[i] = found[0]
	}
	return made[0], made[1], nil
}

func (c *cluster) control() *node { return c.nodes[0] }

func (c *cluster) file(name string) string { return filepath.Join(c.run.directory(), name) }

func (c *cluster) kubeconfig() string { return c.file("kubeconfig") }

func (c *cluster) stop() {
	for _, n := range c.nodes {
		n.halt()
	}
}

// start returns when pods can be made.
func (c *cluster) start() error {
	began := time.Now()
	step := func(name string, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Printf("cluster: %5.1f s  %s\n", time.Since(began).Seconds(), name)
		return nil
	}
	if err := c.makeCgroups(); err != nil {
		return err
	}
	// Only here, where nodes are started, the thread matters: see runTests.
	for _, n := range c.nodes {
		if err := n.boot(); err != nil {
			return err
		}
	}
	for _, s := range []struct {
		name string
		do   func() error
	}{
		{"namespaces, network", func() error { return errors.Join(c.connect(), c.writeFiles()) }},
		{"etcd and API server", c.startServer},
		{"containerd and images", func() error { return c.each((*node).startRuntime) }},
		{"controllers, scheduler, kubelets", c.startNodes},
		{"nodes ready", c.awaitNodes},
		{"default service account", func() error {
			return c.await("the default service account", func() error {
				_, err := c.kubectl("-n", "default", "get", "serviceaccount", "default")
				return err
			})
		}},
	} {
		if err := step(s.name, s.do()); err != nil {
			return err
		}
	}
	return nil
}

// each calls do for all nodes at once.
func (c *cluster) each(do func(*node) error) error {
	errs := make([]error, len(c.nodes))
	var group sync.WaitGroup
	for i, n := range c.nodes {
		group.Go(func() { errs[i] = do(n) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// await waits until do succeeds. It gives up when a daemon has ended.
func (c *cluster) await(what string, do func() error) error {
	for deadline := time.Now().Add(stepTimeout); ; time.Sleep(100 * time.Millisecond) {
		err := do()
		if err == nil {
			return nil
		}
		for _, n := range c.nodes {
			if ended := n.running(); ended != nil {
				return fmt.Errorf("wait for %s: %w", what, ended)
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: not after %v: %w", what, stepTimeout, err)
		}
	}
}

func (c *cluster) kubectl(args ...string) (string, error) {
	return c.control().output(longTimeout, nil, "kubectl", args...)
}

// makeCgroups makes the kubelet's cgroupRoot in every hierarchy: it does not do so itself.
func (c *cluster) makeCgroups() error {
	for _, hierarchy := range hierarchies() {
		for _, n := range c.nodes {
			if err := os.MkdirAll(filepath.Join(hierarchy, n.cgroup()), 0o755); err != nil {
				return err
			}
		}
		// In cpuset of version 1 a new cgroup is empty, and takes no process.
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(hierarchy, name))
			if err != nil {
				continue // another hierarchy
			}
			paths := []string{string(c.run)}
			for _, n := range c.nodes {
				paths = append(paths, n.cgroup())
			}
			for _, path := range paths {
				if err := os.WriteFile(filepath.Join(hierarchy, path, name), value, 0); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// connect joins the nodes by a pair of veth, and tells each the way to the
// other's pods. The default route goes nowhere: without one, the kernel would
// refuse ClusterIPs before kube-proxy's rules see them.
func (c *cluster) connect() error {
	a, b := c.nodes[0], c.nodes[1]
	if err := a.script("ip link add eth0 type veth peer name eth1"); err != nil {
		return err
	}
	// Pids of one node mean nothing on the other, so the move is made from here.
	move := exec.Command("nsenter", "--target="+a.pid(), "--net",
		"ip", "link", "set", "eth1", "netns", b.pid())
	if out, err := move.CombinedOutput(); err != nil {
		return fmt.Errorf("move the link to %s: %w: %s", b.name, err, out)
	}
	if err := b.script("ip link set eth1 name eth0"); err != nil {
		return err
	}
	for _, pair := range [][2]*node{{a, b}, {b, a}} {
		self, other := pair[0], pair[1]
		err := self.script(fmt.Sprintf(`
			ip address add %s/24 dev eth0
			ip link set eth0 up
			ip route add default via %[2]s
			ip route add %[3]s via %[2]s`, self.address(), other.address(), other.podRange()))
		if err != nil {
			return err
		}
	}
	return nil
}

// writeFiles writes what the API server and its clients need.
func (c *cluster) writeFiles() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: string(c.run)},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses:           []net.IP{net.ParseIP(c.control().address()), net.ParseIP(serviceAddress)},
		DNSNames:              []string{"kubernetes.default.svc"},
	}
	certificate, err1 := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	private, err2 := x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	for name, content := range map[string]string{
		"server.crt": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})),
		"server.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
		"tokens.csv": token + ",suite,suite,\"system:masters\"\n",
		"kubeconfig": fmt.Sprintf(`
apiVersion: v1
kind: Config
current-context: suite
clusters:
- {name: suite, cluster: {server: "https://%s:6443", certificate-authority: %s}}
users:
- {name: suite, user: {token: %s}}
contexts:
- {name: suite, context: {cluster: suite, user: suite}}
`, c.control().address(), c.file("server.crt"), token),
	} {
		if err := os.WriteFile(c.file(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) startServer() error {
	err := c.control().startDaemon("etcd", "--name=etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380")
	if err != nil {
		return err
	}
	return c.startAPIServer()
}

func (c *cluster) startAPIServer() error {
	err := c.control().startDaemon("kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address="+c.control().address(),
		"--tls-cert-file="+c.file("server.crt"), "--tls-private-key-file="+c.file("server.key"),
		"--client-ca-file="+c.file("server.crt"), "--requestheader-client-ca-file="+c.file("server.crt"),
		"--token-auth-file="+c.file("tokens.csv"), "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.file("server.crt"), "--service-account-signing-key-file="+c.file("server.key"),
		"--service-cluster-ip-range="+serviceRange, "--allow-privileged",
		"--kubelet-preferred-address-types=InternalIP")
	if err != nil {
		return err
	}
	return c.await("the API server", func() error {
		_, err := c.kubectl("get", "--raw=/readyz")
		return err
	})
}

// conflist is the node's CNI configuration, as long as podshunt is not installed.
func (n *node) conflist() string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, n.podRange())
}

// startRuntime starts containerd and gives it the images.
func (n *node) startRuntime() error {
	err := n.script(fmt.Sprintf(`
mkdir -p /etc/containerd
cat >/etc/containerd/config.toml <<'END'
version = 2
# Overlay is the one snapshotter that is used.
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %q
# Lowering a score takes CAP_SYS_RESOURCE, which this machine may not give.
restrict_oom_score_adj = true
END
cat >%s <<'END'
%sEND`, peerImage, conflist, n.conflist()))
	if err != nil {
		return err
	}
	if err := n.startDaemon("containerd"); err != nil {
		return err
	}
	if err := n.cluster.await("containerd", func() error {
		_, err := n.output(stepTimeout, nil, "ctr", "version")
		return err
	}); err != nil {
		return err
	}
	peer, err := imageArchive(filepath.Join(n.cluster.bin, "peer"))
	if err != nil {
		return err
	}
	agent, err := os.Open(n.cluster.image)
	if err != nil {
		return err
	}
	defer agent.Close()
	return errors.Join(n.importImage(bytes.NewReader(peer)), n.importImage(agent))
}

func (n *node) importImage(archive io.Reader) error {
	_, err := n.output(stepTimeout, archive, "ctr", "--namespace=k8s.io", "images", "import", "-")
	return err
}

func (c *cluster) startNodes() error {
	for daemon, args := range map[string][]string{
		"kube-controller-manager": {
			"--service-account-private-key-file=" + c.file("server.key"), "--root-ca-file=" + c.file("server.crt"),
		},
		"kube-scheduler": nil,
	} {
		args = append(args, "--kubeconfig="+c.kubeconfig(), "--leader-elect=false")
		if err := c.control().startDaemon(daemon, args...); err != nil {
			return err
		}
	}
	return c.each(func(n *node) error {
		if err := n.script(fmt.Sprintf(`
mkdir -p /etc/kubernetes
cat >/etc/kubernetes/kubelet.yaml <<'END'
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: %s
clusterDNS: [10.96.0.10] # nobody is there; without it every pod gets a warning
failCgroupV1: false
failSwapOn: false
protectKernelDefaults: true
oomScoreAdj: 0
maxPods: 250
kubeAPIQPS: 200
kubeAPIBurst: 400
registryPullQPS: 0
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
END
cat >/etc/kubernetes/proxy.yaml <<'END'
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %s}
mode: %s
clusterCIDR: %s
hostnameOverride: %s
oomScoreAdj: 0
# These belong to the machine's own network namespace.
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
END`, n.cgroup(), c.kubeconfig(), n.proxyMode, podRange, n.name)); err != nil {
			return err
		}
		if err := n.startDaemon("kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig="+c.kubeconfig(),
			"--hostname-override="+n.name, "--node-ip="+n.address()); err != nil {
			return err
		}
		// Started before its Node is there, kube-proxy would wait half a minute.
		err := c.await("the Node "+n.name, func() error {
			_, err := c.kubectl("get", "node", n.name)
			return err
		})
		return cmp.Or(err, n.startDaemon("kube-proxy", "--config=/etc/kubernetes/proxy.yaml"))
	})
}

func (c *cluster) awaitNodes() error {
	_, err := c.kubectl("wait", "--for=condition=Ready", "node", "--all", fmt.Sprintf("--timeout=%v", stepTimeout))
	return err
}

// dump writes what a person needs who looks for the cause of a failure.
func (c *cluster) dump(w io.Writer) {
	for _, args := range [][]string{
		{"get", "pods", "--all-namespaces", "--output=wide"},
		{"get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"},
		{"logs", "--namespace=" + release, "--selector=app.kubernetes.io/name=" + release, "--all-containers", "--prefix", "--tail=30"},
	} {
		out, err := c.kubectl(args...)
		fmt.Fprintf(w, "\n== kubectl %s\n%s", strings.Join(args, " "), lastLines(out, 60)+"\n")
		if err != nil {
			fmt.Fprintln(w, err)
		}
	}
	for _, n := range c.nodes {
		for name := range n.daemons {
			fmt.Fprintf(w, "\n== %s on %s\n%s\n", name, n.name, tail(n.log(name), 15))
		}
	}
}

func (c *cluster) printFigures(w io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.figures {
		fmt.Fprintln(w, "figure:", f)
	}
}

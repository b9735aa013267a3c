// SPDX-License-Identifier: Apache-2.0

// Package cri finds the node's container runtime among its processes, and reads in its
// configuration which directories and which network of CNI it uses. It only reads, and
// does not ask the runtime itself, whose socket gives power over the node.
package cri

import (
	"errors"
	"fmt"
	"strings"

	"github.com/podshunt/podshunt/agent/nodefs"
	"github.com/podshunt/podshunt/api"
)

// ErrNotFound says that the node runs no runtime that this package knows.
var ErrNotFound = errors.New("none of containerd, crio and cri-dockerd is among the processes of the node")

// errNoCRI says that a containerd does not serve the kubelet, such as Docker's.
var errNoCRI = errors.New("its CRI plugin is disabled")

// What all three runtimes use by default.
const (
	defaultConfDir = "/etc/cni/net.d"
	defaultBinDir  = "/opt/cni/bin"
)

// The parts of a command that are sources, beside files.
const (
	commandLine = "command line"
	environment = "environment"
)

// Found is a runtime that runs.
type Found struct {
	api.Runtime
	// Root leads to the root directory that the runtime has.
	Root    nodefs.Root
	process process
	// address is the socket of a containerd.
	address string
}

// Running reports whether the process that was found still runs.
func (f Found) Running() bool { return f.process.running() }

// readers has, by the name of its program, what reads a runtime's configuration.
func readers() map[string]func(*Found) error {
	return map[string]func(*Found) error{"containerd": readContainerd, "crio": readCRIO, "cri-dockerd": readCRIDockerd}
}

// Find returns the runtime that has started this process, and else the only one that
// runs on the node. proc is the path of a procfs of the node's PID namespace. If the
// configuration of the runtime cannot be read, it returns what is known of it and an
// error.
func Find(proc string) (Found, error) {
	all, err := processes(proc)
	if err != nil {
		return Found{}, fmt.Errorf("look for the container runtime: %w", err)
	}
	starter, readers := starterIn(proc), readers()
	var found []Found
	var errs []error
	for _, p := range all {
		read := readers[p.program()]
		if read == nil {
			continue
		}
		f := Found{Root: nodefs.Root(p.path("root")), process: p}
		err := read(&f)
		if errors.Is(err, errNoCRI) || !starter.mayBe(f) {
			continue
		}
		found, errs = append(found, f), append(errs, err)
	}
	switch len(found) {
	case 0:
		return Found{}, ErrNotFound
	case 1:
		f := found[0]
		if errs[0] != nil {
			return f, fmt.Errorf("read the configuration of %s: %w", f.Name, errs[0])
		}
		return f, nil
	}
	var names []string
	for _, f := range found {
		names = append(names, fmt.Sprintf("%s (process %d)", f.Name, f.process.pid))
	}
	return Found{}, fmt.Errorf("the node runs %s, and it is not known which of them starts pods", strings.Join(names, " and "))
}

// starter is what is known of the runtime that has started this process.
type starter struct{ name, address string }

// starterIn looks at the processes above this one: a shim has been told which runtime it
// belongs to. It returns the zero starter if there is none, as for a service of systemd.
func starterIn(proc string) starter {
	p, err := self(proc)
	for ; err == nil && p.pid > 1; p, err = p.parent() {
		args := p.args()
		switch program := p.program(); {
		case strings.HasPrefix(program, "containerd-shim"):
			if last(values(args, "namespace")) == "moby" {
				return starter{name: api.CRIDockerd}
			}
			return starter{name: api.Containerd, address: last(values(args, "address"))}
		case program == "conmon", program == "conmonrs":
			return starter{name: api.CRIO}
		}
	}
	return starter{}
}

func (s starter) mayBe(f Found) bool {
	if s.name != "" && s.name != f.Name {
		return false
	}
	return s.address == "" || f.address == "" || samePath(s.address, f.address)
}

// samePath compares paths of sockets. /var/run is a link to /run nearly everywhere.
func samePath(a, b string) bool {
	plain := func(path string) string { return strings.TrimPrefix(path, "/var") }
	if strings.HasPrefix(a, "/var/run/") || strings.HasPrefix(b, "/var/run/") {
		return plain(a) == plain(b)
	}
	return a == b
}

// SPDX-License-Identifier: Apache-2.0

// Processes, and their command lines.

package cri

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/podshunt/podshunt/agent/proc"
)

// process is a process of the node.
type process struct {
	root string // of the procfs
	pid  int
	stat proc.Stat
}

func (p process) path(file ...string) string { return proc.Path(p.root, p.pid, file...) }

// open returns the process with a number.
func open(root string, pid int) (process, error) {
	stat, err := proc.ReadStat(root, pid)
	return process{root, pid, stat}, err
}

// running reports whether the process has not ended; its number may be another's then.
func (p process) running() bool {
	now, err := proc.ReadStat(p.root, p.pid)
	return err == nil && now.Start == p.stat.Start
}

func (p process) parent() (process, error) { return open(p.root, p.stat.Parent) }

// args returns the command line, without an error for a process that has ended.
func (p process) args() []string { return p.words("cmdline") }

func (p process) words(file string) []string {
	data, err := os.ReadFile(p.path(file))
	if err != nil || len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
}

// program returns the name of the program by the command line, or "".
func (p process) program() string {
	if args := p.args(); len(args) > 0 {
		return filepath.Base(args[0])
	}
	return ""
}

// self returns this process as a procfs shows it.
func self(root string) (process, error) {
	pid, err := proc.Self(root)
	if err != nil {
		return process{}, err
	}
	return open(root, pid)
}

// processes returns those of the node, without the ones of PID namespaces below its own:
// a pod may run a container runtime, too (docker in docker, kind).
func processes(root string) ([]process, error) {
	pids, err := proc.PIDs(root)
	if err != nil {
		return nil, err
	}
	slices.Sort(pids)
	node, nodeErr := os.Readlink(proc.Path(root, 1, "ns", "pid"))
	var all []process
	for _, pid := range pids {
		p, err := open(root, pid)
		if err != nil {
			continue // it has ended
		}
		if namespace, err := os.Readlink(p.path("ns/pid")); nodeErr == nil && err == nil && namespace != node {
			continue
		}
		all = append(all, p)
	}
	return all, nil
}

// values returns the values of a flag with one of the names, in order, however it is
// written: -c x, -c=x, --config x, --config=x.
func values(args []string, names ...string) (found []string) {
	for i, arg := range args {
		name, value, joined := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		switch {
		case !strings.HasPrefix(arg, "-") || !slices.Contains(names, name):
		case joined:
			found = append(found, value)
		case i+1 < len(args):
			found = append(found, args[i+1])
		}
	}
	return found
}

// last returns the last of several values, which wins, or "".
func last(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}

// listed splits the values of a flag that may be given several times, and have commas.
func listed(values []string) (all []string) {
	for _, value := range values {
		for item := range strings.SplitSeq(value, ",") {
			if item = strings.TrimSpace(item); item != "" {
				all = append(all, item)
			}
		}
	}
	return all
}

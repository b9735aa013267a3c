// SPDX-License-Identifier: Apache-2.0

// Processes, and their command lines.

package cri

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// process is a process of the node.
type process struct {
	proc  string
	pid   int
	start string // in clock ticks after boot
}

func (p process) path(file ...string) string {
	return filepath.Join(append([]string{p.proc, strconv.Itoa(p.pid)}, file...)...)
}

// open returns the process with a number.
func open(proc string, pid int) (process, error) {
	p := process{proc: proc, pid: pid}
	fields, err := p.stat()
	if err != nil {
		return p, err
	}
	p.start = fields[19]
	return p, nil
}

// stat returns the fields behind the name, which may itself contain anything: the state
// is the first of them, the parent the second, and the start the 20th.
func (p process) stat() ([]string, error) {
	data, err := os.ReadFile(p.path("stat"))
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("decode %s: got %d fields after the name, want 20", p.path("stat"), len(fields))
	}
	return fields, nil
}

// running reports whether the process has not ended; its number may be another's then.
func (p process) running() bool {
	fields, err := p.stat()
	return err == nil && fields[19] == p.start
}

func (p process) parent() (process, error) {
	fields, err := p.stat()
	if err != nil {
		return process{}, err
	}
	pid, err := strconv.Atoi(fields[1])
	if err != nil {
		return process{}, err
	}
	return open(p.proc, pid)
}

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
func self(proc string) (process, error) {
	target, err := os.Readlink(filepath.Join(proc, "self"))
	if err != nil {
		return process{}, err
	}
	pid, err := strconv.Atoi(target)
	if err != nil {
		return process{}, err
	}
	return open(proc, pid)
}

// processes returns those of the node, without the ones of PID namespaces below its own:
// a pod may run a container runtime, too (docker in docker, kind).
func processes(proc string) ([]process, error) {
	dir, err := os.Open(proc)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	node, nodeErr := os.Readlink(filepath.Join(proc, "1/ns/pid"))
	var all []process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		p, err := open(proc, pid)
		if err != nil {
			continue // it has ended
		}
		if namespace, err := os.Readlink(p.path("ns/pid")); nodeErr == nil && err == nil && namespace != node {
			continue
		}
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b process) int { return a.pid - b.pid })
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

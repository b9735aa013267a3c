// SPDX-License-Identifier: Apache-2.0

// Package critest makes nodes for tests: files, and processes as a procfs shows them.
package critest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Self is the process that a Node's procfs takes the test for.
const Self = 4000

// Node is a node with processes and files.
type Node struct {
	testing.TB
	// Proc is its procfs, and Root its root directory.
	Proc, Root string
	// seen is the path of Root for whoever follows /proc/PID/root.
	seen string
}

// New makes a node with process 1 and with files by their paths; a content "-> PATH" makes a link.
func New(t testing.TB, files map[string]string) Node {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	return NewSeen(t, files, root, root)
}

// NewSeen makes a node at root, which whoever looks at its procfs has at the path seen.
func NewSeen(t testing.TB, files map[string]string, root, seen string) Node {
	t.Helper()
	n := Node{TB: t, Proc: filepath.Join(t.TempDir(), "proc"), Root: root, seen: seen}
	n.MustMkdir(n.Root)
	for path, content := range files {
		path = filepath.Join(n.Root, path)
		n.MustMkdir(filepath.Dir(path))
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			n.Check(os.Symlink(target, path))
			continue
		}
		n.MustWrite(path, content)
	}
	n.Add(1, 0, "pid:[1]", "/sbin/init")
	return n
}

// Check fails the test unless err is nil.
func (n Node) Check(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// MustMkdir makes a directory and those above it.
func (n Node) MustMkdir(dir string) { n.Helper(); n.Check(os.MkdirAll(dir, 0o755)) }

// MustWrite writes a file.
func (n Node) MustWrite(path, content string) {
	n.Helper()
	n.Check(os.WriteFile(path, []byte(content), 0o644))
}

// Add adds a process. A command may begin with settings of its environment.
func (n Node) Add(pid, parent int, namespace, command string) {
	n.Helper()
	var env []string
	args := strings.Fields(command)
	for len(args) > 0 && strings.Contains(args[0], "=") {
		env, args = append(env, args[0]), args[1:]
	}
	dir := filepath.Join(n.Proc, fmt.Sprint(pid))
	n.MustMkdir(filepath.Join(dir, "ns"))
	n.MustWrite(filepath.Join(dir, "cmdline"), strings.Join(args, "\x00")+"\x00")
	n.MustWrite(filepath.Join(dir, "environ"), strings.Join(env, "\x00"))
	n.MustWrite(filepath.Join(dir, "stat"), fmt.Sprintf("%d (a) name) S %d%s 77%d 0 0\n", pid, parent, strings.Repeat(" 0", 17), pid))
	n.Check(os.Symlink(namespace, filepath.Join(dir, "ns/pid")))
	n.Check(os.Symlink(n.seen, filepath.Join(dir, "root")))
}

// AddAll adds processes of the node, some in a pod, and the test as one that starter has
// started; it may be empty.
func (n Node) AddAll(starter string, processes []string) {
	n.Helper()
	for i, command := range processes {
		n.Add(100+i, 1, "pid:[1]", command)
	}
	// A runtime in a pod, which is no runtime of the node's.
	n.Add(3000, 1, "pid:[2]", "/usr/local/bin/containerd")
	n.Add(3001, 1, "pid:[2]", "/usr/bin/crio")
	if starter != "" {
		n.Add(200, 1, "pid:[1]", starter)
		n.Add(300, 200, "pid:[2]", "tini -- podshunt-agent run")
		n.Add(Self, 300, "pid:[2]", "podshunt-agent run")
		n.Check(os.Symlink(fmt.Sprint(Self), filepath.Join(n.Proc, "self")))
	}
}

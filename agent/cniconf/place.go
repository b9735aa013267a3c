// SPDX-License-Identifier: Apache-2.0

package cniconf

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// errReplaced says that a directory was deleted, or put aside, and made again on the
// node. The mount of a container still has the former one: nothing that is done
// there reaches the runtime. Only a new start of the container mounts the new one.
var errReplaced = errors.New("the node has another directory there now, and this container still has the former one")

// errDeleted says that a directory was deleted on the node. It may be made again.
var errDeleted = errors.New("the node has deleted it")

// place is one of the runtime's directories, as this process and the node see it.
type place struct {
	path string
	// root is where this process sees the root directory of the node, or "".
	root string
	// shared is set once both have had the same directory at the path. Where they never
	// have, the node's path is another one, and says nothing.
	shared bool
}

// check returns errReplaced or errDeleted if what this process sees is not the
// node's any more. That nothing is there at all is for others to report.
func (p *place) check() error {
	ours, err := identify(p.path)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	node, nodeErr := p.onNode()
	// Again, as a process without a mount of its own sees a new directory at once.
	if again, err := identify(p.path); err != nil || again != ours {
		return nil //nolint:nilerr // the next look finds it at rest
	}
	same := nodeErr == nil && node.ino == ours.ino && node.dev == ours.dev
	p.shared = p.shared || same
	switch {
	case p.shared && nodeErr == nil && !same:
		return fmt.Errorf("%s: %w: the agent has to be started again", p.path, errReplaced)
	case ours.nlink == 0, p.shared && errors.Is(nodeErr, unix.ENOENT):
		return fmt.Errorf("%s: %w: once it is made again, restart the agent's pod, whose mount is that of the deleted one", p.path, errDeleted)
	}
	return nil
}

// identity is what tells directories apart.
type identity struct{ dev, ino, nlink uint64 }

func identify(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, err
	}
	return identityOf(&st), nil
}

func identityOf(st *unix.Stat_t) identity {
	return identity{dev: uint64(st.Dev), ino: st.Ino, nlink: uint64(st.Nlink)} //nolint:unconvert // narrower on some architectures
}

// onNode finds the directory on the node. Links on the way are the node's: one that
// begins with a slash begins at its root.
func (p *place) onNode() (identity, error) {
	if p.root == "" {
		return identity{}, errors.New("the node's root directory is not known")
	}
	root, err := os.Open(p.root)
	if err != nil {
		return identity{}, err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), p.path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT,
	})
	if err != nil {
		return identity{}, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return identity{}, err
	}
	return identityOf(&st), nil
}

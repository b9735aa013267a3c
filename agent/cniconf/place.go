// SPDX-License-Identifier: Apache-2.0

// A directory of the node as the agent sees it through a mount, and whether the node still has the same one.

package cniconf

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/agent/nodefs"
)

// errReplaced says that the node has deleted or renamed a directory and made it
// again. The container's mount still shows the old directory, so nothing that is
// written there reaches the runtime. Only a new start of the container mounts the
// new one.
var errReplaced = errors.New("the node has another directory there now, and this container still has the former one")

// errDeleted says that a directory was deleted on the node. It may be made again.
var errDeleted = errors.New("the node has deleted it")

// place is one of the runtime's directories, as this process and the node see it.
type place struct {
	path string
	// root is a path that leads to the node's root directory, or "".
	root string
	// shared is set once both have had the same directory at the path. If they never
	// have, the directory is elsewhere on the node, and cannot be compared.
	shared bool
}

// check returns errReplaced or errDeleted if this process no longer sees the node's
// directory. It returns nil if this process sees none: others report that.
func (p *place) check() error {
	ours, err := identify(p.path)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	node, nodeErr := p.onNode()
	// Compare again: without a mount of its own, this process sees a new directory
	// at once.
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

// identity tells directories apart.
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

// onNode finds the directory on the node. It follows links as the node does.
func (p *place) onNode() (identity, error) {
	if p.root == "" {
		return identity{}, errors.New("the node's root directory is not known")
	}
	st, err := nodefs.Root(p.root).Stat(p.path)
	if err != nil {
		return identity{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return identity{}, unix.ENOTDIR
	}
	return identityOf(&st), nil
}

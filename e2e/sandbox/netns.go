// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Netns is a network namespace, kept by a bind mount on Path. Its methods may
// be called concurrently.
type Netns struct {
	Path string
}

// threadNetns is the network namespace of the calling thread. It serves only
// a goroutine that is locked to its thread.
const threadNetns = "/proc/thread-self/ns/net"

// newNetns makes a network namespace with its loopback interface up.
func newNetns(path string) (*Netns, error) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	n := &Netns{Path: path}
	err := inNetns(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		if err := unix.Mount(threadNetns, path, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err == nil {
		// Without duplicate address detection an IPv6 address serves at once;
		// the kernel goes by the higher of the two settings.
		err = errors.Join(n.Sysctl("net.ipv6.conf.all.accept_dad", "0"), n.Sysctl("net.ipv6.conf.default.accept_dad", "0"))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make network namespace %s: %w", path, err), n.remove())
	}
	return n, nil
}

// remove gives the namespace up; it ends with its last process and socket.
// Removing it again is no error.
func (n *Netns) remove() error {
	// EINVAL: not a mount point.
	if err := unix.Unmount(n.Path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", n.Path, err)
	}
	return os.RemoveAll(n.Path)
}

// Do calls fn, on the caller's goroutine, with the thread in n. Sockets and
// processes that fn makes stay in n; goroutines that it starts do not run there.
func (n *Netns) Do(fn func() error) error {
	ns, err := os.Open(n.Path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNetns(func() error { return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET) }, fn)
}

// inNetns calls fn after enter has changed the network namespace of the thread.
func inNetns(enter, fn func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open(threadNetns)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := enter(); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer func() {
		if e := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); e != nil {
			// The goroutine stays locked, so that the thread ends with it and
			// serves no other.
			err = errors.Join(err, fmt.Errorf("leave network namespace: %w", e))
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
}

// Listen is net.Listen in n. It never makes MPTCP sockets, which Go does by
// default and podshunt leaves alone.
func (n *Netns) Listen(network, address string) (net.Listener, error) {
	var (
		config   net.ListenConfig
		listener net.Listener
	)
	config.SetMultipathTCP(false)
	err := n.Do(func() (err error) {
		listener, err = config.Listen(context.Background(), network, address)
		return err
	})
	return listener, err
}

// Dial is net.DialTimeout in n. The address must be an IP address and a port:
// for a name, net would use sockets of other threads.
func (n *Netns) Dial(network, address string, timeout time.Duration) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, err
	}
	var conn net.Conn
	err := n.Do(func() (err error) {
		conn, err = net.DialTimeout(network, address, timeout)
		return err
	})
	return conn, err
}

// Start is cmd.Start in n. Unless cmd says otherwise, the process belongs to
// the sandbox's cgroup and mount namespace; what is still running when the run
// ends is killed, but counts as leaked.
func (n *Netns) Start(cmd *exec.Cmd) error {
	return n.Do(cmd.Start)
}

// Sysctl sets a parameter such as "net.ipv4.tcp_syncookies". Only those under
// net belong to a network namespace, so it refuses others.
func (n *Netns) Sysctl(name, value string) error {
	if !strings.HasPrefix(name, "net.") {
		return fmt.Errorf("set %s: accepted are parameters under net", name)
	}
	return n.Do(func() error {
		file := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
		// No O_CREAT: the error for a missing parameter would mislead.
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(value)
		return errors.Join(err, f.Close())
	})
}

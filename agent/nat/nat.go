// SPDX-License-Identifier: Apache-2.0

// Package nat finds out whether a network namespace changes the ports of incoming
// connections, as a service mesh with a proxy in the pod does. The port of a server's
// socket then differs from the one that the network has seen. The package only reads.
package nat

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// timeout bounds each request to the kernel.
const timeout = 2 * time.Second

// Redirects reports whether the network namespace at path has rules that change the
// destination of connections. If that cannot be found out, it returns true and the
// error.
func Redirects(path string) (bool, error) {
	redirects, err := inside(path)
	if err != nil {
		return true, fmt.Errorf("look for redirected ports in %s: %w", path, err)
	}
	return redirects, nil
}

func inside(path string) (bool, error) {
	found, conn, err := open(path)
	if found || conn == nil || err != nil {
		return found, err
	}
	defer conn.CloseLasting() //nolint:errcheck // nothing was written to it
	return nft(conn)
}

// open reports whether iptables-legacy redirects in the network namespace at path, and
// connects to its nftables, unless there is no netfilter at all. The caller uses the
// connection elsewhere: a goroutine that is locked to its thread takes long to wait for
// an answer.
func open(path string) (found bool, conn *nftables.Conn, err error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return false, nil, err
	}
	defer ns.Close()
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return false, nil, err
	}
	defer own.Close()
	defer func() {
		if back := netns.Set(own); back != nil {
			// The thread stays locked, so that no other goroutine runs in the
			// namespace.
			err = errors.Join(err, fmt.Errorf("return to the own network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	if err := netns.Set(ns); err != nil {
		return false, nil, err
	}
	for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
		if found, err := legacy("/proc/thread-self/net/" + file); found || err != nil {
			return found, nil, err
		}
	}
	conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetDeadline(time.Now().Add(timeout))
	}))
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return false, nil, nil // no netfilter at all
	}
	return false, conn, err
}

// legacy reports whether iptables-legacy has a NAT table, which exists from the first
// rule on. It does not look at the rules.
func legacy(file string) (bool, error) {
	names, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the kernel has no such tables
	}
	return slices.Contains(strings.Fields(string(names)), "nat"), err
}

// nft reports whether nftables has a rule that redirects, including those of
// iptables-nft.
func nft(conn *nftables.Conn) (bool, error) {
	chains, err := conn.ListChains()
	if err != nil {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return false, nil // netfilter without nf_tables
		}
		return false, fmt.Errorf("list chains: %w", err)
	}
	type table struct {
		name   string
		family nftables.TableFamily
	}
	nat := map[table]bool{}
	for _, c := range chains {
		if c.Type == nftables.ChainTypeNAT {
			nat[table{c.Table.Name, c.Table.Family}] = true
		}
	}
	for _, c := range chains {
		// All chains of the table count: a rule may be in one that the
		// hook's chain jumps to.
		if !nat[table{c.Table.Name, c.Table.Family}] {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if errors.Is(err, unix.ENOENT) {
			continue // deleted meanwhile
		}
		if err != nil {
			return false, fmt.Errorf("list rules of chain %s: %w", c.Name, err)
		}
		for _, r := range rules {
			if slices.ContainsFunc(r.Exprs, redirects) {
				return true, nil
			}
		}
	}
	return false, nil
}

func redirects(e expr.Any) bool {
	switch e := e.(type) {
	case *expr.Redir:
		return true
	case *expr.NAT:
		return e.Type == expr.NATTypeDestNAT
	case *expr.Target: // of iptables-nft
		return slices.Contains([]string{"REDIRECT", "DNAT", "NETMAP"}, e.Name)
	}
	return false
}

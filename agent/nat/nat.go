// SPDX-License-Identifier: Apache-2.0

// Package nat tells whether a network namespace changes the ports of connections that
// come in, as a service mesh does that has its proxy in the pod: then the port of a
// server's socket is not the one that the network has seen. It only reads.
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

// timeout bounds a question to the kernel.
const timeout = 2 * time.Second

// Redirects tells whether the network namespace at path has rules that give a
// connection another destination. Where that cannot be found out, it is true, and
// the error says why.
func Redirects(path string) (bool, error) {
	redirects, err := inside(path)
	if err != nil {
		return true, fmt.Errorf("look for redirected ports in %s: %w", path, err)
	}
	return redirects, nil
}

func inside(path string) (redirects bool, err error) {
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return false, err
	}
	defer own.Close()
	defer func() {
		if back := netns.Set(own); back != nil {
			// The thread stays locked, so that nobody else meets the namespace.
			err = errors.Join(err, fmt.Errorf("return to the own network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return false, err
	}
	for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
		if found, err := legacy("/proc/thread-self/net/" + file); found || err != nil {
			return found, err
		}
	}
	return nft()
}

// legacy tells whether iptables-legacy has a table for NAT. It is there from the first
// rule on, and what the rules are is not looked at.
func legacy(file string) (bool, error) {
	names, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the kernel has no such tables
	}
	return slices.Contains(strings.Fields(string(names)), "nat"), err
}

// nft tells whether nftables has a rule that redirects; iptables-nft writes such ones.
func nft() (bool, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetDeadline(time.Now().Add(timeout))
	}))
	if err != nil {
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return false, nil // no netfilter at all
		}
		return false, err
	}
	defer conn.CloseLasting() //nolint:errcheck // nothing was written to it
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
		// A rule may be in a chain that the one with the hook jumps to.
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

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
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	if found, err := legacy(ns); found || err != nil {
		return found, err
	}
	return nft(ns)
}

// legacy reports whether iptables-legacy has a NAT table, which exists from the first
// rule on. It does not look at the rules.
func legacy(ns netns.NsHandle) (found bool, err error) {
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return false, err
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
		return false, err
	}
	for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
		names, err := os.ReadFile("/proc/thread-self/net/" + file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the kernel has no such tables
		}
		if err != nil {
			return false, err
		}
		if slices.Contains(strings.Fields(string(names)), "nat") {
			return true, nil
		}
	}
	return false, nil
}

// nft reports whether nftables has a rule that redirects, including those of
// iptables-nft. Only its socket is made in the namespace: a goroutine that is locked to its
// thread takes much longer to wait for an answer.
func nft(ns netns.NsHandle) (bool, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(int(ns)), nftables.WithSockOptions(func(c *netlink.Conn) error {
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

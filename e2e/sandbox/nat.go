// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// DNAT makes vip, which should lie outside of the pods' subnets, a TCP service
// address on the node: connections of pods to it go to to.
func (s *Sandbox) DNAT(vip, to netip.AddrPort) error {
	family, destination := unix.NFPROTO_IPV4, &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4, DestRegister: 1}
	if vip.Addr().Is6() {
		family, destination = unix.NFPROTO_IPV6, &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16, DestRegister: 1}
	}
	return s.addRule(nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, append(
		matchVIP(vip, destination, &expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: 1}),
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(family), RegAddrMin: 1, RegProtoMin: 2},
	))
}

// Masquerade makes servers behind vip see the node's address as the source of
// connections to it.
func (s *Sandbox) Masquerade(vip netip.AddrPort) error {
	// By now the packet has the server's address; the connection still knows
	// what its client asked for. Direction 0 is the original one.
	return s.addRule(nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, append(
		matchVIP(vip, &expr.Ct{Key: expr.CtKeyDST, Register: 1}, &expr.Ct{Key: expr.CtKeyPROTODST, Register: 1}),
		&expr.Masq{},
	))
}

// matchVIP matches TCP packets for which address and port load those of vip
// into register 1.
func matchVIP(vip netip.AddrPort, address, port expr.Any) []expr.Any {
	family := byte(unix.NFPROTO_IPV4)
	if vip.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	equal := func(data ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal(family),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal(unix.IPPROTO_TCP),
		address, equal(vip.Addr().AsSlice()...),
		port, equal(binaryutil.BigEndian.PutUint16(vip.Port())...),
	}
}

// addRule appends a rule to the node's NAT chain at hook.
func (s *Sandbox) addRule(hook *nftables.ChainHook, priority *nftables.ChainPriority, rule []expr.Any) error {
	// Replies from one pod to another on the same bridge are not routed; they
	// meet the translation only through these.
	for _, name := range []string{"net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"} {
		if err := s.Node.Sysctl(name, "1"); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("translate addresses on a bridge: %w: is the module br_netfilter loaded?", err)
		} else if err != nil {
			return err
		}
	}
	return s.Node.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "sandbox"})
		chain := conn.AddChain(&nftables.Chain{
			Name: fmt.Sprintf("hook%d", *hook), Table: table, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: priority,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule})
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("add NAT rule: %w", err)
		}
		return nil
	})
}

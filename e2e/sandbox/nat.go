// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// DNAT makes vip a TCP service address on the node: connections of pods to vip are
// sent to the address to. vip should be outside of the pods' subnets. A second call
// for the same vip redirects new connections only, as when a Service gets another
// endpoint.
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

// filterBridge applies the node's rules to what one pod sends to another on the same
// bridge, which is not routed.
func (s *Sandbox) filterBridge() error {
	for _, name := range []string{"net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"} {
		if err := s.Node.Sysctl(name, "1"); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("filter on a bridge: %w: is the module br_netfilter loaded?", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// addRule puts a rule at the head of the node's NAT chain at hook.
func (s *Sandbox) addRule(hook *nftables.ChainHook, priority *nftables.ChainPriority, rule []expr.Any) error {
	if err := s.filterBridge(); err != nil {
		return err
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
		conn.InsertRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule})
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("add NAT rule: %w", err)
		}
		return nil
	})
}

// Stateful makes the node drop TCP packets from and to the server, except those of
// connections that the node knows and of new connections to the server.
func (s *Sandbox) Stateful(server netip.AddrPort) error {
	if !server.Addr().Is4() {
		return fmt.Errorf("stateful rules for %v: accepted are IPv4 addresses", server)
	}
	if err := s.filterBridge(); err != nil {
		return err
	}
	return s.Node.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "stateful"})
		chain := conn.AddChain(&nftables.Chain{
			Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
		})
		inState := func(state uint32) []expr.Any {
			return []expr.Any{
				&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(state), Xor: make([]byte, 4)},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
			}
		}
		// at matches the server's address and port at these offsets of both headers.
		at := func(address, port uint32) []expr.Any {
			return matchVIP(server,
				&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: address, Len: 4, DestRegister: 1},
				&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2, DestRegister: 1})
		}
		accept, drop := &expr.Verdict{Kind: expr.VerdictAccept}, &expr.Verdict{Kind: expr.VerdictDrop}
		for _, rule := range [][]expr.Any{
			append(inState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept),
			slices.Concat(inState(expr.CtStateBitNEW), at(16, 2), []expr.Any{accept}),
			append(at(16, 2), drop),
			append(at(12, 0), drop),
		} {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule})
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("add stateful rules: %w", err)
		}
		return nil
	})
}

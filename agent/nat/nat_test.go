// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package nat_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"github.com/podshunt/podshunt/agent/nat"
	"github.com/podshunt/podshunt/e2e/sandbox"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// TestRedirects looks at pods with real rules.
func TestRedirects(t *testing.T) {
	s := sandboxtest.MustNew(t, sandbox.Config{})
	port := func(register uint32) expr.Any {
		return &expr.Immediate{Register: register, Data: binaryutil.BigEndian.PutUint16(15006)}
	}
	verdict := func(kind expr.VerdictKind, chain string) expr.Any { return &expr.Verdict{Kind: kind, Chain: chain} }
	type chain struct {
		name  string
		kind  nftables.ChainType // "" for one without a hook
		hook  *nftables.ChainHook
		rules [][]expr.Any
	}
	for i, tc := range []struct {
		name   string
		family nftables.TableFamily
		chains []chain
		want   bool
	}{
		{name: "nothing"},
		{name: "an empty chain", family: nftables.TableFamilyIPv4, chains: []chain{
			{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nil},
		}},
		{name: "redirect", family: nftables.TableFamilyIPv4, want: true, chains: []chain{
			{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, [][]expr.Any{{port(1), &expr.Redir{RegisterProtoMin: 1}}}},
		}},
		{name: "redirect of IPv6", family: nftables.TableFamilyIPv6, want: true, chains: []chain{
			{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, [][]expr.Any{{port(1), &expr.Redir{RegisterProtoMin: 1}}}},
		}},
		{name: "redirect in a chain of its own", family: nftables.TableFamilyINet, want: true, chains: []chain{
			{"inbound", "", nil, [][]expr.Any{{&expr.Counter{}}, {port(1), &expr.Redir{RegisterProtoMin: 1}}}},
			{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, [][]expr.Any{{verdict(expr.VerdictJump, "inbound")}}},
		}},
		{name: "dnat", family: nftables.TableFamilyIPv4, want: true, chains: []chain{
			{"output", nftables.ChainTypeNAT, nftables.ChainHookOutput, [][]expr.Any{{
				&expr.Immediate{Register: 1, Data: []byte{127, 0, 0, 1}}, port(2),
				&expr.NAT{Type: expr.NATTypeDestNAT, Family: 2, RegAddrMin: 1, RegProtoMin: 2},
			}}},
		}},
		{name: "masquerade", family: nftables.TableFamilyIPv4, chains: []chain{
			{"postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, [][]expr.Any{{&expr.Masq{}}}},
		}},
		{name: "a filter", family: nftables.TableFamilyINet, chains: []chain{
			{"input", nftables.ChainTypeFilter, nftables.ChainHookInput, [][]expr.Any{{&expr.Counter{}, verdict(expr.VerdictAccept, "")}}},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := sandboxtest.MustAddPod(t, s, fmt.Sprint("pod", i), sandbox.PodOptions{})
			defer func() {
				if err := s.DelPod(pod); err != nil {
					t.Error(err)
				}
			}()
			look := func() bool {
				t.Helper()
				got, err := nat.Redirects(pod.Path)
				if err != nil {
					t.Fatal(err)
				}
				return got
			}
			if look() {
				t.Error("got true for a new pod")
			}
			if len(tc.chains) == 0 {
				return
			}
			err := pod.Do(func() error {
				conn, err := nftables.New()
				if err != nil {
					return err
				}
				table := conn.AddTable(&nftables.Table{Family: tc.family, Name: "mesh"})
				for _, c := range tc.chains {
					made := &nftables.Chain{Name: c.name, Table: table, Type: c.kind, Hooknum: c.hook}
					if c.hook != nil {
						made.Priority = nftables.ChainPriorityNATDest
					}
					conn.AddChain(made)
					for _, rule := range c.rules {
						conn.AddRule(&nftables.Rule{Table: table, Chain: made, Exprs: rule})
					}
				}
				return conn.Flush()
			})
			if err != nil {
				t.Fatal(err)
			}
			if got := look(); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}

	got, err := nat.Redirects(filepath.Join(t.TempDir(), "none"))
	if err == nil || !got {
		t.Errorf("no such namespace: got %v and error %v, want true and an error", got, err)
	}
}

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m.Run)) }

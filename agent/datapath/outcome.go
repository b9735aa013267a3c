// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/bpf"
)

// outcomes gives every outcome of bpf/outcome.h the name of its counter and,
// for messages, the text that explains a direction on TCP.
func outcomes() [bpf.ShortcutOutcomeOUTCOME_MAX]struct{ name, text string } {
	return [bpf.ShortcutOutcomeOUTCOME_MAX]struct{ name, text string }{
		bpf.ShortcutOutcomeOUTCOME_SHORTCUT:         {"message_shortcut", "shortcut"},
		bpf.ShortcutOutcomeOUTCOME_UNKNOWN_SOCKET:   {"message_unknown_socket", "the connection is closing"},
		bpf.ShortcutOutcomeOUTCOME_SWITCHED_OFF:     {"message_switched_off", "podshunt is unloading"},
		bpf.ShortcutOutcomeOUTCOME_PEER_MISSING:     {"message_peer_missing", "the server's socket has not joined"},
		bpf.ShortcutOutcomeOUTCOME_PEER_GONE:        {"message_peer_gone", "the other socket is closed"},
		bpf.ShortcutOutcomeOUTCOME_EVICTED:          {"message_evicted", "a socket in blocking mode has been evicted from the shortcut"},
		bpf.ShortcutOutcomeOUTCOME_STALE:            {"message_stale", "the agent has not been able to vouch for the policy for longer than --policy-lease"},
		bpf.ShortcutOutcomeOUTCOME_NOT_ALLOWED:      {"message_not_allowed", "not allowed"},
		bpf.ShortcutOutcomeOUTCOME_SHUT_DOWN:        {"message_shut_down", "the sender has shut down writing"},
		bpf.ShortcutOutcomeOUTCOME_ULP:              {"message_ulp", "kTLS or another upper layer protocol is in use"},
		bpf.ShortcutOutcomeOUTCOME_ZEROCOPY:         {"message_zerocopy", "the sender has set SO_ZEROCOPY"},
		bpf.ShortcutOutcomeOUTCOME_LOWAT:            {"message_lowat", "the receiver has set SO_RCVLOWAT"},
		bpf.ShortcutOutcomeOUTCOME_NOT_SEEN:         {"message_not_seen", "the receiver has not been seen to read yet"},
		bpf.ShortcutOutcomeOUTCOME_UNSUPPORTED:      {"message_unsupported", "a call was used that the shortcut does not serve"},
		bpf.ShortcutOutcomeOUTCOME_TRIAL:            {"message_trial", "the receiver has yet to show by TCP that it reads such messages by recv"},
		bpf.ShortcutOutcomeOUTCOME_EDGE:             {"message_edge", "the receiver waits for edges of epoll, and has yet to show that it reads until nothing is left"},
		bpf.ShortcutOutcomeOUTCOME_REFRESH:          {"message_refresh", "one message now and then keeps the connection known to the network"},
		bpf.ShortcutOutcomeOUTCOME_DRAINING:         {"message_draining", "the receiver has TCP bytes to read first"},
		bpf.ShortcutOutcomeOUTCOME_UNOBSERVED:       {"message_unobserved", "the receiver is inside a read, or reads by splice or another call that is not seen"},
		bpf.ShortcutOutcomeOUTCOME_BUDGET:           {"message_budget", "the receiver has left too much unread"},
		bpf.ShortcutOutcomeOUTCOME_RECEIVE_BUFFER:   {"message_receive_buffer", "the receiver's buffer is small, and TCP needs what is left of it"},
		bpf.ShortcutOutcomeOUTCOME_POD_BUDGET:       {"message_pod_budget", "the connections of the receiver's pod have left too much unread"},
		bpf.ShortcutOutcomeOUTCOME_MEMORY:           {"message_memory", "the node's TCP uses more memory than the first value of net.ipv4.tcp_mem"},
		bpf.ShortcutOutcomeOUTCOME_REDIRECT_REFUSED: {"message_redirect_refused", "the other socket is closing"},
		bpf.ShortcutOutcomeOUTCOME_PAIRED:           {"connection_paired", ""},
		bpf.ShortcutOutcomeOUTCOME_POLICY_REFUSED:   {"connection_policy_refused", ""},
		bpf.ShortcutOutcomeOUTCOME_PAIRING_STALE:    {"connection_stale", ""},
		bpf.ShortcutOutcomeOUTCOME_UNSUPPORTED_PORT: {"connection_unsupported", ""},
		bpf.ShortcutOutcomeOUTCOME_SHARE:            {"connection_share", ""},
		bpf.ShortcutOutcomeOUTCOME_KERNEL_SOCKET:    {"connection_kernel_socket", ""},
		bpf.ShortcutOutcomeOUTCOME_MPTCP:            {"connection_mptcp", ""},
		bpf.ShortcutOutcomeOUTCOME_BLOCKING_CLIENT:  {"connection_blocking_client", ""},
		bpf.ShortcutOutcomeOUTCOME_BLOCKING_SERVER:  {"connection_blocking_server", ""},
		bpf.ShortcutOutcomeOUTCOME_CLIENT_ULP:       {"connection_client_ulp", ""},
		bpf.ShortcutOutcomeOUTCOME_SYNS_FULL:        {"connection_syns_full", ""},
		bpf.ShortcutOutcomeOUTCOME_SYN_LOST:         {"connection_syn_lost", ""},
		bpf.ShortcutOutcomeOUTCOME_PENDING_FULL:     {"connection_pending_full", ""},
		bpf.ShortcutOutcomeOUTCOME_FLOWS_FULL:       {"connection_flows_full", ""},
		bpf.ShortcutOutcomeOUTCOME_SOCKETS_FULL:     {"connection_sockets_full", ""},
		bpf.ShortcutOutcomeOUTCOME_SOCKET_BUSY:      {"connection_socket_busy", ""},
		bpf.ShortcutOutcomeOUTCOME_NO_MEMORY:        {"connection_no_memory", ""},
		bpf.ShortcutOutcomeOUTCOME_UNMATCHED:        {"connection_unmatched", ""},
		bpf.ShortcutOutcomeOUTCOME_CLIENT_CLOSED:    {"connection_client_closed", ""},
		bpf.ShortcutOutcomeOUTCOME_REUSED:           {"socket_reused", ""},
		bpf.ShortcutOutcomeOUTCOME_SOCKET_EVICTED:   {"socket_evicted", ""},
	}
}

// Outcomes returns all counters, zeroes included, in a fixed order. They count
// from the creation of the kernel objects on.
func (d *Datapath) Outcomes() ([]api.Outcome, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unloaded {
		return nil, nil
	}
	var counts []api.Outcome
	for outcome, o := range outcomes() {
		var perCPU []bpf.ShortcutCount
		if err := d.objects.Maps[bpf.ShortcutMapOutcomes].Lookup(uint32(outcome), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", o.name, err)
		}
		sum := api.Outcome{Name: o.name}
		for _, c := range perCPU {
			sum.Count += c.Number
			sum.Bytes += c.Bytes
		}
		counts = append(counts, sum)
	}
	return counts, nil
}

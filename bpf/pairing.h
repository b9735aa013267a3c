/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Pairing: the two sockets of a handshake find each other and become a flow. */
#ifndef PODSHUNT_PAIRING_H
#define PODSHUNT_PAIRING_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "blocking.h"
#include "flow.h"
#include "kernel.h"
#include "learned.h"
#include "lifetime.h"
#include "limits.h"
#include "maps.h"
#include "neighbour.h"
#include "owned.h"
#include "unsupported.h"

/* The initial value of a flow, which is too large for the stack. */
static const struct flow blank;

/* Turns the error of bpf_sock_hash_update into an outcome. */
static __always_inline enum outcome join_failure(int err)
{
	switch (err) {
	case -E2BIG:
		return OUTCOME_SOCKETS_FULL;
	case -EBUSY:
		return OUTCOME_SOCKET_BUSY;
	default:
		return OUTCOME_NO_MEMORY;
	}
}

/*
 * Puts a socket into the SOCKHASH. Its storage comes first: deliver may run as
 * soon as the socket is in the SOCKHASH, and finds the flow by the storage.
 */
static __always_inline enum outcome join(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 flow,
					 __u32 side, __u64 cookie)
{
	struct sk_flow self = { .flow = flow, .side = side };
	int err;

	if (!bpf_sk_storage_get(&sk_flows, sk, &self, BPF_SK_STORAGE_GET_F_CREATE))
		return OUTCOME_NO_MEMORY;
	err = bpf_sock_hash_update(ctx, &sockets, &cookie, BPF_NOEXIST);
	if (err) {
		bpf_sk_storage_delete(&sk_flows, sk);
		return join_failure(err);
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | CALLBACKS);
	return OUTCOME_PAIRED;
}

/* Returns true if connections join only once they have earned it: see watch.h. */
static __always_inline bool joins_later(void)
{
	const struct settings *set = get_settings();

	return set && set->join_after;
}

/* Watches a socket, by one callback for each segment, of which receivers send some, too. */
static __always_inline void watch(struct bpf_sock_ops *ctx, int mark)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
					       BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | mark);
}

/* Leaves an entry for the client, before the SYN-ACK is sent. ctx->sk is NULL here. */
static __always_inline void on_syn(struct bpf_sock_ops *ctx)
{
	struct syn syn = {};
	struct client_key key;

	syn.server_netns = bpf_get_netns_cookie(ctx);
	if (!enrolled(syn.server_netns))
		return;
	if (joins_later() && !joins_early(syn.server_netns, ctx->local_port))
		return;
	remote_address(ctx, key.addr);
	complete_client_key(&key, remote_port(ctx), syn.server_netns);
	syn.written_ns = bpf_ktime_get_ns();
	syn.server_port = ctx->local_port;
	syn.blocking = blocking_listener(ctx);
	if (bpf_map_update_elem(&syns, &key, &syn, BPF_ANY))
		count(OUTCOME_SYNS_FULL, 0);
}

static __always_inline void start_direction(struct flow *flow, __u32 from, __u32 seq,
					    __u32 generation, const struct policy *policy)
{
	struct receiving *reader = &flow->side[from ^ 1].receiving;
	struct sending *dir = &flow->side[from].sending;
	const struct learned_value *known;

	dir->last_seq = seq;
	dir->drained_seq = seq;
	dir->generation = generation;
	set_verdict(dir, policy);
	dir->reason = OUTCOME_NOT_SEEN;
	dir->last_tcp_ns = flow->since_ns;
	dir->limit = LIMIT_START;
	known = find_learned(from == SIDE_SERVER ? flow->netns[SIDE_CLIENT] : 0,
			     flow->netns[SIDE_SERVER], flow->server_port);
	if (known) {
		reader->reads = known->reads;
		reader->drains = known->drains;
		dir->proved = known->proved;
		dir->bulk = known->bulk;
		if (dir->limit < known->limit)
			dir->limit = known->limit;
	}
}

/* Returns OUTCOME_PAIRED if connections between two pods to a port may be paired, or why not. */
static __always_inline enum outcome admit(const struct settings *set, __u64 client, __u64 server,
					  __u16 port, __u32 *generation, struct policy *policy)
{
	if (set->lease_ns && bpf_ktime_get_ns() > set->lease_ns)
		return OUTCOME_PAIRING_STALE;
	/* Read before the policy: if that changes in between, deliver looks it up once more. */
	*generation = *(volatile __u32 *)&set->generation;
	look_up_policy(client, server, port, policy);
	if (policy->verdict == VERDICT_REFUSE)
		return OUTCOME_POLICY_REFUSED;
	if (is_unsupported(client, server, port, allows_blocking(set, policy->blocking)))
		return OUTCOME_UNSUPPORTED_PORT;
	if (!has_share(client, set) || !has_share(server, set))
		return OUTCOME_SHARE;
	return OUTCOME_PAIRED;
}

static __always_inline enum outcome pair_client(struct bpf_sock_ops *ctx, __u64 netns,
						const struct client_key *client,
						const struct syn *syn)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct policy policy = {};
	struct pending_key key;
	struct pending value;
	enum outcome outcome;
	struct tcp_sock *tp;
	struct flow *flow;
	__u32 generation;

	if (!set || !sk)
		return OUTCOME_NO_MEMORY;
	outcome = admit(set, netns, syn->server_netns, syn->server_port, &generation, &policy);
	if (outcome != OUTCOME_PAIRED)
		return outcome;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return OUTCOME_NO_MEMORY;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return OUTCOME_MPTCP;
	if (kernel_socket(&tp->inet_conn.icsk_inet.sk))
		return OUTCOME_KERNEL_SOCKET;
	if (tp->inet_conn.icsk_ulp_ops)
		return OUTCOME_CLIENT_ULP;
	if (!allows_blocking(set, policy.blocking) && is_blocking(tp))
		return OUTCOME_BLOCKING_CLIENT;
	if (!allows_blocking(set, policy.blocking) && syn->blocking) {
		const struct learned_value *known =
			find_learned(0, syn->server_netns, syn->server_port);

		if (!known || !known->non_blocking)
			return OUTCOME_BLOCKING_SERVER;
	}

	value.flow = bpf_get_socket_cookie(ctx);
	value.written_ns = syn->written_ns;
	if (bpf_map_update_elem(&flows, &value.flow, &blank, BPF_NOEXIST))
		return OUTCOME_FLOWS_FULL;
	flow = bpf_map_lookup_elem(&flows, &value.flow);
	if (!flow)
		return OUTCOME_FLOWS_FULL;
	/* No other program sees the record before the socket joins. */
	flow->cookie[SIDE_CLIENT] = value.flow;
	flow->sock[SIDE_CLIENT] = (__u64)tp;
	flow->netns[SIDE_CLIENT] = netns;
	flow->netns[SIDE_SERVER] = syn->server_netns;
	flow->since_ns = syn->written_ns;
	__builtin_memcpy(flow->client_addr, client->addr, sizeof(flow->client_addr));
	remote_address(ctx, flow->orig_dst_addr);
	flow->client_port = client->port;
	flow->orig_dst_port = remote_port(ctx);
	flow->server_port = syn->server_port;
	flow->client_seq = ctx->snd_nxt;
	flow->server_seq = ctx->rcv_nxt;
	start_direction(flow, SIDE_CLIENT, flow->client_seq, generation, &policy);
	start_direction(flow, SIDE_SERVER, flow->server_seq, generation, &policy);
	add_share(flow, 1);
	flow->state = value.flow << FLOW_STATE_BITS | FLOW_CLIENT_JOINED;

	outcome = join(ctx, sk, value.flow, SIDE_CLIENT, value.flow);
	if (outcome != OUTCOME_PAIRED)
		goto forget;
	fill_pending_key(&key, flow->client_seq, flow->server_seq, client->addr, client->port);
	/* Connections with equal numbers cannot be told apart: the second is refused. */
	if (bpf_map_update_elem(&pending, &key, &value, BPF_NOEXIST)) {
		outcome = OUTCOME_PENDING_FULL;
		remove_socket(sk, value.flow);
		goto forget;
	}
	return OUTCOME_PAIRED;
forget:
	delete_flow(flow, value.flow);
	return outcome;
}

/* The client's handshake is done. No entry in syns: its peer is no enrolled pod of this node. */
static __always_inline void on_active(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	enum outcome outcome;
	struct client_key key;
	struct syn *syn, copy;

	if (!enrolled(netns))
		return;
	/* Its SYN has them only if another program has asked for callbacks. */
	if (ctx->bpf_sock_ops_cb_flags && has_options(sk_flow_of(ctx->sk)))
		return;
	local_address(ctx, key.addr);
	complete_client_key(&key, ctx->local_port, netns);
	syn = bpf_map_lookup_elem(&syns, &key);
	if (!syn) {
		if (joins_later())
			watch(ctx, WATCHED_CLIENT);
		return;
	}
	/* A copy, since the map may give the entry to another client at any moment. */
	copy = *(volatile struct syn *)syn;
	outcome = pair_client(ctx, netns, &key, &copy);
	if (outcome == OUTCOME_PAIRED) {
		syn->claimed = CLAIM_PAIR; /* counted when the server joins */
		return;
	}
	if (joins_later()) { /* it may be admitted, and its mode be known, later */
		watch(ctx, WATCHED_CLIENT);
		return;
	}
	if (outcome == OUTCOME_BLOCKING_SERVER)
		syn->claimed = CLAIM_WATCH;
	count(outcome, 0);
}

/* Notes if the server's pod itself has redirected the port. deliver does not read this yet. */
static __always_inline void doubt_port(struct flow *flow)
{
	struct policy policy = {};

	if (flow->orig_dst_port == flow->server_port ||
	    !same_address(flow->orig_dst_addr, flow->server_addr))
		return;
	flow->port_in_doubt = true;
	ask_policy(flow, &policy);
	set_verdict(&flow->side[SIDE_CLIENT].sending, &policy);
	set_verdict(&flow->side[SIDE_SERVER].sending, &policy);
}

static __always_inline enum outcome pair_server(struct bpf_sock_ops *ctx, __u64 netns,
						const struct client_key *client)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct pending *handshake;
	struct pending_key key;
	enum outcome outcome;
	__u64 cookie, id, state;
	struct tcp_sock *tp;
	struct flow *flow;

	if (!sk || !set)
		return OUTCOME_UNMATCHED;
	fill_pending_key(&key, ctx->rcv_nxt, ctx->snd_nxt, client->addr, client->port);
	handshake = bpf_map_lookup_elem(&pending, &key);
	if (!handshake)
		return OUTCOME_UNMATCHED;
	id = handshake->flow;
	bpf_map_delete_elem(&pending, &key);
	flow = bpf_map_lookup_elem(&flows, &id);
	state = id << FLOW_STATE_BITS | FLOW_CLIENT_JOINED;
	if (!flow || flow->state != state)
		return OUTCOME_CLIENT_CLOSED;
	/* The policy was asked for the pod and port of the client's entry in syns. */
	if (flow->netns[SIDE_SERVER] != netns || flow->server_port != ctx->local_port)
		return OUTCOME_UNMATCHED;
	/* May have become so since, perhaps by keep_mptcp_out for this very connection. */
	if (is_unsupported(flow->netns[SIDE_CLIENT], netns, flow->server_port,
			   allows_blocking(set, flow->side[SIDE_CLIENT].sending.blocking)))
		return OUTCOME_UNSUPPORTED_PORT;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return OUTCOME_NO_MEMORY;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return OUTCOME_MPTCP;
	/* Again, since the kernel skips keep_mptcp_out while it runs on this CPU already. */
	if (set->no_mptcp_listeners && kernel_socket(&tp->inet_conn.icsk_inet.sk)) {
		remember(flow, SIDE_SERVER, UNSUPPORTED_MPTCP_LISTENER);
		return OUTCOME_UNSUPPORTED_PORT;
	}
	if (owned(tp, flow))
		return OUTCOME_KERNEL_SOCKET;
	cookie = bpf_get_socket_cookie(ctx);
	flow->cookie[SIDE_SERVER] = cookie;
	flow->sock[SIDE_SERVER] = (__u64)tp;
	local_address(ctx, flow->server_addr);
	doubt_port(flow);
	outcome = join(ctx, sk, id, SIDE_SERVER, cookie);
	if (outcome != OUTCOME_PAIRED)
		return outcome;
	/* From here on deliver may redirect, unless the client's socket has closed meanwhile. */
	if (__sync_val_compare_and_swap(&flow->state, state, state | FLOW_SERVER_JOINED) != state) {
		remove_socket(sk, cookie);
		return OUTCOME_CLIENT_CLOSED;
	}
	return OUTCOME_PAIRED;
}

/* The server's handshake is done; no data of the client has been processed yet. */
static __always_inline void on_passive(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct client_key key;
	__u16 claimed = 0;
	struct syn *syn;

	if (!enrolled(netns))
		return;
	remote_address(ctx, key.addr);
	complete_client_key(&key, remote_port(ctx), netns);
	syn = bpf_map_lookup_elem(&syns, &key);
	if (syn) {
		claimed = syn->claimed;
		/* Not if a SYN from the same client port to another server has replaced the entry. */
		if (syn->server_netns == netns)
			bpf_map_delete_elem(&syns, &key);
	} else if (!joins_later()) {
		count(OUTCOME_SYN_LOST, 0);
	}
	if (claimed == CLAIM_PAIR)
		count(pair_server(ctx, netns, &key), 0);
	else if (joins_later())
		watch(ctx, 0);
	else if (claimed == CLAIM_WATCH)
		watch_mode(ctx);
}

#endif

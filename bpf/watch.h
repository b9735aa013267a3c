/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Watch: a connection stays a plain one until it has earned its place in the SOCKHASH, since
 * to get there costs as much as some ten round trips. Its sockets have callbacks meanwhile,
 * which the kernel calls under the socket's lock, and nothing else.
 *
 * 1. When the server's socket has sent and received join_after segments of data, or as many
 *    as its port asks for, it writes an offer. The key is where the two streams of the
 *    connection began: both ends know it, as find_sockets does. From join_after on, the
 *    client's socket looks for the offer, and makes the flow.
 * 2. Each end becomes a candidate, and the agent runs insert_candidates, since only an
 *    iterator may put a socket into a SOCKHASH at any time.
 * 3. At its next callback, each end notes where it is in the streams. When both have done
 *    so, the flow has joined.
 */
#ifndef PODSHUNT_WATCH_H
#define PODSHUNT_WATCH_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "joining.h"
#include "kernel.h"
#include "late.h"
#include "lifetime.h"
#include "looks.h"
#include "maps.h"
#include "neighbour.h"
#include "pairing.h"
#include "return.h"
#include "window.h"

/* Without a peer, as if that is on another node, a socket is not watched for more segments. */
#define WATCH_MAX 4096

/*
 * Servers' sockets that have earned to join, for those of their clients. track: writes, reads and
 * deletes. Full: the oldest goes, and writes its offer once more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PENDING_MAX);
	__type(key, struct numbers);
	__type(value, struct join_entry);
} offers SEC(".maps");

/* Wakes the agent when both sockets of a flow are candidates. Full: it is behind, and sees them. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 << 10); /* a page, which has up to 64 KiB on arm64 */
} requests SEC(".maps");

/* Makes a socket of a flow a candidate. The second of the two wakes the agent: one alone is no use. */
static __always_inline void become_candidate(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					     const struct tcp_sock *tp, struct flow *flow, __u64 id,
					     __u32 side, bool wake)
{
	struct candidate asks = { .flow = id, .cookie = bpf_get_socket_cookie(ctx), .side = side };
	struct sk_flow self = { .flow = id, .side = side };

	flow->sock[side & 1] = (__u64)tp;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | CALLBACKS);
	if (!bpf_sk_storage_get(&sk_flows, sk, &self, BPF_SK_STORAGE_GET_F_CREATE) ||
	    !bpf_sk_storage_get(&candidates, sk, &asks, BPF_SK_STORAGE_GET_F_CREATE)) {
		bpf_sk_storage_delete(&sk_flows, sk);
		end_unjoined(id, side);
		stop_watching(ctx);
		count(OUTCOME_NO_MEMORY, 0);
		return;
	}
	if (wake)
		bpf_ringbuf_output(&requests, &id, sizeof(id), 0);
}

/* Fills in what a socket knows of itself. */
static __always_inline void fill_offer(struct bpf_sock_ops *ctx, const struct tcp_sock *tp,
				       __u64 netns, __u32 side, struct join_entry *offer)
{
	offer->cookie[side] = bpf_get_socket_cookie(ctx);
	offer->netns[side] = netns;
	offer->blocking &= ~(1U << side);
	offer->blocking |= is_blocking(tp) << side;
}

/* A server's socket has earned to join: it writes the offer, and joins once there is a flow. */
static __always_inline void make_offer(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				       const struct tcp_sock *tp, __u64 netns,
				       const struct numbers *key, struct join_entry *offer)
{
	struct flow *flow;

	if (!offer->cookie[SIDE_SERVER]) {
		fill_offer(ctx, tp, netns, SIDE_SERVER, offer);
		local_address(ctx, offer->server_addr);
		offer->server_port = ctx->local_port;
		offer->client_seq = key->client_seq;
		offer->server_seq = key->server_seq;
		offer->watched = WATCHED;
		bpf_map_update_elem(&offers, key, offer, BPF_NOEXIST);
		return;
	}
	if (!offer->cookie[SIDE_CLIENT] || offer->step == JOIN_READY)
		return;
	bpf_map_delete_elem(&offers, key);
	flow = flow_by_id(offer->flow);
	if (flow && flow->watched && flow->cookie[SIDE_SERVER] == offer->cookie[SIDE_SERVER])
		become_candidate(ctx, sk, tp, flow, offer->flow, SIDE_SERVER, true);
}

/*
 * A client's socket has earned to join: it makes the flow if the server has offered it. While the
 * policy holds the connection, or the agent is away, both are watched until there may be a flow:
 * a policy that has not changed since is not asked again.
 */
static __always_inline void take_offer(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				       const struct tcp_sock *tp, __u64 netns,
				       const struct numbers *key, struct join_entry *offer)
{
	const struct settings *set = get_settings();
	enum outcome outcome;
	struct flow *flow;
	__u32 generation;

	if (!set || !offer->cookie[SIDE_SERVER])
		return;
	generation = *(volatile __u32 *)&set->generation;
	if (offer->step == JOIN_READY && offer->generation == generation)
		return;
	fill_offer(ctx, tp, netns, SIDE_CLIENT, offer);
	offer->flow = offer->cookie[SIDE_CLIENT];
	local_address(ctx, offer->client_addr);
	remote_address(ctx, offer->orig_dst_addr);
	offer->client_port = ctx->local_port;
	offer->orig_dst_port = remote_port(ctx);
	if (flow_by_id(offer->flow))
		return; /* it joins by late.h */
	outcome = make_flow(offer);
	flow = flow_by_id(offer->flow);
	if (outcome == OUTCOME_PAIRED && flow) {
		/* In this order: what the server wakes is to find both. */
		become_candidate(ctx, sk, tp, flow, offer->flow, SIDE_CLIENT, false);
		offer->step = JOIN_START;
		bpf_map_update_elem(&offers, key, offer, BPF_EXIST);
	} else if (outcome == OUTCOME_MAX || outcome == OUTCOME_PAIRING_STALE) {
		generation -= outcome == OUTCOME_PAIRING_STALE; /* to ask again */
		if (offer->step == JOIN_READY && offer->generation == generation)
			return;
		offer->step = JOIN_READY;
		offer->generation = generation;
		bpf_map_update_elem(&offers, key, offer, BPF_EXIST);
	} else if (!flow) {
		offer->step = JOIN_LEAVE;
		bpf_map_update_elem(&offers, key, offer, BPF_EXIST);
		stop_watching(ctx);
		count(outcome, 0);
		if (outcome == OUTCOME_BLOCKING_SERVER)
			remember_port(0, offer->netns[SIDE_SERVER], offer->server_port,
				      UNSUPPORTED_BLOCKING);
	}
}

/*
 * A socket has earned to join. The map may give an entry to another connection at any moment,
 * so this copies it, and uses the copy only if the entry is still the same one afterwards.
 */
static __always_inline void on_earned(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				      const struct tcp_sock *tp, __u64 netns, bool last)
{
	__u32 side = ctx->bpf_sock_ops_cb_flags & WATCHED_CLIENT ? SIDE_CLIENT : SIDE_SERVER;
	__u32 sends = sends_from(tp), receives = receives_from(tp);
	struct join_entry offer = {}, *there;
	struct numbers key;

	key.client_seq = side == SIDE_CLIENT ? sends + 1 : receives;
	key.server_seq = side == SIDE_CLIENT ? receives : sends;
	there = bpf_map_lookup_elem(&offers, &key);
	if (there) {
		offer = *(volatile struct join_entry *)there;
		if (bpf_map_lookup_elem(&offers, &key) != there ||
		    there->cookie[SIDE_SERVER] != offer.cookie[SIDE_SERVER])
			return; /* the next time */
	}
	/* Connections with equal numbers cannot be told apart. */
	if (offer.step == JOIN_LEAVE ||
	    (offer.cookie[side & 1] && offer.cookie[side & 1] != bpf_get_socket_cookie(ctx))) {
		stop_watching(ctx);
	} else if (last && !offer.cookie[(side ^ 1) & 1]) {
		bpf_map_delete_elem(&offers, &key);
		stop_watching(ctx);
		count(OUTCOME_NO_PEER, 0);
	} else if (side == SIDE_CLIENT) {
		take_offer(ctx, sk, tp, netns, &key, &offer);
	} else {
		make_offer(ctx, sk, tp, netns, &key, &offer);
	}
}

/* A callback of a socket that has no flow, and looks. */
static __always_inline void on_watched(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				       const struct tcp_sock *tp)
{
	__u32 segments = data_segments(tp);
	const struct settings *set = get_settings();
	__u64 netns = bpf_get_netns_cookie(ctx);

	/* In a pod that takes no part, the callbacks are another program's. */
	if (!set || !set->join_after || !enrolled(netns) || !tp->inet_conn.icsk_inet.sk.sk_socket)
		return;
	if (!may_join(tp)) {
		stop_watching(ctx);
		return;
	}
	if (segments_behind(set, segments) >= WATCH_EAGER) {
		/* Who sends bytes is called back for acknowledgements, too: once for a message. */
		if (ctx->op == BPF_SOCK_OPS_RTT_CB)
			stop_callbacks(ctx, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		else if (!(ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_RTT_CB_FLAG))
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | WATCHING);
	}
	if (ctx->bpf_sock_ops_cb_flags & WATCHED_CLIENT ||
	    segments >= joins_after(set, find_learned(0, netns, ctx->local_port)))
		on_earned(ctx, sk, tp, netns, segments - set->join_after >= WATCH_MAX);
}

/*
 * Undoes become_candidate, as the flow is gone, which nothing was redirected for. It does so before
 * a segment: if another program writes options into that one, on_tcp_options runs next.
 */
static __always_inline void leave_unjoined(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	if (ctx->op == BPF_SOCK_OPS_RTT_CB || !bpf_sk_storage_get(&candidates, sk, NULL, 0))
		return;
	remove_socket(sk, bpf_get_socket_cookie(ctx));
	stop_watching(ctx);
}

/*
 * Notes if a socket joins, or ends, long after the connection has earned it: what remains of such
 * a connection does not show how long others live after they have joined.
 */
static __always_inline void note_late(struct flow *flow, const struct tcp_sock *tp)
{
	const struct settings *set = get_settings();

	if (set &&
	    data_segments(tp) >= 2 * joins_after(set, find_learned(0, flow->netns[SIDE_SERVER],
								   flow->server_port)))
		flow->watched = WATCHED_LATE;
}

/* A callback of a socket of a flow that is joining. */
static __always_inline void on_candidate(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					 const struct tcp_sock *tp, struct flow *flow,
					 const struct sk_flow *self)
{
	const struct candidate *asks = bpf_sk_storage_get(&candidates, sk, NULL, 0);
	__u64 both = self->flow << FLOW_STATE_BITS | FLOW_READY;
	__u32 side = self->side & 1, again;
	__u64 ready = side == SIDE_CLIENT ? FLOW_CLIENT_READY : FLOW_SERVER_READY;

	if (!asks) {
		/* It joins again, and so does its peer, before it or after it. */
		if (!(flow->state & ready))
			become_candidate(ctx, sk, tp, flow, self->flow, side, true);
		return;
	}
	if (!may_join(tp)) {
		note_late(flow, tp);
		note_life(flow, sk, tp);
		end_unjoined(self->flow, side);
		leave_unjoined(ctx, sk);
		count(OUTCOME_JOIN_ENDED, 0);
		return;
	}
	/* Those of blocking sockets sleep most of the time: see await_reads. */
	if (asks->step != JOIN_INSERTED || (!is_blocking(tp) && has_sleeper(tp)))
		return;
	bpf_sk_storage_delete(&candidates, sk);
	note_late(flow, tp);
	again = flow->side[side].receiving.returns;
	flow->side[side].receiving.returns = 0;
	note_positions(tp, flow, side);
	await_reads(flow, side);
	__sync_fetch_and_or(&flow->state, ready);
	if (__sync_val_compare_and_swap(&flow->state, both, both | FLOW_JOINED) == both)
		count(again ? OUTCOME_RETURNED : OUTCOME_PAIRED, 0);
}

/* The peer has acknowledged bytes (RTT_CB), or the socket is about to send a segment. */
static __always_inline void on_traffic(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	bool may_have_flow = ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG;
	struct sk_flow *self;
	struct tcp_sock *tp;
	struct flow *flow;

	if (!sk || (!may_have_flow && !looks(ctx, sk)))
		return;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return;
	if (!self) {
		if (!may_have_flow || looks(ctx, sk))
			on_watched(ctx, sk, tp);
		return;
	}
	if (!self->flow) {
		if (ctx->op == BPF_SOCK_OPS_RTT_CB && !self->skip)
			learn_mode(ctx, sk);
		return;
	}
	if (self->skip) {
		self->skip--;
		return;
	}
	flow = flow_of(self, sk);
	if (!flow) {
		leave_unjoined(ctx, sk);
		return;
	}
	if (flow->watched && !(flow->state & FLOW_SERVER_JOINED)) {
		on_candidate(ctx, sk, tp, flow, self);
		return;
	}
	if (ctx->op == BPF_SOCK_OPS_RTT_CB)
		on_ack(flow, self->side & 1, tp);
	else
		on_transmit(ctx, flow, self->side & 1, tp);
	may_return(ctx, tp, flow, self);
}

/*
 * Puts candidates into the SOCKHASH. The kernel holds only RCU here, and may give the memory
 * of a socket to another one at any moment. That has another cookie, which is asked for before
 * and after.
 */
SEC("iter/bpf_sk_storage_map")
int insert_candidates(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct candidate *asks = ctx->value;
	struct sock *sk = ctx->sk;
	struct flow *flow;
	__u64 cookie;
	int err;

	if (!sk || !asks || asks->step != JOIN_START)
		return 0;
	cookie = asks->cookie;
	flow = flow_by_id(asks->flow);
	if (!flow || flow->state & (FLOW_CLIENT_GONE | FLOW_SERVER_GONE) ||
	    bpf_get_socket_cookie(sk) != cookie)
		return 0;
	err = bpf_map_update_elem(&sockets, &cookie, sk, BPF_NOEXIST);
	if (bpf_get_socket_cookie(sk) != cookie) {
		if (!err)
			bpf_map_delete_elem(&sockets, &cookie);
		return 0;
	}
	if (!err || err == -EEXIST) { /* an agent that was killed may have put it there */
		asks->step = JOIN_INSERTED;
		return 0;
	}
	asks->step = JOIN_LEAVE;
	count(err == -EOPNOTSUPP ? OUTCOME_JOIN_ENDED : join_failure(err), 0);
	end_unjoined(asks->flow, asks->side);
	return 0;
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Neighbour: a socket has one set of callbacks for all sock_ops programs of the node, of which
 * podshunt takes away only what nobody else is seen to use. Sockets of pods that take no part are
 * never changed.
 */
#ifndef PODSHUNT_NEIGHBOUR_H
#define PODSHUNT_NEIGHBOUR_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "lifetime.h"
#include "maps.h"
#include "unsupported.h"

/* The callbacks of a watched socket (watch.h) at most, and of one in the SOCKHASH. */
#define WATCHING (BPF_SOCK_OPS_RTT_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)
#define CALLBACKS (BPF_SOCK_OPS_STATE_CB_FLAG | WATCHING)

/*
 * Marks the socket that has connected. The kernel calls back for TCP options that it does not
 * know (bpf_skops_parse_hdr), which only those send who have a program for them.
 */
#define WATCHED_CLIENT BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG

/* A callback for each segment is dear to those who send many small ones. */
static __always_inline void stop_callbacks(struct bpf_sock_ops *ctx, __u32 flags)
{
	if (ctx->bpf_sock_ops_cb_flags & flags)
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~flags);
}

/* As stop_callbacks, for a socket whose flow has joined: another program may write its TCP options. */
static __always_inline void stop_flow_callbacks(struct bpf_sock_ops *ctx, const struct flow *flow,
						__u32 own, __u32 flags)
{
	if (flow->unsupported[own & 1] & UNSUPPORTED_TCP_OPTIONS)
		flags &= ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
	stop_callbacks(ctx, flags);
}

/* STATE_CB stays: it comes a few times for each connection, and another program may ask for it. */
static __always_inline void stop_watching(struct bpf_sock_ops *ctx)
{
	stop_callbacks(ctx, WATCHING | WATCHED_CLIENT);
}

/*
 * A listener gives its callbacks to what it accepts. One that was a watched client before must
 * not give its mark; in one that has never connected, and has no sequence numbers yet, it is
 * another program's.
 */
static __always_inline void drop_mark(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;

	if (!sk || !(ctx->bpf_sock_ops_cb_flags & WATCHED_CLIENT) ||
	    !enrolled(bpf_get_netns_cookie(ctx)))
		return;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (tp && tp->write_seq)
		stop_callbacks(ctx, WATCHED_CLIENT);
}

/* Returns true for the storage of a socket that is kept on TCP by keep_options. */
static __always_inline bool has_options(const struct sk_flow *self)
{
	return self && !self->flow && self->skip;
}

/* A socket that has no flow, or is joining one, gets none from here on. Its callbacks stay. */
static __always_inline void keep_options(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					 const struct sk_flow *self)
{
	struct sk_flow alone = { .skip = ~0U };

	if (self) {
		if (self->flow)
			end_unjoined(self->flow, self->side);
		remove_socket(sk, bpf_get_socket_cookie(ctx));
	}
	bpf_sk_storage_get(&sk_flows, sk, &alone, BPF_SK_STORAGE_GET_F_CREATE);
}

/*
 * Another program of the node writes TCP options into a segment of the socket, or reads some, for
 * which podshunt alone never asks. Messages by the shortcut have no options, so the direction that
 * has them stays on TCP. Also, on_traffic may have taken the callback away for this segment.
 */
static __always_inline void on_tcp_options(struct bpf_sock_ops *ctx, bool writes)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct bpf_sock *sk = ctx->sk;
	struct sk_flow *self;
	struct flow *flow;

	if (!sk || !enrolled(netns))
		return;
	if (writes)
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (has_options(self))
		return;
	if (self && self->flow) {
		flow = flow_of(self, sk);
		if (!flow)
			return; /* its redirected bytes may be unread */
		/* Once it is ready, its peer may redirect to it at any moment: see on_candidate. */
		if (!bpf_sk_storage_get(&candidates, sk, NULL, 0)) {
			if (writes)
				mark_unsupported(flow, self->side ^ 1, self->side,
						 UNSUPPORTED_TCP_OPTIONS);
			return;
		}
	}
	if (writes && !(ctx->bpf_sock_ops_cb_flags & WATCHED_CLIENT))
		remember_port(0, netns, ctx->local_port, UNSUPPORTED_TCP_OPTIONS);
	keep_options(ctx, sk, self);
}

#endif

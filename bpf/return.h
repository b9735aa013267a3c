/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Return: a flow that has left (leave.h) joins again, as a watched connection does (watch.h). */
#ifndef PODSHUNT_RETURN_H
#define PODSHUNT_RETURN_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "deliver.h"
#include "find.h"
#include "flow.h"
#include "leave.h"
#include "lifetime.h"
#include "maps.h"
#include "neighbour.h"
#include "pairing.h"
#include "window.h"

#define RETURNS_NOW 1

/* A flow stays away for so long, in ns, after it was not worthwhile. */
#define AWAY_LEAST 1000000000ULL

/*
 * A socket that has left looks at one callback in so many and one, as long as it may not return,
 * and its reads are not counted: they are counted anew once it has joined again.
 */
#define SKIP 15

/* Returns true if deliver gave a message to TCP lately, as it does when a flow leaves. */
static __always_inline bool left_lately(const struct flow *flow)
{
	__u64 now = bpf_ktime_get_coarse_ns();

	return now - flow->side[SIDE_CLIENT].sending.last_tcp_ns < AWAY_LEAST ||
	       now - flow->side[SIDE_SERVER].sending.last_tcp_ns < AWAY_LEAST;
}

/*
 * Lets a flow join again that has left: at once, when it was not allowed and is again; else after
 * as many segments once more as it has exchanged when it left, and not within a second. For
 * example, one that leaves after 3,000 segments returns at 6,000, and if it leaves again soon, at
 * some 12,000. A fast stream has exchanged as many within milliseconds. Both ends have to agree:
 * one that has no callbacks any more could not join.
 */
static __always_inline void may_return(struct bpf_sock_ops *ctx, const struct tcp_sock *tp,
				       struct flow *flow, struct sk_flow *self)
{
	__u32 own = self->side & 1;
	struct receiving *mine = &flow->side[own].receiving;
	__u32 segments = data_segments(tp);
	__u64 low = self->flow << FLOW_STATE_BITS, state = flow->state;
	const struct settings *set = get_settings();
	bool allowed;

	if ((state & ~(__u64)FLOW_READY) != (low | FLOW_LEFT) || !set || !has_left(flow))
		return;
	if (mine->window)
		return; /* on_transmit restores it */
	if (!set->join_after) { /* never */
		stop_flow_callbacks(ctx, flow, own, WATCHING);
		self->skip = ~0U;
		return;
	}
	if (ctx->op == BPF_SOCK_OPS_RTT_CB)
		/* As in on_watched. */
		stop_flow_callbacks(ctx, flow, own, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	self->skip = SKIP;
	refresh_verdict(flow, own, set);
	allowed = flow->side[own].sending.verdict == VERDICT_ALLOW && may_join(tp);
	if (left_refused(flow))
		mine->returns = 0;
	else if (!mine->returns)
		mine->returns = segments < 1U << 30 ? 2 * segments + 1 : ~0U;
	if (segments < mine->returns || !allowed || (mine->returns && left_lately(flow)))
		return;
	mine->returns = RETURNS_NOW;
	self->skip = 0;
	if (flow->side[own ^ 1].receiving.returns != RETURNS_NOW)
		return;
	flow->watched = WATCHED;
	if (__sync_val_compare_and_swap(&flow->state, state, low) != state)
		return;
	for (__u32 side = SIDE_CLIENT; side < SIDE_MAX; side++) {
		flow->side[side].sending.leaves = 0;
		flow->side[side].compare.slower = false;
		flow->side[side].compare.rest = 0;
	}
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Looks: at which of its callbacks a watched socket looks for its peer (watch.h). */
#ifndef PODSHUNT_LOOKS_H
#define PODSHUNT_LOOKS_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "kernel.h"
#include "maps.h"

/*
 * Behind join_after, and behind twice, four times, ... as many segments, all callbacks look for
 * the peer for so many segments, then one in 16. At these the server's port may let it join. All
 * look if segments are full.
 */
#define WATCH_EAGER 16

/* Returns how many segments a socket is behind join_after, or the last double of it. */
static __always_inline __u32 segments_behind(const struct settings *set, __u32 segments)
{
	__u32 after = set->join_after;

	for (__u32 i = 0; i < 16 && after <= segments / 2; i++)
		after *= 2;
	return segments - after;
}

/* In a stream of large segments, a callback may stand for hundreds, beside which a look is cheap. */
static __always_inline bool is_bulk(const struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				    __u32 segments)
{
	const struct tcp_sock *tp;

	if (2 * (ctx->bytes_acked + ctx->bytes_received) < (__u64)segments * ctx->mss_cache)
		return false;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	return tp && (tp->data_segs_out < tp->data_segs_in / 16 ||
		      tp->write_seq - tp->snd_una > tp->mss_cache);
}

/* Returns true if a watched socket looks for its peer now: the sooner it does not, the less it costs. */
static __always_inline bool looks(const struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	__u32 segments = ctx->data_segs_in + ctx->data_segs_out;
	const struct settings *set = get_settings();

	if (!set || segments < set->join_after)
		return false;
	return !set->join_after || segments_behind(set, segments) < WATCH_EAGER ||
	       !(bpf_get_prandom_u32() & 15) || is_bulk(ctx, sk, segments);
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Window: keeps the TCP window of a receiver small while bytes are redirected to it.
 * Its receive buffer holds redirected bytes, too, and has_room leaves room there for all
 * that the sender may still send by TCP, so a large window leaves little for the shortcut.
 * For example, of a buffer of 6 MiB a window of 4 MiB leaves less than 2 MiB.
 */
#ifndef PODSHUNT_WINDOW_H
#define PODSHUNT_WINDOW_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/tcp.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"
#include "leave.h"
#include "lifetime.h"
#include "limits.h"
#include "maps.h"
#include "neighbour.h"

#define SOL_TCP 6

/* The window that a TCP connection starts with, at the kernel's own tcp_rmem. */
#define WINDOW_SMALL (64 << 10)

/*
 * A direction that has sent so many bytes by TCP since its last redirect, or since its
 * start, does not use the shortcut. It is more than a sender and a window hold: else a
 * sender whose send buffer has grown would raise the window at each spill. If a message
 * goes by TCP just because the receiver has no room, it starts anew: a window that has
 * opened meanwhile, as in a pause, leaves none as long as it is open.
 */
#define WINDOW_PATIENCE (16 << 20)

/* Returns true if bytes are redirected to the receiver, or may soon be. */
static __always_inline bool redirects(const struct flow *flow, const struct sending *toward,
				      const struct receiving *reader)
{
	__u64 since = toward->redirect_end > reader->began ? toward->redirect_end : reader->began;
	const struct settings *set = get_settings();

	return set && set->redirect && !set->untraced && !(flow->state & FLOW_ANY_EVICTING) &&
	       toward->verdict == VERDICT_ALLOW && !(reader->state & READ_UNSUPPORTED) &&
	       (toward->shortcut || toward->reason != OUTCOME_EDGE) &&
	       sent(toward) - since < WINDOW_PATIENCE;
}

static __always_inline bool returns(void)
{
	const struct settings *set = get_settings();

	return set && set->join_after;
}

/*
 * Returns the limit of the window for a receiver to which no more is redirected. For redirected
 * bytes the kernel may have raised sk_rcvbuf alone (tcp_clamp_window), and once that is at its
 * highest, it raises the limit no more (tcp_rcv_space_adjust), so the former one may be far too
 * low. A limit above what sk_rcvbuf has room for is none. A program's own limit is lifted, too,
 * as the kernel does when it raises sk_rcvbuf, unless the program has fixed that.
 */
static __always_inline int window_again(const struct tcp_sock *tp, const struct receiving *reader)
{
	int former = reader->window, room = tp->inet_conn.icsk_inet.sk.sk_rcvbuf;

	if (BPF_CORE_READ_BITFIELD(&tp->inet_conn.icsk_inet.sk, sk_userlocks) & SOCK_RCVBUF_LOCK)
		return former;
	return former < room ? room : former;
}

/*
 * Runs before a socket of a flow sends a TCP segment, such as an acknowledgement, which
 * tells the peer the window (tcp_established_options). The kernel raises the limit of the
 * window whenever it raises sk_rcvbuf (tcp_rcv_space_adjust), so this looks each time.
 */
static __always_inline void on_transmit(struct bpf_sock_ops *ctx, struct flow *flow, __u32 own,
					const struct tcp_sock *tp)
{
	struct receiving *reader = &flow->side[own].receiving;
	int clamp = tp->window_clamp;

	if (redirects(flow, &flow->side[own ^ 1].sending, reader)) {
		if (clamp <= WINDOW_SMALL)
			return;
		reader->window = clamp;
		clamp = WINDOW_SMALL;
	} else {
		/* An evicted socket stays on TCP, unless it may return. */
		if (flow->state & FLOW_ANY_EVICTING && !(has_left(flow) && returns()))
			stop_flow_callbacks(ctx, flow, own, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		if (!reader->window)
			return;
		if (clamp == WINDOW_SMALL) /* else the kernel or the program has raised it */
			clamp = window_again(tp, reader);
		reader->window = 0;
	}
	bpf_setsockopt(ctx, SOL_TCP, TCP_WINDOW_CLAMP, &clamp, sizeof(clamp));
}

#endif

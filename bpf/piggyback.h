/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Piggyback: messages that go by TCP only to carry its acknowledgement. */
#ifndef PODSHUNT_PIGGYBACK_H
#define PODSHUNT_PIGGYBACK_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>

#include "compare.h"
#include "flow.h"
#include "kernel.h"
#include "outcome.h"

/*
 * Returns true if the next message of a sender may go by TCP again, by the reason of its last one,
 * although the receiver reads each.
 */
static __always_inline bool goes_on(enum outcome reason)
{
	switch (reason) {
	case OUTCOME_SHORTCUT: /* it has sent nothing since it joined */
	case OUTCOME_PEER_MISSING:
	case OUTCOME_NOT_SEEN:
	case OUTCOME_TRIAL:
	case OUTCOME_UNOBSERVED:
	case OUTCOME_MEMORY:
		return true;
	default:
		return lasts(reason);
	}
}

/*
 * Returns true if the message is to go by TCP to carry the acknowledgement of what the peer has
 * sent that way, if its next message may, too. On the shortcut there is none, so a peer with
 * Nagle's algorithm would keep a small one until the timer of delayed acknowledgements ends, after
 * 40 ms. For example, a client whose requests are on trial, or that has sent nothing since it
 * joined, while the answers take the shortcut; or one of nginx, which receives by TCP for good
 * (edge_triggered).
 */
static __always_inline bool carries_ack(const struct flow *flow, __u32 own,
					const struct tcp_sock *tp)
{
	__u32 peer = (own ^ 1) & 1;
	struct tcp_sock *there = (struct tcp_sock *)flow->sock[peer];
	const struct sending *back = &flow->side[peer].sending;

	if (tp->rcv_nxt == tp->rcv_wup || back->shortcut || !goes_on(back->reason))
		return false;
	return !(BPF_CORE_READ_BITFIELD_PROBED(there, nonagle) & TCP_NAGLE_OFF);
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Leave: a flow goes back to plain TCP when the shortcut is no faster for what it sends, or not
 * allowed. Then both sockets are evicted, since to be in the SOCKHASH alone costs some time for
 * each message.
 */
#ifndef PODSHUNT_LEAVE_H
#define PODSHUNT_LEAVE_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "blocking.h"
#include "compare.h"
#include "flow.h"
#include "kernel.h"
#include "learned.h"
#include "limits.h"

/* A message up to here counts as small: in a stream of such messages, TCP joins many. */
#define MESSAGE_SMALL 256

/* In a stream with both ends on one CPU, messages from here on are no faster: its cache is too small. */
#define MESSAGE_HUGE (256 << 10)

/* A trial with messages up to here takes so many of them that these count. */
#define TRIAL_SMALL 512

/*
 * With so many pages, sendfile is faster by TCP, which sends the pages of the file, where the
 * shortcut copies them. Before Linux 6.5 each page is a message.
 */
#define SENDFILE_PAGES 4
#define PAGE_LEAST 4096

/* How many messages of a direction are weighed at a time. */
#define LEAVE_WINDOW 2048

/*
 * So many of a flow in which neither direction can use the shortcut. They show more than enough: a
 * receiver that waits for edges is free after a few reads (edge_triggered), if it ever is.
 */
#define LEAVE_STUCK 128

/* Returns true if the flow has left, or is about to. */
static __always_inline bool has_left(const struct flow *flow)
{
	return flow->side[SIDE_CLIENT].sending.leaves || flow->side[SIDE_SERVER].sending.leaves;
}

/* Returns true if a flow has left only because the policy does not allow the shortcut. */
static __always_inline bool left_refused(const struct flow *flow)
{
	return flow->side[SIDE_CLIENT].sending.leaves != OUTCOME_NO_GAIN &&
	       flow->side[SIDE_SERVER].sending.leaves != OUTCOME_NO_GAIN;
}

/*
 * Returns true if a flow whose message was not allowed is to leave from now on. It stays if it
 * could not return once it is allowed again, for which it needs callbacks: see may_return.
 */
static __always_inline bool leaves_refused(const struct flow *flow, struct sending *dir,
					   const struct settings *set)
{
	if (dir->leaves || !set->join_after || (set->no_callbacks && !flow->watched))
		return false;
	dir->leaves = OUTCOME_NOT_ALLOWED;
	return true;
}

/*
 * Returns how many pages sendfile has at hand, or 0 if the message is of another call: they
 * are in the thread's own pipe, which only that uses (splice_direct_to_actor).
 */
static __always_inline __u16 sendfile_pages(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pipe_inode_info *pipe = task->splice_pipe;

	if (!pipe)
		return 0;
	return BPF_CORE_READ_BITFIELD_PROBED(pipe, head) -
	       BPF_CORE_READ_BITFIELD_PROBED(pipe, tail);
}

/*
 * Weighs a message, and returns true if the flow is to leave from now on: when it was found
 * to be slower (compare.h), or when leave_ratio times as many messages do not pay as do. A
 * message pays if it took the shortcut, unless it is a small one that TCP would join with others
 * that are unread. It does not pay if it had to go by TCP for what earlier ones were, for what the
 * receiver does, or for the trial. What goes by TCP for another reason, such as the policy, says
 * nothing. A large message of sendfile counts as many, by its size, and more on trial: the window
 * is kept small then (window.h), so that a file takes longer. Large ones of two streams at once do
 * not pay, as their redirects often wait for the receiver's lock.
 * The port learns of the first result of a flow, and of its leaving.
 */
static __always_inline bool weigh(struct flow *flow, __u32 own, const struct settings *set,
				  const struct tcp_sock *tp, __u32 size, enum outcome outcome,
				  __u32 held)
{
	struct receiving *mine = &flow->side[own & 1].receiving;
	const struct receiving *other = &flow->side[(own ^ 1) & 1].receiving;
	struct sending *dir = &flow->side[own & 1].sending;
	const struct sending *back = &flow->side[(own ^ 1) & 1].sending;
	bool slower = flow->side[own & 1].compare.slower, leaves, stuck;
	__u32 weight = size > MESSAGE_LARGE ? size / MESSAGE_LARGE : 1;
	bool joins = tcp_joins(tp, size);
	__u32 paid, unpaid, heard;

	if (dir->verdict != VERDICT_ALLOW || dir->leaves || !set->leave_ratio)
		return false;
	if (size >= PAGE_LEAST && sendfile_pages() >= SENDFILE_PAGES)
		mine->unpaid += size >> (outcome == OUTCOME_SHORTCUT ? 10 : 7);
	else if (lasts(outcome) || outcome == OUTCOME_DRAINING || outcome == OUTCOME_UNOBSERVED ||
		 outcome == OUTCOME_PIGGYBACK)
		mine->unpaid += weight;
	else if (outcome == OUTCOME_TRIAL || outcome == OUTCOME_NOT_SEEN)
		mine->unpaid += size <= TRIAL_SMALL && (joins || two_way(flow, own));
	else if (outcome != OUTCOME_SHORTCUT)
		return false;
	else if (size <= MESSAGE_SMALL && held > size + MESSAGE_COST && joins)
		mine->unpaid++;
	else if (in_stream(flow, own) && ((size >= MESSAGE_LARGE && both_stream(flow, own)) ||
					  (size >= MESSAGE_HUGE && on_one_cpu(flow, own))))
		mine->unpaid += weight;
	else
		mine->paid += weight;
	paid = mine->paid;
	unpaid = mine->unpaid;
	stuck = !paid && lasts(outcome) && !back->shortcut && lasts(back->reason);
	if (paid + unpaid < (stuck ? LEAVE_STUCK : LEAVE_WINDOW) && !slower)
		return false;
	heard = sent(back);
	/* What a peer has sent once that is silent now does not count, nor do its few bytes. */
	if (heard != mine->heard && two_way(flow, own)) {
		paid += other->paid;
		unpaid += other->unpaid;
	}
	leaves = slower || unpaid > set->leave_ratio * paid;
	mine->heard = heard;
	mine->paid /= 2;
	mine->unpaid /= 2;
	dir->leaves = leaves ? OUTCOME_NO_GAIN : 0;
	if (leaves) {
		note_no_gain(flow);
	} else if (paid > unpaid && set->join_after && !(dir->flags & SENDING_PAYS)) {
		dir->flags |= SENDING_PAYS;
		note_pays(flow, set, allows_blocking(set, dir->blocking));
	}
	return leaves;
}

#endif

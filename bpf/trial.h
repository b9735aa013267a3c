/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Trial: nothing is redirected to a receiver before it has shown, by TCP, that it
 * reads such messages by recv, and until nothing is left if it waits for edges.
 */
#ifndef PODSHUNT_TRIAL_H
#define PODSHUNT_TRIAL_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"
#include "learned.h"

/* A burst up to here counts as small. HAProxy splices from 4 KiB on. */
#define BURST_SMALL 4096

/* What has been proved for a burst of this size is proved for all. */
#define BURST_WHOLE (64 << 10)

#define EPOLLET (1U << 31) /* include/uapi/linux/eventpoll.h */

/* How many waiters of a socket are looked at; with more, it counts as edge-triggered. */
#define WAITERS_MAX 4

/*
 * Returns true if the message has to go by TCP for the trial. Hazard: a program that has only used
 * recv so far may use splice or FIONREAD next, and nothing can help it while redirected bytes are
 * unread. For example, HAProxy splices the first body that is large enough, and nginx calls
 * FIONREAD after a recv that filled its buffer. Rule: a burst that is larger than all that the
 * receiver has taken by recv goes by TCP, where such calls work and are seen. A burst is all that
 * is sent until the receiver answers: ten messages in a row look like a large one to the reader.
 */
static __always_inline bool on_trial(struct sending *dir, const struct receiving *answers,
				     const struct receiving *reader, const struct settings *set,
				     __s64 unread, __u32 size)
{
	__u32 done = unread < dir->burst ? dir->burst - (__u32)(unread > 0 ? unread : 0) : 0;

	if (reader->reads >= set->trial_reads &&
	    (!set->trial_bytes || (dir->bulk >= set->trial_bytes && dir->proved >= BURST_WHOLE)))
		return false;
	if (done > dir->proved) {
		dir->proved = done;
		dir->flags &= ~SENDING_LEARNED;
	}
	if ((__u32)answers->read_bytes != dir->answered || done >= BURST_WHOLE) {
		dir->answered = answers->read_bytes;
		if (done > BURST_SMALL && dir->bulk < set->trial_bytes) {
			dir->bulk += done;
			dir->flags &= ~SENDING_LEARNED;
		}
		dir->burst -= done;
	}
	dir->burst += size;
	if (reader->reads < set->trial_reads)
		return true;
	if (!set->trial_bytes)
		return false;
	return dir->burst > dir->proved ||
	       (dir->burst > BURST_SMALL && dir->bulk < set->trial_bytes);
}

/*
 * Returns true if somebody waits for edges (EPOLLET) of the peer's socket, or
 * may. Hazard: TCP bytes that arrive behind unread redirected ones, as after
 * a spill, make one edge with them, but the next recv returns the redirected
 * bytes alone. A program that takes a recv that was not filled for the last
 * one, as epoll(7) allows, then waits for the next edge for ever: nginx,
 * tokio, netty's own epoll. Programs that call recv until it finds nothing
 * (Go, envoy), or wait for levels, always get to the TCP bytes.
 */
static __always_inline bool edge_triggered(const struct flow *flow, __u32 peer)
{
	struct sock *sk = (struct sock *)flow->sock[peer];
	struct list_head *head, *next;
	struct socket_wq *wq;

	if (bpf_core_read(&wq, sizeof(wq), &sk->sk_wq))
		return true;
	head = &wq->wait.head;
	if (bpf_core_read(&next, sizeof(next), &head->next))
		return true;
	for (int i = 0; i < WAITERS_MAX; i++) {
		struct wait_queue_entry *entry;
		struct eppoll_entry *waiter;
		struct epitem *item;
		void *private;
		__u32 events;

		if (next == head)
			return false;
		entry = (void *)next - bpf_core_field_offset(struct wait_queue_entry, entry);
		/* private is set for a thread that sleeps in recv or poll, and NULL for epoll. */
		if (bpf_core_read(&private, sizeof(private), &entry->private))
			return true;
		waiter = (void *)entry - bpf_core_field_offset(struct eppoll_entry, wait);
		if (!private && (bpf_core_read(&item, sizeof(item), &waiter->base) ||
				 bpf_core_read(&events, sizeof(events), &item->event.events) ||
				 events & EPOLLET))
			return true;
		if (bpf_core_read(&next, sizeof(next), &next->next))
			return true;
	}
	return true;
}

/* Notes for the port what the receiver has proved, to shorten the trial of later connections. */
static __always_inline void learn(const struct flow *flow, __u32 own, const struct settings *set)
{
	const struct sending *dir = &flow->side[own & 1].sending;
	__u32 reads = flow->side[(own ^ 1) & 1].receiving.reads;
	__u32 drains = flow->side[(own ^ 1) & 1].receiving.drains;
	struct learned_value *known;

	known = get_learned(own == SIDE_SERVER ? flow->netns[SIDE_CLIENT] : 0,
			    flow->netns[SIDE_SERVER], flow->server_port, set->learned_share);
	if (!known)
		return;
	if (known->reads < reads)
		known->reads = reads;
	if (known->proved < dir->proved)
		known->proved = dir->proved;
	if (known->bulk < dir->bulk)
		known->bulk = dir->bulk;
	if (known->drains < drains)
		known->drains = drains;
	if (known->limit < dir->limit)
		known->limit = dir->limit;
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Limits: how much a receiver may leave unread. Each direction has a limit, which grows
 * up to the budget. All receivers of a pod together have the pod's budget. A message
 * that does not fit spills: it goes by TCP, whose window then stops the sender.
 */
#ifndef PODSHUNT_LIMITS_H
#define PODSHUNT_LIMITS_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"
#include "maps.h"

#define SOCK_RCVBUF_LOCK 2

/* Kernel memory of a redirected message beside its data: struct sk_msg, a slab object. */
#define MESSAGE_COST 1024

/* The first limit of a direction: TCP's receive buffer starts with as much (tcp_rmem). */
#define LIMIT_START (128 << 10)

/*
 * Returns true if a redirect might not be granted its memory: it would fail
 * with ENOMEM (bpf_tcp_ingress), where TCP waits. Below the second value of
 * tcp_mem it is always granted (__sk_mem_raise_allocated). The test is for the
 * first value, which leaves room for messages that are sent at the same moment.
 */
static __always_inline bool memory_pressure(const struct tcp_sock *tp)
{
	const struct proto *prot = tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot;
	long low;

	return bpf_core_read(&low, sizeof(low), prot->sysctl_mem) ||
	       prot->memory_allocated->counter > low;
}

/* measure_cost measures once so many bytes of TCP are unread. */
#define COST_MEASURED (256 << 10)
/* The unit of the cost; the cost until it is measured; and the lowest that counts. */
#define COST_UNIT 32
#define COST_UNKNOWN 40
#define COST_LEAST 33

/*
 * Measures how much of the receive buffer a byte of TCP takes, the kernel's own data
 * included. The kernel estimates this once, from the first segments, and too high: a large
 * stream whose window is open would never leave room for a redirect. For example, the first
 * 14 KB take 16 KB, but each 64 KB after them take 66 KB. Because of the order of the reads
 * below, bytes that arrive or are read meanwhile make the cost too high, never too low.
 */
static __always_inline void measure_cost(struct sending *dir, const struct flow *flow, __u32 peer)
{
	struct tcp_sock *tp = (struct tcp_sock *)flow->sock[peer];
	__u64 read = flow->side[peer & 1].receiving.read_bytes + dir->missed;
	__u32 next, copied, unread;
	__u64 cost;
	int held;

	/* Goes on only if all redirected bytes have been read: what is held then is TCP's. */
	if (read < dir->redirect_end || sent(dir) < read + COST_MEASURED ||
	    bpf_core_read(&next, sizeof(next), &tp->rcv_nxt) ||
	    bpf_core_read(&held, sizeof(held),
			  &tp->inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter) ||
	    bpf_core_read(&copied, sizeof(copied), &tp->copied_seq))
		return;
	unread = next - copied;
	if (held <= 0 || (__s32)unread < COST_MEASURED)
		return;
	cost = ((__u64)held * COST_UNIT + unread - 1) / unread;
	dir->tcp_cost = cost < COST_LEAST ? COST_LEAST : cost > 255 ? 255 : cost;
}

/*
 * Returns true if the peer's receive buffer has room for the message. Redirected bytes count
 * there (bpf_tcp_ingress), and a TCP segment that finds no room is dropped, and sent again
 * later and later. So a redirect must leave room for all that the sender may still send by
 * TCP (its window), at the measured cost, but for no more than the whole buffer. A buffer
 * whose size the application has not fixed may grow up to tcp_rmem (tcp_clamp_window).
 */
static __always_inline bool has_room(const struct flow *flow, __u32 peer, const struct sending *dir,
				     const struct tcp_sock *own, __u32 size)
{
	struct sock *sk = (struct sock *)flow->sock[peer];
	__s64 by_tcp = (__u64)own->snd_wnd * (dir->tcp_cost ?: COST_UNKNOWN) / COST_UNIT;
	struct net *net;
	int held, room, highest;
	__s64 bytes;

	if (read_field(&held, sk, sk_backlog.rmem_alloc.counter) ||
	    read_field(&room, sk, sk_rcvbuf))
		return false;
	bytes = (__s64)held + size + (by_tcp < room ? by_tcp : room);
	if (bytes <= room)
		return true;
	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_RCVBUF_LOCK)
		return false;
	if (read_field(&net, sk, __sk_common.skc_net.net) ||
	    read_field(&highest, net, ipv4.sysctl_tcp_rmem[2]))
		return false;
	return bytes <= highest;
}

/*
 * Updates the upper bound of how many redirected messages are unread. Reads are seen in bytes,
 * not in messages, so a message counts until all bytes up to a mark behind it are read.
 */
static __always_inline void count_queued(struct sending *dir, __u64 end, __u64 read)
{
	if (read >= end) {
		dir->queued_before = 0;
		dir->queued_since = 0;
	} else if (read >= dir->mark) {
		dir->queued_before = dir->queued_since;
		dir->queued_since = 0;
		dir->mark = end;
	}
}

/*
 * Raises the limit when the reader has read everything and the direction changes
 * to the shortcut, for the first time or after a spill. The new limit is what the
 * reader has read since the limit last grew, as on TCP (tcp_rcv_space_adjust),
 * after a spill at least twice the old limit, and at most the budget.
 */
static __always_inline void grow(struct sending *dir, __u64 read, const struct settings *set)
{
	__u64 limit = read - dir->grown, least = dir->limit;

	if (dir->flags & SENDING_SPILLED)
		least *= 2;
	else if (dir->switches)
		return;
	dir->flags &= ~SENDING_SPILLED;
	dir->grown = read;
	if (limit < least)
		limit = least;
	if (limit > set->budget)
		limit = set->budget;
	if (limit <= dir->limit)
		return;
	dir->limit = limit;
	dir->flags &= ~SENDING_LEARNED;
}

/*
 * Charges the receiving pod with the direction's unread bytes as of its last redirected
 * message, until all of these have been read. The high word of dir->charge says where
 * they end, so that uncharge does not take back what a message after them is charged.
 */
static __always_inline void charge(struct sending *dir, __s64 *charged, __u32 cost)
{
	__u64 old = __sync_lock_test_and_set(&dir->charge, dir->redirect_end << 32 | cost);

	if (charged)
		__sync_fetch_and_add(charged, (__s64)cost - (__u32)old);
}

/* Takes back a charge of the direction towards a receiver, unless that has changed since. */
static __always_inline void uncharge(struct flow *flow, __u32 receiver, __u64 charge)
{
	struct sending *dir = &flow->side[(receiver ^ 1) & 1].sending;
	__s64 *charged;

	if (!(__u32)charge ||
	    __sync_val_compare_and_swap(&dir->charge, charge, charge & ~0xffffffffULL) != charge)
		return;
	charged = bpf_map_lookup_elem(&charges, &flow->netns[receiver & 1]);
	if (charged)
		__sync_fetch_and_add(charged, -(__s64)(__u32)charge);
}

/* Takes back whatever is charged: the receiver is closed, and reads no more. */
static __always_inline void uncharge_all(struct flow *flow, __u32 receiver)
{
	uncharge(flow, receiver, flow->side[(receiver ^ 1) & 1].sending.charge);
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Limits: how much a receiver may leave unread by the shortcut. The budget is the
 * highest limit of a direction, the pod's budget that of all receivers of a pod. What is
 * more spills: it goes by TCP, whose window stops the sender.
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

/* What a redirected message takes of the kernel beside its bytes: struct sk_msg, a slab object of 1 KiB. */
#define MESSAGE_COST 1024

/* The first limit of a direction: TCP's receive buffer starts with as much (tcp_rmem). */
#define LIMIT_START (128 << 10)

/*
 * A redirect that is not granted its memory fails with ENOMEM (bpf_tcp_ingress),
 * where TCP waits. It is always granted until the second value of tcp_mem is
 * exceeded (__sk_mem_raise_allocated); what is between the first and that one is
 * room for messages that are sent at once.
 */
static __always_inline bool memory_pressure(const struct tcp_sock *tp)
{
	const struct proto *prot = tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot;
	__s64 allocated;
	long low;

	return bpf_core_read(&allocated, sizeof(allocated), &prot->memory_allocated->counter) ||
	       bpf_core_read(&low, sizeof(low), prot->sysctl_mem) || allocated > low;
}

/* What a byte of TCP takes of the receive buffer is measured when so many are unread. */
#define COST_MEASURED (256 << 10)
/* The unit, what is taken for granted until then, and the least that is believed. */
#define COST_UNIT 32
#define COST_UNKNOWN 40
#define COST_LEAST 33

/*
 * Measures what a byte of TCP takes of the receive buffer, the kernel's own data with
 * it. The kernel reckons once, with the first segments, and promises its sender less
 * than fits: a large stream whose window is open would never leave room for a redirect.
 * For example, 14 KB take 16 KB, but each 64 KB of what follows take 66 KB. In this
 * order, what arrives or is read meanwhile makes the cost too high, not too low.
 */
static __always_inline void measure_cost(struct sending *dir, const struct flow *flow, __u32 peer)
{
	struct tcp_sock *tp = (struct tcp_sock *)flow->sock[peer];
	__u64 read = flow->side[peer & 1].receiving.read_bytes + dir->missed;
	__u32 next, copied, unread;
	__u64 cost;
	int held;

	/* All that was redirected has been read, so what is held is TCP's. */
	if (read < dir->redirect_end ||
	    dir->shortcut_bytes + dir->tcp_bytes < read + COST_MEASURED ||
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
 * Redirected bytes count in the receive buffer (bpf_tcp_ingress), and a segment
 * that finds no room there is dropped and sent again later and later. So what is
 * redirected leaves room for all that the sender may send by TCP, at what that costs,
 * or as much as the kernel has reckoned with when it said what may be sent. A buffer
 * that the application has not fixed grows up to tcp_rmem (tcp_clamp_window).
 */
static __always_inline bool has_room(const struct flow *flow, __u32 peer, const struct sending *dir,
				     const struct tcp_sock *own, __u32 size)
{
	struct sock *sk = (struct sock *)flow->sock[peer];
	__s64 by_tcp = (__u64)own->snd_wnd * (dir->tcp_cost ?: COST_UNKNOWN) / COST_UNIT;
	struct net *net;
	int held, room, highest;
	__s64 bytes;

	if (bpf_core_read(&held, sizeof(held), &sk->sk_backlog.rmem_alloc.counter) ||
	    bpf_core_read(&room, sizeof(room), &sk->sk_rcvbuf))
		return false;
	bytes = (__s64)held + size + (by_tcp < room ? by_tcp : room);
	if (bytes <= room)
		return true;
	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_RCVBUF_LOCK)
		return false;
	if (bpf_core_read(&net, sizeof(net), &sk->__sk_common.skc_net.net) ||
	    bpf_core_read(&highest, sizeof(highest), &net->ipv4.sysctl_tcp_rmem[2]))
		return false;
	return bytes <= highest;
}

/*
 * Messages in the queue: at most those that were sent since a mark whose bytes
 * have all been read. Reads are seen in bytes, and several may take one message.
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
 * The reader has read all, and the direction takes the shortcut for the first time
 * or since it met its limit. The reader may leave as much unread as it has read
 * since the limit grew last, as on TCP (tcp_rcv_space_adjust), and twice as much as
 * the limit that it met.
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
 * The pod's charge of a direction is what was unread when the last message was
 * redirected, until all of it has been read. The high word of charge says what
 * that was, so that a message that comes meanwhile is not taken back with it.
 */
static __always_inline void charge(struct sending *dir, __s64 *charged, __u32 cost)
{
	__u64 old = __sync_lock_test_and_set(&dir->charge, dir->redirect_end << 32 | cost);

	if (charged)
		__sync_fetch_and_add(charged, (__s64)cost - (__u32)old);
}

/* Takes back what the direction towards a receiver is charged with, if it is still the same. */
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

/* A receiver is closed: nothing is read any more. */
static __always_inline void uncharge_all(struct flow *flow, __u32 receiver)
{
	uncharge(flow, receiver, flow->side[(receiver ^ 1) & 1].sending.charge);
}

#endif

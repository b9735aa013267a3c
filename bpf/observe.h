/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Observe: counts what applications read, since only that tells what is still unread. */
#ifndef PODSHUNT_OBSERVE_H
#define PODSHUNT_OBSERVE_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "flow.h"
#include "limits.h"
#include "maps.h"
#include "unsupported.h"

/* A recv found nothing to read. Right after one that was not filled, that proves a drain. */
static __always_inline void observe_nothing(struct sock *sk, __u32 flags)
{
	struct receiving *reader;
	struct sk_flow *self;
	struct flow *flow;

	if (flags & (MSG_PEEK | MSG_ERRQUEUE | MSG_OOB))
		return;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self || self->skip)
		return;
	flow = flow_of(self, sk);
	if (!flow)
		return;
	reader = &flow->side[self->side & 1].receiving;
	if (reader->unfilled && reader->drains < ~0U)
		reader->drains++;
	reader->unfilled = false;
}

/*
 * Counts all that was read of the stream, for a flow that has joined late. The agent's
 * iterator cannot: a recv that has taken bytes, and has not come to observe yet, would be
 * counted twice. Here it has, and the receive queue says what it took. The count so far is
 * less than 2 GiB away. For example, with a stream that began at sequence number 7001, a
 * count of 1000, and copied_seq at 8021, 1020 bytes were read.
 */
static __always_inline __u64 count_anew(struct flow *flow, __u32 side, const struct sock *sk)
{
	__u32 began = side == SIDE_CLIENT ? flow->server_seq : flow->client_seq, copied_seq;
	__u32 redirected = flow->side[(side ^ 1) & 1].sending.shortcut_bytes;
	struct receiving *reader = &flow->side[side & 1].receiving;
	__u64 read = reader->read_bytes;

	if (!(__sync_fetch_and_and(&reader->state, ~READ_ANEW) & READ_ANEW) ||
	    bpf_core_read(&copied_seq, sizeof(copied_seq), &((struct tcp_sock *)sk)->copied_seq))
		return read;
	read += (__s32)(copied_seq - began + redirected - (__u32)read);
	reader->read_bytes = read;
	return read;
}

static __always_inline void observe_read(struct sock *sk, int bytes, bool unfilled, __u32 flags)
{
	struct receiving *reader;
	struct sk_flow *self;
	struct flow *flow;
	__u64 charge, read;
	__u32 side;

	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self || self->skip)
		return;
	flow = flow_of(self, sk);
	if (!flow)
		return;
	side = self->side & 1;
	reader = &flow->side[side].receiving;
	if (flags & ~RECV_SUPPORTED)
		mark_unsupported_flags(flow, side, flags & ~RECV_SUPPORTED);
	if (!(flags & MSG_DONTWAIT))
		reader->blocking_reader = (__u32)bpf_get_current_pid_tgid();
	/* These take no bytes of the stream. MSG_OOB takes one urgent byte, or redirected bytes. */
	if (flags & (MSG_PEEK | MSG_ERRQUEUE) || (flags & MSG_OOB && bytes == 1))
		return;
	reader->unfilled = unfilled;
	flow->side[side].compare.cpu = bpf_get_smp_processor_id();
	/* Atomic: threads may read one socket at once, and a guard may mark it unsupported. */
	if (reader->state & READ_ANEW)
		read = count_anew(flow, side, sk);
	else
		read = __sync_fetch_and_add(&reader->read_bytes, bytes) + bytes;
	if (reader->reads < READS_MAX)
		reader->reads++;
	if (!(reader->state & READ_SEEN))
		__sync_fetch_and_or(&reader->state, READ_SEEN);
	charge = *(volatile __u64 *)&flow->side[side ^ 1].sending.charge;
	if ((__u32)charge &&
	    (__s32)((__u32)read + flow->side[side ^ 1].sending.missed - (__u32)(charge >> 32)) >= 0)
		uncharge(flow, side, charge);
}

/* From Linux 6.3 on; needs no trampoline. Runs for every recv on any socket of the node. */
SEC("tp_btf/sock_recv_length")
int observe_tracepoint(__u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	int bytes = ctx[1];

	/* It is in no sockmap, or has left it, which is quicker to see than its storage. */
	if (!sk->sk_user_data)
		return 0;
	/* The tracepoint does not tell the buffer's size, so every recv counts as not filled. */
	if (bytes > 0)
		observe_read(sk, bytes, true, ctx[2]);
	else if (bytes == -EAGAIN)
		observe_nothing(sk, ctx[2]);
	return 0;
}

/* For kernels that allow trampolines. Runs for sockets in a sockmap only. */
SEC("fexit/tcp_bpf_recvmsg")
int observe_fexit(__u64 *ctx)
{
	/* The result's place in ctx differs between kernels, so ask for it (5.17). */
	__u64 ret = 0;

	if (bpf_get_func_ret(ctx, &ret))
		return 0;
	if ((int)ret > 0)
		observe_read((struct sock *)ctx[0], (int)ret, (__u32)ret < ctx[2], ctx[3]);
	else if ((int)ret == -EAGAIN)
		observe_nothing((struct sock *)ctx[0], ctx[3]);
	return 0;
}

#endif

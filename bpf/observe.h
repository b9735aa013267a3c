/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Observe: what the application has read. */
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

/* A recv has found nothing. */
static __always_inline void observe_nothing(struct sock *sk, __u32 flags)
{
	struct receiving *reader;
	struct sk_flow *self;
	struct flow *flow;

	if (flags & (MSG_PEEK | MSG_ERRQUEUE | MSG_OOB))
		return;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
		return;
	flow = flow_of(self, sk);
	if (!flow)
		return;
	reader = &flow->side[self->side & 1].receiving;
	if (reader->unfilled && reader->drains < ~0U)
		reader->drains++;
	reader->unfilled = false;
}

static __always_inline void observe_read(struct sock *sk, int bytes, bool unfilled, __u32 flags)
{
	struct receiving *reader;
	struct sk_flow *self;
	struct flow *flow;
	__u64 charge, read;
	__u32 side;

	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
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
	/* None of these takes bytes from the stream, but MSG_OOB does with redirected ones. */
	if (flags & (MSG_PEEK | MSG_ERRQUEUE) || (flags & MSG_OOB && bytes == 1))
		return;
	reader->unfilled = unfilled;
	/* Several threads may read one socket at once, and a guard may mark it unsupported. */
	read = __sync_fetch_and_add(&reader->read_bytes, bytes) + bytes;
	if (reader->reads < ~0U)
		reader->reads++;
	if (!(reader->state & READ_SEEN))
		__sync_fetch_and_or(&reader->state, READ_SEEN);
	charge = *(volatile __u64 *)&flow->side[side ^ 1].sending.charge;
	if ((__u32)charge &&
	    (__s32)((__u32)read + flow->side[side ^ 1].sending.missed - (__u32)(charge >> 32)) >= 0)
		uncharge(flow, side, charge);
}

/* Kernels from 6.3 on; needs no trampoline. Fires for every socket of the node that receives. */
SEC("tp_btf/sock_recv_length")
int observe_tracepoint(__u64 *ctx)
{
	int bytes = ctx[1];

	/* How much was asked for is not told here. */
	if (bytes > 0)
		observe_read((struct sock *)ctx[0], bytes, true, ctx[2]);
	else if (bytes == -EAGAIN)
		observe_nothing((struct sock *)ctx[0], ctx[2]);
	return 0;
}

/* Where the kernel allows trampolines. Fires for sockets that sit in a sockmap only. */
SEC("fexit/tcp_bpf_recvmsg")
int observe_fexit(__u64 *ctx)
{
	/* The number of arguments has changed over time, so the result is asked for (5.17). */
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

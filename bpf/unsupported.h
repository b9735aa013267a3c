/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Unsupported: calls and options, such as splice, that do not work on a socket in the
 * SOCKHASH as on a plain one. The direction that uses one stays on TCP, and its server port
 * is marked unsupported: new connections to it are not paired. These are all connections if
 * the server's side made the call, and those of the client's pod if the client's side did.
 */
#ifndef PODSHUNT_UNSUPPORTED_H
#define PODSHUNT_UNSUPPORTED_H

#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "learned.h"
#include "maps.h"

/*
 * Flags of recv that work with redirected data as with TCP data:
 * MSG_PEEK, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITFORONE, MSG_CMSG_CLOEXEC,
 * MSG_CMSG_COMPAT. A receiver that uses any other stays on TCP.
 */
#define MSG_OOB 0x1
#define MSG_PEEK 0x2
#define MSG_DONTWAIT 0x40
#define MSG_WAITALL 0x100
#define MSG_ERRQUEUE 0x2000
#define RECV_SUPPORTED (MSG_PEEK | MSG_DONTWAIT | 0x4000 | 0x10000 | 0x40000000 | 0x80000000)

static __always_inline bool is_unsupported(__u64 client, __u64 server, __u32 port, bool blocking)
{
	/* What is known of blocking sockets counts only where these may not take part. */
	__u32 counts = blocking ? ~UNSUPPORTED_BLOCKING : ~0U;
	struct learned_value *of_server = find_learned(0, server, port);
	struct learned_value *of_client = find_learned(client, server, port);

	return (of_server && of_server->reasons & counts) ||
	       (of_client && of_client->reasons & counts);
}

/* Marks a server port unsupported, for all clients, or for one pod if client is not 0. */
static __noinline void remember_port(__u64 client, __u64 server, __u32 port,
				     enum unsupported reason)
{
	struct settings *set = get_settings();
	struct learned_value *known;

	if (!set)
		return;
	known = get_learned(client, server, port, set->learned_share);
	if (!known)
		return;
	if (!__sync_fetch_and_or(&known->reasons, reason))
		known->since_ns = bpf_ktime_get_ns();
}

/* Marks the server port of a flow unsupported, for a call of one side. */
static __always_inline void remember(struct flow *flow, __u32 side, enum unsupported reason)
{
	side &= 1;
	if (flow->unsupported[side] & reason)
		return;
	__sync_fetch_and_or(&flow->unsupported[side], reason);
	remember_port(side == SIDE_CLIENT ? flow->netns[SIDE_CLIENT] : 0, flow->netns[SIDE_SERVER],
		      flow->server_port, reason);
}

/* Keeps the direction towards a receiver on TCP for good. doer is the side that made the call. */
static __always_inline void mark_unsupported(struct flow *flow, __u32 receiver, __u32 doer,
					     enum unsupported reason)
{
	__sync_fetch_and_or(&flow->side[receiver & 1].receiving.state, READ_UNSUPPORTED);
	remember(flow, doer, reason);
}

/* Marks what a recv with unsupported flags makes unsupported. */
static __always_inline void mark_unsupported_flags(struct flow *flow, __u32 side, __u32 flags)
{
	flow->side[side & 1].receiving.unsupported_flags |= flags;
	if (flags & MSG_WAITALL)
		mark_unsupported(flow, side, side, UNSUPPORTED_WAITALL);
	if (flags & MSG_OOB)
		mark_unsupported(flow, side, side, UNSUPPORTED_OOB);
	if (flags & ~(MSG_WAITALL | MSG_OOB))
		mark_unsupported(flow, side, side, UNSUPPORTED_RECV_FLAGS);
}

#endif

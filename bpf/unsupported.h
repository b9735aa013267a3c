/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * What both objects need, the shortcut and the guards: the way from a socket to
 * its flow, and the memory of what does not fit the shortcut.
 */
#ifndef PODSHUNT_UNSUPPORTED_H
#define PODSHUNT_UNSUPPORTED_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"

/* Defaults; the loader raises or lowers them. */
#define FLOWS_MAX 32768
#define PODS_MAX 1024
#define LEARNED_MAX 16384

/*
 * Flags of recv that redirected data is served with as TCP data is: MSG_PEEK,
 * MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITFORONE, MSG_CMSG_CLOEXEC,
 * MSG_CMSG_COMPAT. A receiver seen with any other stays on TCP.
 */
#define MSG_OOB 0x1
#define MSG_PEEK 0x2
#define MSG_DONTWAIT 0x40
#define MSG_WAITALL 0x100
#define MSG_ERRQUEUE 0x2000
#define RECV_SUPPORTED (MSG_PEEK | MSG_DONTWAIT | 0x4000 | 0x10000 | 0x40000000 | 0x80000000)

/* One entry, read for every message. Agent: writes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} control SEC(".maps");

static __always_inline struct settings *get_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/*
 * Flows by the client's socket cookie. track: creates, and deletes when both
 * sockets are closed. Full: the connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FLOWS_MAX);
	__type(key, __u64);
	__type(value, struct flow);
} flows SEC(".maps");

/* A socket's membership in its flow; lives and dies with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sk_flow);
} sk_flows SEC(".maps");

/*
 * What is known of server ports. All programs: write. track: reads. The agent
 * deletes on command, and what is of pods that are gone. Full: the least recently
 * used goes, and is learned again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LEARNED_MAX);
	__type(key, struct learned_key);
	__type(value, struct learned_value);
} learned SEC(".maps");

/*
 * Shares of enrolled pods by netns cookie. Agent: creates and deletes with the
 * pod, and corrects what is lost when a program's callbacks are. Programs: write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u64);
	__type(value, struct share);
} shares SEC(".maps");

static __always_inline struct learned_value *find_learned(__u64 client, __u64 server, __u32 port)
{
	struct learned_key key = { .server = server, .client = client, .port = port };

	return bpf_map_lookup_elem(&learned, &key);
}

static __always_inline bool is_unsupported(__u64 client, __u64 server, __u32 port)
{
	struct learned_value *of_server = find_learned(0, server, port);
	struct learned_value *of_client = find_learned(client, server, port);

	return (of_server && of_server->reasons) || (of_client && of_client->reasons);
}

/*
 * Returns the entry, made anew if need be. A pod that has its share of the map
 * gets no more: what it does not remember harms its own connections alone.
 */
static __always_inline struct learned_value *get_learned(__u64 client, __u64 server, __u32 port,
							 __u32 limit)
{
	struct learned_key key = { .server = server, .client = client, .port = port };
	struct learned_value *known = bpf_map_lookup_elem(&learned, &key);
	__u64 owner = client ? client : server;
	struct learned_value blank = {};
	struct share *share;

	if (known)
		return known;
	share = bpf_map_lookup_elem(&shares, &owner);
	if (!share || share->learned >= limit)
		return NULL;
	if (!bpf_map_update_elem(&learned, &key, &blank, BPF_NOEXIST))
		__sync_fetch_and_add(&share->learned, 1);
	return bpf_map_lookup_elem(&learned, &key);
}

/* Keeps the connections to come from being paired: all to the port, or with a client its own. */
static __always_inline void remember_port(__u64 client, __u64 server, __u32 port,
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

/* The same for what a side of a flow did. */
static __always_inline void remember(struct flow *flow, __u32 side, enum unsupported reason)
{
	side &= 1;
	if (flow->unsupported[side] & reason)
		return;
	__sync_fetch_and_or(&flow->unsupported[side], reason);
	remember_port(side == SIDE_CLIENT ? flow->netns[SIDE_CLIENT] : 0, flow->netns[SIDE_SERVER],
		      flow->server_port, reason);
}

/* Puts the direction towards a receiver on TCP for the life of the connection, for what the doer did. */
static __always_inline void mark_unsupported(struct flow *flow, __u32 receiver, __u32 doer,
					     enum unsupported reason)
{
	__sync_fetch_and_or(&flow->side[receiver & 1].receiving.state, READ_UNSUPPORTED);
	remember(flow, doer, reason);
}

/* Flags of a recv that are not served. */
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

/*
 * The flow of a socket by its storage, or NULL. A record may be used again for
 * another flow, and an id too: a client's socket that connects once more has the
 * cookie of before, while the first server's socket may still be open and be read.
 */
static __always_inline struct flow *flow_of(const struct sk_flow *self, const void *sk)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &self->flow);

	if (!flow || flow->state >> FLOW_STATE_BITS != self->flow ||
	    flow->sock[self->side & 1] != (__u64)sk)
		return NULL;
	return flow;
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * What both objects need, the shortcut and the guards: the way from a socket to
 * its flow, and the memory of what does not fit the shortcut.
 */
#ifndef PODSHUNT_MISFIT_H
#define PODSHUNT_MISFIT_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"

/* Defaults; the loader raises or lowers them. */
#define PAIRS_MAX 32768
#define MISFIT_MAX 4096

/*
 * Flags of recv that redirected data is served with as TCP data is: MSG_PEEK,
 * MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITFORONE, MSG_CMSG_CLOEXEC,
 * MSG_CMSG_COMPAT. A receiver seen with any other stays on TCP.
 */
#define MSG_OOB 0x1
#define MSG_PEEK 0x2
#define MSG_DONTWAIT 0x40
#define MSG_WAITALL 0x100
#define RECV_SERVED (MSG_PEEK | MSG_DONTWAIT | 0x4000 | 0x10000 | 0x40000000 | 0x80000000)

/*
 * Flows by the client's socket cookie. track: creates, and deletes when both
 * sockets are closed. Full: the connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PAIRS_MAX);
	__type(key, __u64);
	__type(value, struct pair);
} pairs SEC(".maps");

/* A socket's membership in its pair; lives and dies with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct member);
} members SEC(".maps");

/*
 * Server ports whose connections are not paired any more. All programs: write.
 * track: reads. The agent deletes on command, and what is of pods that are gone.
 * Full: the least recently used goes, and is learned again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MISFIT_MAX);
	__type(key, struct misfit_key);
	__type(value, struct misfit);
} misfits SEC(".maps");

static __always_inline bool is_misfit(__u64 server_netns, __u32 server_port)
{
	struct misfit_key key = { .netns = server_netns, .port = server_port };

	return bpf_map_lookup_elem(&misfits, &key) != NULL;
}

/* Keeps the connections to come of a server port from being paired. */
static __always_inline void remember_port(__u64 server_netns, __u32 server_port,
					  enum misfit_reason reason)
{
	struct misfit_key key = { .netns = server_netns, .port = server_port };
	struct misfit first = { .reasons = reason };
	struct misfit *known;

	first.since_ns = bpf_ktime_get_ns();
	if (!bpf_map_update_elem(&misfits, &key, &first, BPF_NOEXIST))
		return;
	known = bpf_map_lookup_elem(&misfits, &key);
	if (known)
		__sync_fetch_and_or(&known->reasons, reason);
}

/* The same for the server port of a flow. */
static __always_inline void remember(struct pair *pair, enum misfit_reason reason)
{
	if (pair->misfit & reason)
		return;
	__sync_fetch_and_or(&pair->misfit, reason);
	remember_port(pair->netns[SIDE_SERVER], pair->server_port, reason);
}

/* Puts the direction towards a side on TCP for the life of the connection. */
static __always_inline void disqualify(struct pair *pair, __u32 side, enum misfit_reason reason)
{
	__sync_fetch_and_or(&pair->side[side & 1].receiving.state, READ_UNSERVED);
	remember(pair, reason);
}

/* Flags of a recv that are not served. */
static __always_inline void disqualify_flags(struct pair *pair, __u32 side, __u32 flags)
{
	pair->side[side & 1].receiving.unserved_flags |= flags;
	if (flags & MSG_WAITALL)
		disqualify(pair, side, MISFIT_WAITALL);
	if (flags & MSG_OOB)
		disqualify(pair, side, MISFIT_OOB);
	if (flags & ~(MSG_WAITALL | MSG_OOB))
		disqualify(pair, side, MISFIT_RECV_FLAGS);
}

#endif

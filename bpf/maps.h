/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Maps that both objects use, the shortcut and the guards, and
 * the helpers that read them: the settings, and from a socket to
 * its flow. The maps of the shortcut alone are in shortcut.c.
 */
#ifndef PODSHUNT_MAPS_H
#define PODSHUNT_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"

/* Defaults; the loader raises or lowers them. */
#define FLOWS_MAX 32768
#define PODS_MAX 1024
#define LEARNED_MAX 16384

/* FROZEN. One entry, read for every message. Agent: writes. */
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
 * FROZEN. Flows by the client's socket cookie. track: creates, and deletes once both sockets
 * are closed. deliver, observe, guards: write. Full: the connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FLOWS_MAX);
	__type(key, __u64);
	__type(value, struct flow);
} flows SEC(".maps");

/* Flow and side of a socket. track: creates. All programs: read. Goes with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sk_flow);
} sk_flows SEC(".maps");

/* Returns the flow with an id, or NULL: the kernel may reuse its record for another flow. */
static __always_inline struct flow *flow_by_id(__u64 id)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &id);

	return flow && flow->state >> FLOW_STATE_BITS == id ? flow : NULL;
}

/*
 * Returns the flow of a socket by its storage, or NULL. An id may come again, too:
 * a client's socket that connects once more keeps its cookie, and so the id, while
 * the server's socket of the first connection may still be open and be read.
 */
static __always_inline struct flow *flow_of(const struct sk_flow *self, const void *sk)
{
	struct flow *flow = flow_by_id(self->flow);

	return flow && flow->sock[self->side & 1] == (__u64)sk ? flow : NULL;
}

/*
 * What is known of server ports. All programs: write. track: reads. The
 * agent deletes entries on `forget`, and those of pods that no longer take
 * part. Full: the least recently used entry goes, and is learned again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LEARNED_MAX);
	__type(key, struct learned_key);
	__type(value, struct learned_value);
} learned SEC(".maps");

/*
 * Entries that a pod uses in flows and learned, by netns cookie. Agent: creates and
 * deletes with the pod, and corrects the counts if callbacks were lost. Programs: write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u64);
	__type(value, struct share);
} shares SEC(".maps");

#endif

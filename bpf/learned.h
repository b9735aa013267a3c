/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Learned: what the programs at the ends of a server port have shown, good and bad.
 * It shortens the trial of later connections (trial.h), lets them join at their
 * handshake, or keeps them on TCP (unsupported.h).
 */
#ifndef PODSHUNT_LEARNED_H
#define PODSHUNT_LEARNED_H

#include "maps.h"

static __always_inline struct learned_value *find_learned(__u64 client, __u64 server, __u32 port)
{
	struct learned_key key = { .server = server, .client = client, .port = port };

	return bpf_map_lookup_elem(&learned, &key);
}

/*
 * Returns the entry, which it makes if there is none, or NULL. A pod that has used
 * up its share of the map gets no more entries: that harms only its own connections.
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

/*
 * Returns true if connections to a server port join at their handshake, and not once they have
 * earned it: an earlier one has lived, and the shortcut has paid for it. That needs no agent.
 */
static __always_inline bool joins_early(__u64 server, __u32 port)
{
	const struct learned_value *known = find_learned(0, server, port);

	return known && known->early;
}

/*
 * Notes that the shortcut pays for a flow. Its sockets are not blocking, or it would not be in
 * the SOCKHASH, unless the pods accept such sockets.
 */
static __always_inline void note_pays(const struct flow *flow, const struct settings *set,
				      bool blocking)
{
	struct learned_value *known =
		get_learned(0, flow->netns[SIDE_SERVER], flow->server_port, set->learned_share);

	if (!known)
		return;
	known->early = true;
	if (!blocking)
		known->non_blocking = true;
}

/* Notes that it does not: later connections have to earn their place again. */
static __always_inline void note_no_gain(const struct flow *flow)
{
	struct learned_value *known = find_learned(0, flow->netns[SIDE_SERVER], flow->server_port);

	if (known && known->early)
		known->early = false;
}

#endif

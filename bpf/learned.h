/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Learned: what the programs at the ends of a server port have shown, good and bad.
 * It shortens the trial of later connections (trial.h), lets them join at their
 * handshake or later than others, or keeps them on TCP (unsupported.h).
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
static __noinline struct learned_value *get_learned(__u64 client, __u64 server, __u32 port,
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

/* The most segments that a connection has to earn to join. It is less than WATCH_MAX. */
#define JOIN_LATEST 2048

/* Returns after how many segments a watched connection to a server port joins. */
static __always_inline __u32 joins_after(const struct settings *set,
					 const struct learned_value *known)
{
	__u64 halved;
	__u32 after;

	if (!known || !known->join_after)
		return set->join_after;
	halved = (bpf_ktime_get_coarse_ns() - known->join_ns) / set->join_halves_ns;
	after = halved < 32 ? known->join_after >> halved : 0;
	return after > set->join_after ? after : set->join_after;
}

/*
 * Notes whether a watched connection has earned again what it cost to join. If not, later ones
 * to the port have to earn twice as much before they join. For example, one of 20 requests joins
 * after 32 segments, for nothing; later ones do so after 64, and thus never. One that has not
 * lived that long says nothing more: it has joined before an earlier one has doubled it.
 */
static __always_inline void note_join(const struct flow *flow, const struct settings *set,
				      __u32 segments, bool paid)
{
	__u64 server = flow->netns[SIDE_SERVER];
	struct learned_value *known = find_learned(0, server, flow->server_port);
	__u32 after = joins_after(set, known);

	if (paid) {
		after = after / 2 > set->join_after ? after / 2 : 0;
		if (!known || known->join_after == after)
			return;
	} else {
		if (segments < after || after >= JOIN_LATEST)
			return;
		if (!known)
			known = get_learned(0, server, flow->server_port, set->learned_share);
		if (!known)
			return;
		after = 2 * after < JOIN_LATEST ? 2 * after : JOIN_LATEST;
	}
	known->join_ns = bpf_ktime_get_coarse_ns();
	known->join_after = after;
}

/* Notes that it does not: later connections have to earn their place again. */
static __always_inline void note_no_gain(const struct flow *flow)
{
	struct learned_value *known = find_learned(0, flow->netns[SIDE_SERVER], flow->server_port);

	if (known && known->early)
		known->early = false;
}

#endif

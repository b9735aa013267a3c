/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Lifetime: how a socket leaves its flow, and how a flow ends. To evict a socket means to take
 * it out of the SOCKHASH, without losing a byte, while its connection goes on by plain TCP.
 */
#ifndef PODSHUNT_LIFETIME_H
#define PODSHUNT_LIFETIME_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "blocking.h"
#include "flow.h"
#include "kernel.h"
#include "learned.h"
#include "limits.h"
#include "maps.h"
#include "trial.h"
#include "unsupported.h"

#define SOCK_NOSPACE (1UL << 2) /* include/linux/net.h */
#define TCP_ESTABLISHED 1 /* enum in include/net/tcp_states.h */
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8

/* Undoes join, or becoming a candidate. Redirected bytes that are unread are thrown away. */
static __always_inline void remove_socket(struct bpf_sock *sk, __u64 cookie)
{
	bpf_map_delete_elem(&sockets, &cookie);
	bpf_sk_storage_delete(&candidates, sk);
	bpf_sk_storage_delete(&sk_flows, sk);
}

static __always_inline bool has_share(__u64 netns, const struct settings *set)
{
	struct share *share = bpf_map_lookup_elem(&shares, &netns);

	return share && share->flows < set->flow_share;
}

static __always_inline void add_share(const struct flow *flow, __u32 flows)
{
	__u64 netns = flow->netns[SIDE_CLIENT];
	struct share *share = bpf_map_lookup_elem(&shares, &netns);

	if (share)
		__sync_fetch_and_add(&share->flows, flows);
	if (netns == flow->netns[SIDE_SERVER])
		return;
	netns = flow->netns[SIDE_SERVER];
	share = bpf_map_lookup_elem(&shares, &netns);
	if (share)
		__sync_fetch_and_add(&share->flows, flows);
}

/* Deletes a flow. Its sockets are gone, or have never joined. */
static __noinline void delete_flow(struct flow *flow, __u64 id)
{
	uncharge_all(flow, SIDE_CLIENT);
	uncharge_all(flow, SIDE_SERVER);
	add_share(flow, -1);
	bpf_map_delete_elem(&flows, &id);
}

/*
 * Evicts a socket, in two steps, since to delete it from the SOCKHASH throws away what
 * it has not read. First nothing more is redirected to it. Then, in this call or a later
 * one, when deliver is not at work towards it and it has read everything, it is deleted.
 */
static __noinline void evict(struct flow *flow, __u32 side)
{
	__u64 evicting = side == SIDE_CLIENT ? FLOW_CLIENT_EVICTING : FLOW_SERVER_EVICTING;
	__u64 evicted = side == SIDE_CLIENT ? FLOW_CLIENT_EVICTED : FLOW_SERVER_EVICTED;
	struct sending *toward = &flow->side[side ^ 1].sending;

	if (flow->state & evicted)
		return;
	__sync_fetch_and_or(&flow->state, evicting);
	if (toward->busy ||
	    toward->redirect_end > flow->side[side].receiving.read_bytes + toward->missed)
		return;
	if (__sync_fetch_and_or(&flow->state, evicted) & evicted)
		return;
	bpf_map_delete_elem(&sockets, &flow->cookie[side]);
	count(OUTCOME_SOCKET_EVICTED, 0);
}

/* Returns NULL for a socket without a flow. sk may be NULL, too. */
static __always_inline struct sk_flow *sk_flow_of(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&sk_flows, sk, NULL, 0) : NULL;
}

/*
 * Runs when the peer has acknowledged bytes that this socket sent by TCP, and evicts
 * sockets that deliver found to be blocking. It also evicts one whose send buffer
 * was full. Its thread sleeps in write for this acknowledgement, and would then call
 * recv, where the drained buffer wakes it with EAGAIN. The kernel wakes the thread
 * only after this program has run, so the socket is gone from the SOCKHASH by then.
 */
static __always_inline void on_ack(struct flow *flow, __u32 own, const struct tcp_sock *tp)
{
	struct sending *dir = &flow->side[own].sending;

	if (tp->inet_conn.icsk_inet.sk.sk_socket->flags & SOCK_NOSPACE && is_blocking(tp))
		dir->evict = true;
	if (dir->evict || dir->leaves)
		evict(flow, own);
	if ((dir->evict_peer || dir->leaves) && flow->state & FLOW_SERVER_JOINED)
		evict(flow, own ^ 1);
}

/* Deletes what a client has written that closes before its server joins: nobody else would. */
static __always_inline void withdraw(const struct flow *flow)
{
	struct pending_key handshake;
	struct client_key client;

	fill_pending_key(&handshake, flow->client_seq, flow->server_seq, flow->client_addr,
			 flow->client_port);
	bpf_map_delete_elem(&pending, &handshake);
	__builtin_memcpy(client.addr, flow->client_addr, sizeof(client.addr));
	complete_client_key(&client, flow->client_port, flow->netns[SIDE_CLIENT]);
	bpf_map_delete_elem(&syns, &client);
}

/* Notes that a socket is gone. The second of the two to go deletes the flow. */
static __always_inline void mark_gone(const struct sk_flow *self, const void *sk)
{
	struct flow *flow = flow_of(self, sk);
	__u64 gone, other, state;

	if (!flow)
		return;
	gone = self->side == SIDE_CLIENT ? FLOW_CLIENT_GONE : FLOW_SERVER_GONE;
	other = self->side == SIDE_CLIENT ? FLOW_SERVER_GONE : FLOW_CLIENT_GONE;
	state = __sync_fetch_and_or(&flow->state, gone);
	uncharge_all(flow, self->side);
	if (!(state & FLOW_SERVER_JOINED)) {
		if (state & other)
			return; /* the other one deletes it */
		withdraw(flow);
	} else if (!(state & other)) {
		return;
	}
	delete_flow(flow, self->flow);
}

/* As mark_gone, for a socket that does not join after all, and lives on. */
static __noinline void end_unjoined(__u64 id, __u32 side)
{
	struct flow *flow = flow_by_id(id);
	__u64 state;

	if (!flow)
		return;
	state = __sync_fetch_and_or(&flow->state,
				    side == SIDE_CLIENT ? FLOW_CLIENT_GONE : FLOW_SERVER_GONE);
	if (!(state & (FLOW_SERVER_JOINED | FLOW_CLIENT_GONE | FLOW_SERVER_GONE)))
		delete_flow(flow, id);
}

/*
 * Returns true if connect with AF_UNSPEC has ended the connection (tcp_disconnect).
 * That throws away what is unread, and the socket may connect again. Every other
 * end that comes from these states and leaves bytes to be read sets sk_err first.
 */
static __always_inline bool disconnected(const struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);

	return tp && !tp->inet_conn.icsk_inet.sk.sk_err &&
	       (ctx->args[0] == TCP_ESTABLISHED || ctx->args[0] == TCP_CLOSE_WAIT);
}

static __always_inline __u32 data_segments(const struct tcp_sock *tp)
{
	return tp->data_segs_in + tp->data_segs_out;
}

/* Returns true if nothing is kept from a side for its trial, or it has nothing to read. */
static __always_inline bool past_trial(const struct flow *flow, __u32 side,
				       const struct settings *set)
{
	const struct sending *dir = &flow->side[(side ^ 1) & 1].sending;

	return !sent(dir) || (flow->side[side & 1].receiving.reads >= set->trial_reads &&
			      dir->reason != OUTCOME_TRIAL);
}

/* Returns true if a socket that is to join is not in the SOCKHASH yet, as when no agent runs. */
static __always_inline bool waits_for_agent(struct bpf_sock *sk)
{
	const struct candidate *asks = bpf_sk_storage_get(&candidates, sk, NULL, 0);

	return asks && asks->step == JOIN_START;
}

/* Returns what the shortcut has saved, in small messages: one of 16 KiB saves as much as two. */
static __always_inline __u64 saved(const struct flow *flow)
{
	const struct side *client = &flow->side[SIDE_CLIENT], *server = &flow->side[SIDE_SERVER];

	return client->receiving.paid + server->receiving.paid +
	       (client->sending.shortcut_bytes + server->sending.shortcut_bytes) / (16 << 10);
}

/*
 * A flow ends, as the first of its sockets is closed, perhaps before it has joined. If it has
 * joined at its handshake: had it been watched, would it have joined? If it was watched: has the
 * shortcut saved what it cost to join? That takes twice as many messages as it had to earn segments
 * at least. While it is on trial, or waits for the agent, that says nothing, and without leave_ratio
 * nothing is counted.
 */
static __always_inline void note_life(const struct flow *flow, struct bpf_sock *sk,
				      const struct tcp_sock *tp)
{
	const struct receiving *client = &flow->side[SIDE_CLIENT].receiving;
	const struct receiving *server = &flow->side[SIDE_SERVER].receiving;
	const struct settings *set = get_settings();
	__u32 segments =
		data_segments(tp) + client->paid + client->unpaid + server->paid + server->unpaid;

	if (!set || flow->state & (FLOW_CLIENT_GONE | FLOW_SERVER_GONE))
		return;
	if (!flow->watched) {
		if (segments < set->join_after)
			note_no_gain(flow);
	} else if (flow->watched == WATCHED && set->leave_ratio && !waits_for_agent(sk) &&
		   past_trial(flow, SIDE_CLIENT, set) && past_trial(flow, SIDE_SERVER, set)) {
		note_join(flow, set, segments, saved(flow) >= 2 * set->join_after);
	}
}

/* A flow ends on trial. Later ones go on from there, else a port of short connections never ends it. */
static __always_inline void note_trial(const struct flow *flow)
{
	const struct settings *set = get_settings();

	if (!set || !set->trial_bytes)
		return;
	for (__u32 own = SIDE_CLIENT; own < SIDE_MAX; own++) {
		__u32 reads = flow->side[own ^ 1].receiving.reads;

		if (reads && reads < set->trial_reads)
			learn(flow, own, set);
	}
}

/* A socket of a flow is closed. */
static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sk_flow *self;
	struct tcp_sock *tp;
	struct flow *flow;

	self = sk_flow_of(sk);
	if (!self)
		return;
	flow = flow_of(self, sk);
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (flow && tp) {
		note_life(flow, sk, tp);
		note_trial(flow);
	}
	mark_gone(self, sk);
	/* Else the SOCKHASH would keep the redirected bytes, and the next connection read them. */
	if (disconnected(ctx, sk))
		remove_socket(sk, bpf_get_socket_cookie(ctx));
}

/*
 * A socket of a flow connects or listens once more. Its first connection has ended in
 * a way that disconnected does not see, such as a reset after shutdown. Redirected
 * bytes that are still in the SOCKHASH would be read on the next connection.
 */
static __always_inline void on_reuse(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sk_flow *self;

	self = sk_flow_of(sk);
	if (!self)
		return;
	mark_gone(self, sk);
	remove_socket(sk, bpf_get_socket_cookie(ctx));
	count(OUTCOME_REUSED, 0);
}

/*
 * Evicts a blocking socket that shuts down writing. The peer's
 * acknowledgement of its FIN would wake its next recv with EAGAIN.
 * This runs inside shutdown, before the thread can call recv.
 */
static __always_inline void on_half_close(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sk_flow *self;
	struct tcp_sock *tp;
	struct flow *flow;

	self = sk_flow_of(sk);
	if (!self)
		return;
	flow = flow_of(self, sk);
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	/* After close, or shutdown of both sides, nobody calls recv. */
	if (!flow || !tp || tp->inet_conn.icsk_inet.sk.sk_shutdown != SEND_SHUTDOWN ||
	    !is_blocking(tp))
		return;
	/* If redirected bytes are unread, on_ack tries again. */
	flow->side[self->side & 1].sending.evict = true;
	evict(flow, self->side & 1);
}

/*
 * Another program may listen on the port now, so what the
 * last one has proved is forgotten. What makes the port
 * unsupported stays, except that its sockets were blocking.
 */
static __always_inline void on_listen(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct learned_value *known;

	if (!enrolled(netns))
		return;
	known = find_learned(0, netns, ctx->local_port);
	if (!known)
		return;
	known->reads = 0;
	known->proved = 0;
	known->bulk = 0;
	known->drains = 0;
	known->limit = 0;
	known->non_blocking = false;
	known->early = false;
	known->join_after = 0;
	__sync_fetch_and_and(&known->reasons, ~UNSUPPORTED_BLOCKING);
}

/* Run by the agent, for a flow whose sockets have gone without a callback. */
SEC("syscall")
int end_flow(struct flow_id *ctx)
{
	struct flow *flow = flow_by_id(ctx->id);

	if (flow)
		delete_flow(flow, ctx->id);
	return 0;
}

#endif

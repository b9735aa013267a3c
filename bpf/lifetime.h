/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Lifetime: how a socket leaves its flow, and a flow ends. To evict a socket is to take
 * it out of the SOCKHASH without the loss of a byte; it goes on as a plain TCP socket.
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
#include "unsupported.h"

#define SOCK_NOSPACE (1UL << 2) /* include/linux/net.h */
#define TCP_ESTABLISHED 1 /* enum in include/net/tcp_states.h */
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8

/* Undoes join for a socket of which nothing redirected is to be read any more. */
static __always_inline void remove_socket(struct bpf_sock *sk, __u64 cookie)
{
	bpf_map_delete_elem(&sockets, &cookie);
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

/* Ends a flow whose sockets are both gone, or have never joined. */
static __always_inline void delete_flow(struct flow *flow, __u64 id)
{
	uncharge_all(flow, SIDE_CLIENT);
	uncharge_all(flow, SIDE_SERVER);
	add_share(flow, -1);
	bpf_map_delete_elem(&flows, &id);
}

/*
 * Takes a socket out of the SOCKHASH in two steps: no more redirects to it,
 * then, with nothing on the way and all read, the delete. It goes on as a plain
 * TCP socket.
 */
static __always_inline void evict(struct flow *flow, __u32 side)
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

/* A context's sk may be NULL. */
static __always_inline struct sk_flow *sk_flow_of(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&sk_flows, sk, NULL, 0) : NULL;
}

/*
 * TCP has acknowledged bytes of this socket. Sockets that deliver has found to be
 * blocking are evicted here. One whose send buffer was full is, too: its thread waits
 * in write for this acknowledgement, and the kernel wakes it only after this program
 * has run. So the socket is evicted before the thread comes to recv, where the drained
 * buffer would wake it with EAGAIN.
 */
static __always_inline void on_ack(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;
	struct sending *dir;
	struct sk_flow *self;
	struct flow *flow;
	__u32 own;

	self = sk_flow_of(sk);
	if (!self)
		return;
	if (!self->flow) {
		learn_mode(ctx, sk);
		return;
	}
	own = self->side & 1;
	flow = flow_of(self, sk);
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!flow || !tp)
		return;
	dir = &flow->side[own].sending;
	if (tp->inet_conn.icsk_inet.sk.sk_socket->flags & SOCK_NOSPACE && is_blocking(tp))
		dir->evict = true;
	if (dir->evict)
		evict(flow, own);
	if (dir->evict_peer && flow->state & FLOW_SERVER_JOINED)
		evict(flow, own ^ 1);
}

/* A client is closed before its server came: nobody else would delete what it wrote. */
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

/* The second one of the two sockets to go deletes the flow. */
static __always_inline void mark_gone(const struct sk_flow *self, const struct bpf_sock *sk)
{
	struct flow *flow = flow_of(self, sk);
	__u64 gone, other, state;

	if (!flow)
		return;
	gone = self->side == SIDE_CLIENT ? FLOW_CLIENT_GONE : FLOW_SERVER_GONE;
	other = self->side == SIDE_CLIENT ? FLOW_SERVER_GONE : FLOW_CLIENT_GONE;
	state = __sync_fetch_and_or(&flow->state, gone);
	uncharge_all(flow, self->side);
	if (!(state & FLOW_SERVER_JOINED))
		withdraw(flow);
	else if (!(state & other))
		return;
	delete_flow(flow, self->flow);
}

/*
 * A connect to no address ends the connection and throws away what is unread;
 * the socket may connect again (tcp_disconnect). All else that ends a connection
 * from these states, and leaves bytes to be read, sets the error first.
 */
static __always_inline bool disconnected(const struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);

	return tp && !tp->inet_conn.icsk_inet.sk.sk_err &&
	       (ctx->args[0] == TCP_ESTABLISHED || ctx->args[0] == TCP_CLOSE_WAIT);
}

/* A socket of a flow is closed. */
static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sk_flow *self;

	self = sk_flow_of(sk);
	if (!self)
		return;
	mark_gone(self, sk);
	/* The SOCKHASH would keep redirected bytes, for whoever reads next. */
	if (disconnected(ctx, sk))
		remove_socket(sk, bpf_get_socket_cookie(ctx));
}

/*
 * A socket of a flow connects or listens once more. Its first connection has ended in a way
 * that disconnected does not know, such as a reset after shutdown, and the SOCKHASH
 * has kept redirected bytes for the next.
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
 * The peer acknowledges the end of what a socket sends, and that wakes a recv that
 * sleeps, which would return EAGAIN. This runs inside shutdown, before the thread
 * can come to recv.
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
	/* After close, or shutdown of both sides, nobody comes to recv. */
	if (!flow || !tp || tp->inet_conn.icsk_inet.sk.sk_shutdown != SEND_SHUTDOWN ||
	    !is_blocking(tp))
		return;
	/* If redirected bytes are unread, on_ack tries again. */
	flow->side[self->side & 1].sending.evict = true;
	evict(flow, self->side & 1);
}

/*
 * Another program listens now, or the same one anew: what the last one has proved
 * says nothing of it. What it has used and is not served still counts, but for the
 * mode of its sockets.
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
	__sync_fetch_and_and(&known->reasons, ~UNSUPPORTED_BLOCKING);
}

/* The agent ends a flow whose sockets are gone without our having been told. */
SEC("syscall")
int end_flow(struct flow_id *ctx)
{
	struct flow *flow = flow_by_id(ctx->id);

	if (flow)
		delete_flow(flow, ctx->id);
	return 0;
}

#endif

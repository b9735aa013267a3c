/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Late: open connections become flows. The handshakes of these were over before both pods
 * were allowed to take part. The agent runs find_sockets (find.h) once, finds out which
 * sockets belong together, and writes these into joining. Then it runs join_sockets again
 * and again, with some milliseconds in between, until joining is empty.
 */
#ifndef PODSHUNT_LATE_H
#define PODSHUNT_LATE_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "address.h"
#include "blocking.h"
#include "find.h"
#include "flow.h"
#include "joining.h"
#include "kernel.h"
#include "lifetime.h"
#include "maps.h"
#include "pairing.h"

/* include/uapi/linux/bpf.h; an option of bpf_setsockopt since Linux 6.12. */
#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008

/* How many waiters of a socket are looked at; with more, one counts as asleep in recv. */
#define SLEEPERS_MAX 32

/* The largest stack of a thread in the kernel, in bytes: on arm64 with pages of 64 KiB. */
#define STACK_MAX (64 << 10)

/* The reads of a receiver that has joined late before anything is redirected to it. */
#define READS_BEFORE_REDIRECT 3

/*
 * Sockets that are to join, by cookie. Agent: writes, and deletes what has not joined in
 * time. join_sockets: reads and deletes. Full: the connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * FLOWS_MAX);
	__type(key, __u64);
	__type(value, struct join_entry);
} joining SEC(".maps");

/*
 * Returns true if a thread may be asleep in recv, send or splice. In recv and splice, it would
 * not see redirected bytes: it began when the socket was a plain one. A thread becomes such a
 * waiter, and ceases to be one, under the socket's lock. Its entry is on its own stack, and
 * leads to the thread (DEFINE_WAIT_FUNC). That of poll leads to something on a stack, and
 * that of epoll nowhere.
 */
static __always_inline bool has_sleeper(const struct tcp_sock *tp)
{
	struct list_head *head, *next;
	struct socket_wq *wq;

	if (bpf_core_read(&wq, sizeof(wq), &tp->inet_conn.icsk_inet.sk.sk_wq))
		return true;
	head = &wq->wait.head;
	if (bpf_core_read(&next, sizeof(next), &head->next))
		return true;
	for (int i = 0; i < SLEEPERS_MAX; i++) {
		struct wait_queue_entry *entry;
		void *private, *stack;

		if (next == head)
			return false;
		entry = (void *)next - bpf_core_field_offset(struct wait_queue_entry, entry);
		if (bpf_core_read(&private, sizeof(private), &entry->private))
			return true;
		if (private && (bpf_core_read(&stack, sizeof(stack),
					      &((struct task_struct *)private)->stack) ||
				(__u64)entry - (__u64)stack < STACK_MAX))
			return true;
		if (bpf_core_read(&next, sizeof(next), &next->next))
			return true;
	}
	return true;
}

/* Bytes that the program has read of the stream. */
static __always_inline __u64 read_position(const struct tcp_sock *tp)
{
	return tp->bytes_received - (__u32)(tp->rcv_nxt - tp->copied_seq);
}

/* Bytes that the program has written. The client's SYN counts as an acknowledged byte. */
static __always_inline __u64 write_position(const struct tcp_sock *tp, __u32 side)
{
	return tp->bytes_acked - (side == SIDE_CLIENT) + (__u32)(tp->write_seq - tp->snd_una);
}

static __always_inline int set_callbacks(struct sock_common *skc, int flags)
{
	return bpf_setsockopt(skc, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof(flags));
}

/*
 * Makes the flow. Returns OUTCOME_PAIRED, or why there is none, or OUTCOME_MAX if there may be
 * one later.
 */
static __noinline enum outcome make_flow(const struct join_entry *it)
{
	__u64 client = it->netns[SIDE_CLIENT], server = it->netns[SIDE_SERVER];
	struct settings *set = get_settings();
	struct policy policy = {};
	enum outcome outcome;
	__u64 id = it->flow;
	struct flow *flow;
	__u32 generation;

	if (!set)
		return OUTCOME_NO_MEMORY;
	if (!enrolled(client) || !enrolled(server))
		return OUTCOME_POLICY_REFUSED;
	outcome = admit(set, client, server, it->server_port, &generation, &policy);
	if (it->watched && policy.verdict == VERDICT_HOLD)
		return OUTCOME_MAX; /* it is watched for as long */
	if (outcome != OUTCOME_PAIRED)
		return outcome;
	if (it->blocking && !allows_blocking(set, policy.blocking))
		return it->blocking & 1 << SIDE_CLIENT ? OUTCOME_BLOCKING_CLIENT
						       : OUTCOME_BLOCKING_SERVER;
	if (bpf_map_update_elem(&flows, &id, &blank, BPF_NOEXIST))
		return OUTCOME_FLOWS_FULL;
	flow = bpf_map_lookup_elem(&flows, &id);
	if (!flow)
		return OUTCOME_FLOWS_FULL;
	__builtin_memcpy(flow->cookie, it->cookie, sizeof(flow->cookie));
	__builtin_memcpy(flow->netns, it->netns, sizeof(flow->netns));
	flow->since_ns = bpf_ktime_get_ns();
	__builtin_memcpy(flow->client_addr, it->client_addr, sizeof(flow->client_addr));
	__builtin_memcpy(flow->orig_dst_addr, it->orig_dst_addr, sizeof(flow->orig_dst_addr));
	__builtin_memcpy(flow->server_addr, it->server_addr, sizeof(flow->server_addr));
	flow->client_port = it->client_port;
	flow->orig_dst_port = it->orig_dst_port;
	flow->server_port = it->server_port;
	flow->client_seq = it->client_seq;
	flow->server_seq = it->server_seq;
	flow->watched = it->watched;
	start_direction(flow, SIDE_CLIENT, 0, generation, &policy);
	start_direction(flow, SIDE_SERVER, 0, generation, &policy);
	doubt_port(flow);
	add_share(flow, 1);
	flow->state = id << FLOW_STATE_BITS;
	return OUTCOME_PAIRED;
}

/*
 * Notes where a socket is in both streams. It needs the socket's lock. If the flow joins again,
 * all that was redirected has been read.
 */
static __always_inline void note_positions(const struct tcp_sock *tp, struct flow *flow, __u32 side)
{
	struct sending *dir = &flow->side[side & 1].sending;
	struct receiving *reader = &flow->side[side & 1].receiving;

	dir->tcp_bytes = write_position(tp, side);
	dir->missed = 0;
	dir->queued_before = 0;
	dir->queued_since = 0;
	reader->paid = 0;
	reader->unpaid = 0;
	flow->side[(side ^ 1) & 1].receiving.began = sent(dir);
	dir->last_seq = tp->write_seq;
	dir->drained_seq = tp->write_seq - 1; /* not known to be drained */
	reader->read_bytes = read_position(tp) + flow->side[(side ^ 1) & 1].sending.shortcut_bytes;
	flow->side[(side ^ 1) & 1].sending.grown = reader->read_bytes;
}

/*
 * Lets nothing be redirected to a socket before it has read a few times. A thread may still
 * be on its way into the recv of a plain socket, which would return later TCP bytes before
 * redirected ones. The last of these reads begins after this. The first of them starts the
 * count: see count_anew.
 */
static __always_inline void await_reads(struct flow *flow, __u32 side)
{
	struct receiving *reader = &flow->side[side & 1].receiving;

	reader->reads_needed = reader->reads + READS_BEFORE_REDIRECT;
	__sync_fetch_and_or(&reader->state, READ_ANEW);
}

/* Puts one socket of a flow that is being made into the SOCKHASH; see join. */
static __always_inline enum outcome insert(struct sock_common *skc, struct tcp_sock *tp,
					   struct join_entry *it, struct flow *flow)
{
	const struct settings *set = get_settings();
	struct sk_flow blank_self = {}, *self;
	__u32 side = it->side & 1;
	__u64 cookie = it->cookie[side];
	int err;

	it->step = JOIN_INSERTED; /* leave undoes all that follows */
	self = bpf_sk_storage_get(&sk_flows, skc, &blank_self, BPF_SK_STORAGE_GET_F_CREATE);
	if (!self)
		return OUTCOME_NO_MEMORY;
	note_positions(tp, flow, side);
	flow->sock[side] = (__u64)tp;
	self->side = side;
	self->flow = it->flow;
	it->callbacks = tp->bpf_sock_ops_cb_flags;
	if (!(set && set->no_callbacks) && set_callbacks(skc, it->callbacks | CALLBACKS))
		return OUTCOME_CALLBACKS;
	/* An agent that was killed may have left it there. It would count as another product's. */
	bpf_map_delete_elem(&sockets, &cookie);
	err = bpf_map_update_elem(&sockets, &cookie, skc, BPF_NOEXIST);
	return err ? join_failure(err) : OUTCOME_PAIRED;
}

/*
 * Undoes insert. Nothing was redirected yet, so nothing is lost. The first socket to leave
 * deletes the flow, as in mark_gone, and the other one follows.
 */
static __always_inline void leave(struct sock_common *skc, const struct join_entry *it)
{
	__u64 cookie = it->cookie[it->side & 1], peer = it->cookie[(it->side ^ 1) & 1];
	struct join_entry *other;

	if (it->step != JOIN_START) {
		bpf_map_delete_elem(&sockets, &cookie);
		bpf_sk_storage_delete(&sk_flows, skc);
		set_callbacks(skc, it->callbacks);
		end_unjoined(it->flow, it->side);
	}
	other = bpf_map_lookup_elem(&joining, &peer);
	if (other && other->step == JOIN_START)
		bpf_map_delete_elem(&joining, &peer);
	else if (other)
		other->step = JOIN_LEAVE;
	bpf_map_delete_elem(&joining, &cookie);
}

/* Lets deliver redirect, once both sockets are ready. */
static __always_inline bool complete(struct flow *flow, const struct join_entry *it)
{
	__u64 state = it->flow << FLOW_STATE_BITS;

	await_reads(flow, SIDE_CLIENT);
	await_reads(flow, SIDE_SERVER);
	return __sync_val_compare_and_swap(&flow->state, state, state | FLOW_JOINED) == state;
}

/* Returns true if a blocking socket may join. Without callbacks, nothing evicts it in time. */
static __always_inline bool may_block(const struct settings *set, const struct join_entry *it)
{
	struct policy policy = {};

	look_up_policy(it->netns[SIDE_CLIENT], it->netns[SIDE_SERVER], it->server_port, &policy);
	return allows_blocking(set, policy.blocking) && !set->no_callbacks;
}

/*
 * The next step of a socket, which needs its lock. There are some milliseconds between two.
 *
 * 1. JOIN_START: the socket enters the SOCKHASH. The flow is not joined, so that nothing is
 *    redirected.
 * 2. JOIN_INSERTED: the socket is ready if no thread sleeps that was on its way into recv.
 * 3. JOIN_READY: once the peer is ready, too, the flow has joined.
 */
static __always_inline enum outcome next_step(struct sock_common *skc, struct tcp_sock *tp,
					      struct join_entry *it)
{
	const struct settings *set = get_settings();
	struct join_entry *other;
	struct flow *flow;
	enum outcome outcome;
	__u64 peer;

	if (!set || it->step >= JOIN_GIVE_UP || !may_join(tp))
		return OUTCOME_JOIN_ENDED;
	if (!tp->inet_conn.icsk_inet.sk.sk_socket)
		return OUTCOME_MAX; /* not accepted yet */
	if (is_blocking(tp) && !may_block(set, it))
		return it->side == SIDE_CLIENT ? OUTCOME_BLOCKING_CLIENT : OUTCOME_BLOCKING_SERVER;
	/* Those of blocking sockets sleep most of the time: see await_reads. */
	if (!is_blocking(tp) && has_sleeper(tp))
		return OUTCOME_MAX;
	flow = flow_by_id(it->flow);
	if (it->step == JOIN_START) {
		if (flow && flow->watched)
			return OUTCOME_JOIN_ENDED; /* it joins by watch.h */
		if (!flow && it->side == SIDE_CLIENT) {
			outcome = make_flow(it);
			if (outcome != OUTCOME_PAIRED)
				return outcome;
			flow = flow_by_id(it->flow);
		}
		if (!flow)
			return OUTCOME_MAX; /* the client comes first */
	}
	if (!flow || flow->state != it->flow << FLOW_STATE_BITS)
		return OUTCOME_JOIN_ENDED;
	if (it->step == JOIN_START) {
		outcome = insert(skc, tp, it, flow);
		return outcome == OUTCOME_PAIRED ? OUTCOME_MAX : outcome;
	}
	it->step = JOIN_READY;
	peer = it->cookie[(it->side ^ 1) & 1];
	other = bpf_map_lookup_elem(&joining, &peer);
	if (!other)
		return OUTCOME_JOIN_ENDED;
	if (other->step != JOIN_READY)
		return OUTCOME_MAX;
	if (!complete(flow, it))
		return OUTCOME_JOIN_ENDED;
	return OUTCOME_JOINED;
}

/* Evicts a socket that has no callbacks: see on_ack. */
static __always_inline enum outcome evict_late(const struct join_entry *it)
{
	__u64 evicted = it->side == SIDE_CLIENT ? FLOW_CLIENT_EVICTED : FLOW_SERVER_EVICTED;
	struct flow *flow = flow_by_id(it->flow);

	if (flow)
		evict(flow, it->side & 1);
	return !flow || flow->state & evicted ? OUTCOME_SOCKET_EVICTED : OUTCOME_MAX;
}

/*
 * Notes the end of a socket that has no callbacks, in place of on_close: before Linux 6.12
 * an iterator cannot ask for them. A socket that connects or listens once more leaves the
 * SOCKHASH by on_reuse, whose callback comes to all. Attached on such kernels only.
 */
SEC("tp_btf/inet_sock_set_state")
int end_late(__u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	struct sk_flow *self;
	struct tcp_sock *tp;

	if ((int)ctx[2] != TCP_CLOSE)
		return 0;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp && !(tp->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG))
		mark_gone(self, sk);
	return 0;
}

SEC("iter/tcp")
int join_sockets(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	enum outcome outcome;
	struct tcp_sock *tp;
	struct join_entry *it;
	__u64 cookie, peer;

	if (!skc)
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return 0;
	cookie = bpf_get_socket_cookie(skc);
	it = bpf_map_lookup_elem(&joining, &cookie);
	if (!it)
		return 0;
	it->visits++;
	outcome = it->step == JOIN_EVICT ? evict_late(it) : next_step(skc, tp, it);
	switch (outcome) {
	case OUTCOME_MAX: /* the next time */
		return 0;
	case OUTCOME_SOCKET_EVICTED: /* evict has counted it */
		bpf_map_delete_elem(&joining, &cookie);
		return 0;
	case OUTCOME_JOINED:
		peer = it->cookie[(it->side ^ 1) & 1];
		bpf_map_delete_elem(&joining, &peer);
		bpf_map_delete_elem(&joining, &cookie);
		break;
	default:
		if (it->step == JOIN_LEAVE)
			outcome = OUTCOME_MAX; /* counted for its peer */
		leave(skc, it);
	}
	count(outcome, 0);
	return 0;
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Deliver: which way a message goes. */
#ifndef PODSHUNT_DELIVER_H
#define PODSHUNT_DELIVER_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "blocking.h"
#include "compare.h"
#include "flow.h"
#include "kernel.h"
#include "leave.h"
#include "limits.h"
#include "maps.h"
#include "piggyback.h"
#include "trial.h"
#include "unsupported.h"

#define SEND_SHUTDOWN 2 /* include/net/sock.h */

/*
 * Returns true if the peer has read all bytes of TCP. The peer's memory may be freed and
 * used for another socket while this reads it. Every socket has a cookie of its own, so the
 * cookie is read last: if it is the peer's, what was read before it was the peer's, too.
 */
static __always_inline bool peer_drained(const struct flow *flow, __u32 peer, __u32 write_seq)
{
	struct tcp_sock *tp = (struct tcp_sock *)flow->sock[peer];
	__u32 copied_seq;
	__s64 cookie;

	if (read_field(&copied_seq, tp, copied_seq) ||
	    read_field(&cookie, tp, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter))
		return false;
	return copied_seq == write_seq && (__u64)cookie == flow->cookie[peer];
}

/*
 * Returns why the peer's socket cannot take a redirect, or OUTCOME_SHORTCUT if it can. The
 * caller remembers the port for it, so the memory must be the peer's own: see peer_drained.
 */
static __always_inline enum outcome peer_unsupported(const struct flow *flow, __u32 peer)
{
	struct tcp_sock *tp = (struct tcp_sock *)flow->sock[peer];
	__s64 cookie;
	const struct tcp_ulp_ops *ulp;
	int lowat;

	if (read_field(&ulp, tp, inet_conn.icsk_ulp_ops) ||
	    read_field(&lowat, tp, inet_conn.icsk_inet.sk.sk_rcvlowat))
		return OUTCOME_PEER_GONE;
	if (!ulp && lowat <= 1)
		return OUTCOME_SHORTCUT;
	if (bpf_core_read(&cookie, sizeof(cookie),
			  &tp->inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter) ||
	    (__u64)cookie != flow->cookie[peer])
		return OUTCOME_PEER_GONE;
	return ulp ? OUTCOME_ULP : OUTCOME_LOWAT;
}

static __always_inline void set_verdict(struct sending *dir, const struct policy *policy)
{
	dir->verdict = policy->verdict;
	dir->policy_reason = policy->reason;
	dir->blocking = policy->blocking;
}

/* Looks up the verdict. If the pod's own NAT has changed the port, both ports must be allowed. */
static __always_inline void ask_policy(const struct flow *flow, struct policy *policy)
{
	__u64 client = flow->netns[SIDE_CLIENT], server = flow->netns[SIDE_SERVER];

	if (flow->port_in_doubt) {
		look_up_policy(client, server, flow->orig_dst_port, policy);
		if (policy->verdict != VERDICT_ALLOW)
			return;
		policy->verdict = VERDICT_REFUSE;
	}
	look_up_policy(client, server, flow->server_port, policy);
}

/* Looks up the verdict again if the policy has changed. It needs the lock of the side's socket. */
static __always_inline void refresh_verdict(struct flow *flow, __u32 own,
					    const struct settings *set)
{
	__u32 generation = *(volatile __u32 *)&set->generation;
	struct sending *dir = &flow->side[own & 1].sending;
	struct policy policy = {};

	if (dir->generation == generation)
		return;
	ask_policy(flow, &policy);
	dir->generation = generation;
	set_verdict(dir, &policy);
}

/*
 * Returns true if the peer has nothing unread, whatever observe has counted. The
 * kernel skips observe on a CPU where another thread was preempted inside observe;
 * a read that is missed so looks like unread bytes for ever. Nothing is unread once
 * TCP's bytes have all been copied, which the caller has checked, and the queue of
 * redirected messages is empty. In non-blocking mode no recv holds bytes while it
 * waits for more, and the guard reports bytes that splice has taken. A read that
 * has just ended may be counted after this: decide then sees more read than sent.
 */
static __always_inline bool recount(struct flow *flow, __u32 peer, const struct settings *set)
{
	struct sock *sk = (struct sock *)flow->sock[peer];
	struct socket *socket;
	struct list_head *next;
	struct sk_psock *psock;
	struct file *file;
	unsigned int flags;
	void *user_data;
	__s64 cookie;

	if (!set->splice_seen || bpf_core_read(&socket, sizeof(socket), &sk->sk_socket) ||
	    bpf_core_read(&file, sizeof(file), &socket->file) ||
	    bpf_core_read(&flags, sizeof(flags), &file->f_flags) || !(flags & O_NONBLOCK))
		return false;
	if (bpf_core_read(&user_data, sizeof(user_data), &sk->sk_user_data))
		return false;
	/* The lowest bits are flags (SK_USER_DATA_PTRMASK). */
	psock = (struct sk_psock *)((__u64)user_data & ~7ULL);
	if (!psock || bpf_core_read(&next, sizeof(next), &psock->ingress_msg.next) ||
	    (void *)next != (void *)&psock->ingress_msg)
		return false;
	if (bpf_core_read(&cookie, sizeof(cookie), &sk->__sk_common.skc_cookie.counter) ||
	    (__u64)cookie != flow->cookie[peer])
		return false;
	/* Splice may have taken the bytes since the caller looked; its guard marks first. */
	return !(__sync_fetch_and_or((__u32 *)&flow->side[peer & 1].receiving.state, 0) &
		 READ_UNSUPPORTED);
}

/* Returns true if this socket has something to read, as far as is counted. */
static __always_inline bool has_unread(const struct flow *flow, __u32 own)
{
	const struct sending *other = &flow->side[(own ^ 1) & 1].sending;

	return sent(other) > flow->side[own & 1].receiving.read_bytes + other->missed;
}

/*
 * The state machine of one direction. Redirected data is read before TCP data,
 * so the order of bytes rests on one condition: every byte that was ever written
 * to TCP has been read. write_seq cannot move while we hold the sender's lock,
 * and the peer's copied_seq can only grow up to it: once equal they stay equal
 * until write_seq moves, however it is moved.
 *
 * To start redirecting, all these bytes must also have been returned by
 * finished recv calls. A recv that has taken bytes but still waits for more
 * (MSG_WAITALL, SO_RCVLOWAT) waits for TCP and would not see redirected data;
 * neither would one that takes bytes by splice.
 */
static __always_inline enum outcome decide(struct flow *flow, __u32 own, const struct settings *set,
					   const struct tcp_sock *tp, __u32 size, __u64 now,
					   __s64 **charged, __u32 *held)
{
	__u32 peer = own ^ 1, write_seq = tp->write_seq;
	struct sending *dir = &flow->side[own & 1].sending;
	const struct receiving *reader = &flow->side[peer & 1].receiving;
	__s64 unread, cost;
	__u64 end, read;
	__u32 limit;
	bool trial;

	if (!(flow->state & FLOW_SERVER_JOINED))
		return OUTCOME_PEER_MISSING;
	dir->tcp_bytes += write_seq - dir->last_seq;
	dir->last_seq = write_seq;
	end = sent(dir);
	read = *(volatile __u64 *)&reader->read_bytes + dir->missed;
	if (read > end) { /* recount was wrong, or the count when the flow joined late */
		dir->missed -= read - end;
		read = end;
	}
	unread = end - read;
	/* On trial a burst would look larger for ever than all that the receiver has taken. */
	if (unread && !dir->shortcut && peer_drained(flow, peer & 1, write_seq) &&
	    recount(flow, peer & 1, set)) {
		dir->missed += unread;
		read = end;
		unread = 0;
	}
	count_queued(dir, end, read);
	trial = on_trial(dir, &flow->side[own & 1].receiving, reader, set, unread, size);

	/* Before all that follows, since should_evict needs it, too. */
	refresh_verdict(flow, own, set);
	if (flow->state & (FLOW_CLIENT_GONE | FLOW_SERVER_GONE))
		return OUTCOME_PEER_GONE;
	if (dir->leaves)
		return dir->leaves;
	if (flow->state & FLOW_ANY_EVICTING)
		return OUTCOME_EVICTED;
	if (!set->redirect)
		return OUTCOME_SWITCHED_OFF;
	if (set->untraced)
		return OUTCOME_UNTRACED;
	if (set->lease_ns && now > set->lease_ns)
		return OUTCOME_STALE;
	if (dir->verdict != VERDICT_ALLOW)
		return OUTCOME_NOT_ALLOWED;
	if (tp->inet_conn.icsk_inet.sk.sk_shutdown & SEND_SHUTDOWN)
		return OUTCOME_SHUT_DOWN;
	if (tp->inet_conn.icsk_ulp_ops)
		return OUTCOME_ULP;
	if (tp->inet_conn.icsk_inet.sk.__sk_common.skc_flags &
	    1UL << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY))
		return OUTCOME_ZEROCOPY;
	if (reader->state & READ_UNSUPPORTED)
		return OUTCOME_UNSUPPORTED;
	if (reader->blocking_reader && !allows_blocking(set, dir->blocking))
		return OUTCOME_EVICTED;
	if (!(reader->state & READ_SEEN) || reader->reads < reader->reads_needed)
		return OUTCOME_NOT_SEEN;
	if (trial)
		return OUTCOME_TRIAL;
	if (!dir->shortcut && reader->drains < set->trial_drains && edge_triggered(flow, peer & 1))
		return OUTCOME_EDGE;
	if (set->refresh_ns && now - dir->last_tcp_ns >= set->refresh_ns)
		return OUTCOME_REFRESH;
	if (carries_ack(flow, own, tp))
		return OUTCOME_PIGGYBACK;
	if (take_turns(flow, own, set, tp, size, unread > 0 || has_unread(flow, own)))
		return OUTCOME_COMPARED;
	if (write_seq != dir->drained_seq) {
		if (!peer_drained(flow, peer & 1, write_seq))
			return OUTCOME_DRAINING;
		dir->drained_seq = write_seq;
	}
	if (!dir->shortcut) {
		if (unread)
			return OUTCOME_UNOBSERVED;
		grow(dir, read, set);
	}
	limit = dir->limit < set->budget ? dir->limit : set->budget;
	cost = unread + size + MESSAGE_COST * ((__s64)dir->queued_before + dir->queued_since + 1);
	if (cost > limit && unread && recount(flow, peer & 1, set)) {
		dir->missed += unread;
		unread = 0;
		count_queued(dir, end, end);
		cost = size + MESSAGE_COST;
	}
	if (cost > limit) {
		dir->flags |= SENDING_SPILLED;
		return OUTCOME_BUDGET;
	}
	if (!has_room(flow, peer & 1, dir, tp, size))
		return OUTCOME_RECEIVE_BUFFER;
	*held = cost;
	*charged = bpf_map_lookup_elem(&charges, &flow->netns[peer & 1]);
	if (!*charged || **charged + cost - (__u32)dir->charge > (__s64)set->pod_budget)
		return OUTCOME_POD_BUDGET;
	if (memory_pressure(tp))
		return OUTCOME_MEMORY;
	return peer_unsupported(flow, peer & 1);
}

/* Remembers the port for an option that a program may set at any time. */
static __always_inline void remember_option(struct flow *flow, __u32 own, enum outcome outcome,
					    const struct tcp_sock *tp)
{
	switch (outcome) {
	case OUTCOME_ULP:
		remember(flow, tp->inet_conn.icsk_ulp_ops ? own : own ^ 1, UNSUPPORTED_ULP);
		break;
	case OUTCOME_ZEROCOPY:
		remember(flow, own, UNSUPPORTED_ZEROCOPY);
		break;
	case OUTCOME_LOWAT:
		remember(flow, own ^ 1, UNSUPPORTED_LOWAT);
		break;
	default:
		break;
	}
}

/* on_ack evicts, if the socket has callbacks; else the agent, which looks at this counter. */
static __always_inline void ask_to_evict(const struct settings *set)
{
	if (set->no_callbacks)
		count(OUTCOME_EVICT_DUE, 0);
}

SEC("sk_msg")
int deliver(struct sk_msg_md *msg)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = msg->sk;
	enum outcome outcome = OUTCOME_UNKNOWN_SOCKET;
	__u32 size = msg->size;
	__s64 *charged = NULL;
	struct sending *dir;
	struct sk_flow *self;
	struct tcp_sock *tp;
	struct flow *flow;
	__u32 own, held = 0;
	__u64 now;

	if (!sk || !set)
		goto pass;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
		goto pass;
	own = self->side & 1;
	flow = flow_of(self, sk);
	if (!flow)
		goto pass;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		goto pass;

	dir = &flow->side[own].sending;
	now = bpf_ktime_get_coarse_ns();
	/* A full barrier: either evict sees busy, or decide sees that a socket is to be evicted. */
	__sync_fetch_and_or(&dir->busy, 1);
	outcome = decide(flow, own, set, tp, size, now, &charged, &held);
	/* SK_DROP: the peer has left the SOCKHASH, and TCP answers as always. */
	if (outcome == OUTCOME_SHORTCUT &&
	    bpf_msg_redirect_hash(msg, &sockets, &flow->cookie[own ^ 1], BPF_F_INGRESS) != SK_PASS)
		outcome = OUTCOME_REDIRECT_REFUSED;
	dir->last_size = size;
	if (outcome == OUTCOME_SHORTCUT) {
		dir->shortcut_bytes += size;
		dir->redirect_end = sent(dir);
		dir->queued_since++;
		dir->switches += !dir->shortcut;
		dir->shortcut = true;
		charge(dir, charged, held);
	} else {
		dir->reason = outcome;
		dir->shortcut = false;
		dir->last_tcp_ns = now;
		measure_cost(dir, flow, own ^ 1);
		if (outcome == OUTCOME_RECEIVE_BUFFER)
			flow->side[own ^ 1].receiving.began = sent(dir);
		remember_option(flow, own, outcome, tp);
	}
	if (outcome == OUTCOME_NOT_ALLOWED ? leaves_refused(flow, dir, set)
					   : weigh(flow, own, set, tp, size, outcome, held))
		ask_to_evict(set);
	if (!(dir->flags & SENDING_LEARNED) &&
	    flow->side[own ^ 1].receiving.reads >= set->trial_reads && set->trial_bytes) {
		dir->flags |= SENDING_LEARNED;
		learn(flow, own, set);
	}
	if (!dir->evict && should_evict(&flow->side[own], set, tp)) {
		dir->evict = true;
		ask_to_evict(set);
		if (!allows_blocking(set, dir->blocking))
			remember(flow, own, UNSUPPORTED_BLOCKING);
	}
	if (!allows_blocking(set, dir->blocking) && flow->side[own ^ 1].receiving.blocking_reader &&
	    !dir->evict_peer) {
		dir->evict_peer = true;
		ask_to_evict(set);
		remember(flow, own ^ 1, UNSUPPORTED_BLOCKING);
	}
	__sync_fetch_and_and(&dir->busy, 0);
pass:
	count(outcome, size);
	return SK_PASS;
}

#endif

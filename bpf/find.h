/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Find: lists the sockets of open connections. The agent runs such an iterator in the network
 * namespace of a pod. The kernel calls it for each TCP socket there, and holds the socket's
 * lock meanwhile (bpf_iter_tcp_seq_show).
 */
#ifndef PODSHUNT_FIND_H
#define PODSHUNT_FIND_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "flow.h"
#include "joining.h"
#include "kernel.h"
#include "lifetime.h"
#include "maps.h"
#include "pairing.h"

static __always_inline bool may_join(const struct tcp_sock *tp)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;

	return sk->__sk_common.skc_state == TCP_ESTABLISHED && !kernel_socket(sk) &&
	       !tp->inet_conn.icsk_ulp_ops &&
	       !(bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp) &&
	       !BPF_CORE_READ_BITFIELD(tp, repair);
}

/*
 * Where the two streams of a connection began: a client's own one with its SYN, all others
 * with a byte. Both ends know it, since TCP counts the bytes: with the client's snd_una at
 * 5001, of which 1000 are acknowledged bytes (its SYN counts as one), its stream began at 4001.
 */
static __always_inline __u32 sends_from(const struct tcp_sock *tp)
{
	return tp->snd_una - (__u32)tp->bytes_acked;
}

static __always_inline __u32 receives_from(const struct tcp_sock *tp)
{
	return tp->rcv_nxt - (__u32)tp->bytes_received;
}

/* Returns true if the socket belongs to a flow, or to one that is being made. */
static __always_inline bool has_flow(const struct sk_flow *self, const void *sk)
{
	struct flow *flow = self && self->flow ? flow_of(self, sk) : NULL;

	/* One that nobody has joined or watches was left behind by an agent that was killed. */
	return flow && (flow->watched || flow->state & FLOW_JOINED);
}

/* The addresses of a socket, as in a sock_ops context. */
static __always_inline void socket_addresses(const struct sock *sk, struct open_socket *found)
{
	const struct sock_common *skc = &sk->__sk_common;

	if (skc->skc_family == AF_INET) {
		found->local_addr[2] = bpf_htonl(0xffff);
		found->local_addr[3] = skc->skc_rcv_saddr;
		found->remote_addr[2] = bpf_htonl(0xffff);
		found->remote_addr[3] = skc->skc_daddr;
	} else {
		BPF_CORE_READ_INTO(&found->local_addr, skc, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&found->remote_addr, skc, skc_v6_daddr);
	}
	found->local_port = skc->skc_num;
	found->remote_port = bpf_ntohs(skc->skc_dport);
}

/* Lists the sockets that may join. */
SEC("iter/tcp")
int find_sockets(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct open_socket found = {};
	struct sk_flow *self;
	struct tcp_sock *tp;

	if (!skc)
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp || !may_join(tp))
		return 0;
	self = bpf_sk_storage_get(&sk_flows, skc, NULL, 0);
	if (has_flow(self, tp) || has_options(self))
		return 0;
	found.cookie = bpf_get_socket_cookie(skc);
	found.netns = skc->skc_net.net->net_cookie;
	found.sends_from = sends_from(tp);
	found.receives_from = receives_from(tp);
	socket_addresses(&tp->inet_conn.icsk_inet.sk, &found);
	bpf_seq_write(ctx->meta->seq, &found, sizeof(found));
	return 0;
}

#endif

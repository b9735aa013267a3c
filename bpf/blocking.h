/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Blocking: a socket without O_NONBLOCK, whose recv may sleep in the kernel. In the SOCKHASH such
 * a recv can return EAGAIN, so blocking sockets are not paired, or are evicted (lifetime.h).
 */
#ifndef PODSHUNT_BLOCKING_H
#define PODSHUNT_BLOCKING_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"
#include "learned.h"
#include "maps.h"
#include "unsupported.h"

#define O_NONBLOCK 00004000 /* include/uapi/asm-generic/fcntl.h */

/* A NULL sk_socket or file reads as 0, so a kernel socket counts as blocking. No pod owns one. */
static __always_inline bool is_blocking(const struct tcp_sock *tp)
{
	return !(tp->inet_conn.icsk_inet.sk.sk_socket->file->f_flags & O_NONBLOCK);
}

/* Returns true if blocking sockets may take part, on the whole node or by the policy of a pair. */
static __always_inline bool allows_blocking(const struct settings *set, __u32 of_policy)
{
	return set->allow_blocking || of_policy;
}

/*
 * Returns true if the sender's socket has to leave the SOCKHASH. A recv that
 * sleeps in tcp_bpf_recvmsg returns EAGAIN when anything but data wakes it
 * (tcp_msg_wait_data). Seen on 6.18.44 after a signal, after a reset, with a
 * full receive buffer, and when TCP's send buffer drains after it was full. So
 * blocking sockets are kept out, unless the user accepts the hazard. Even then
 * two cases are avoided: a socket that one thread reads and another one writes
 * is evicted here, and one whose send buffer was full is evicted by on_ack.
 */
static __always_inline bool should_evict(const struct side *own, const struct settings *set,
					 const struct tcp_sock *tp)
{
	__u32 reader = own->receiving.blocking_reader;

	return is_blocking(tp) && (!allows_blocking(set, own->sending.blocking) ||
				   (reader && reader != (__u32)bpf_get_current_pid_tgid()));
}

/*
 * Returns true if the listener is in blocking mode: most such programs also read in it.
 * ctx->sk is NULL here, since the kernel's sock is a request; that leads to the listener.
 */
static __always_inline bool blocking_listener(const struct bpf_sock_ops *ctx)
{
	const struct bpf_sock_ops_kern *kern = (const struct bpf_sock_ops_kern *)ctx;
	struct sock *request, *listener;
	struct socket *socket;
	struct file *file;
	unsigned int flags;

	return !bpf_core_read(&request, sizeof(request), &kern->sk) &&
	       !bpf_core_read(&listener, sizeof(listener), &request->__sk_common.skc_listener) &&
	       !bpf_core_read(&socket, sizeof(socket), &listener->sk_socket) &&
	       !bpf_core_read(&file, sizeof(file), &socket->file) &&
	       !bpf_core_read(&flags, sizeof(flags), &file->f_flags) && !(flags & O_NONBLOCK);
}

/* Watches a server's socket that is not paired: learn_mode notes its mode once it is accepted. */
static __always_inline void watch_mode(struct bpf_sock_ops *ctx)
{
	struct sk_flow self = { .side = SIDE_SERVER };
	struct bpf_sock *sk = ctx->sk;

	if (sk && bpf_sk_storage_get(&sk_flows, sk, &self, BPF_SK_STORAGE_GET_F_CREATE))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
}

/* Notes for the port which mode a watched socket has. on_listen forgets it. */
static __always_inline void learn_mode(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct settings *set = get_settings();
	struct learned_value *known;
	struct tcp_sock *tp;

	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp || !set || !tp->inet_conn.icsk_inet.sk.sk_socket)
		return; /* not accepted yet */
	if (is_blocking(tp)) {
		remember_port(0, netns, ctx->local_port, UNSUPPORTED_BLOCKING);
	} else {
		known = get_learned(0, netns, ctx->local_port, set->learned_share);
		if (known)
			known->non_blocking = true;
	}
	bpf_sk_storage_delete(&sk_flows, sk);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTT_CB_FLAG);
}

#endif

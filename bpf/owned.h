/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Owned: sockets that belong to a part of the kernel, and are not paired. */
#ifndef PODSHUNT_OWNED_H
#define PODSHUNT_OWNED_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"
#include "maps.h"
#include "unsupported.h"

#define TCP_SYN_RECV 3

/*
 * Returns true for a socket that a part of the kernel has made for itself. AF_SMC,
 * for example, writes sk_user_data of such a socket after accept, where the
 * SOCKHASH keeps its own pointer (WARN, and an endless loop in newer kernels).
 */
static __always_inline bool kernel_socket(const struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD(sk, sk_kern_sock);
}

/*
 * Marks the ports of MPTCP listeners. Hazard: kernels without fbade4bd08ba
 * corrupt memory when a plain TCP connection to such a listener is accepted while
 * its socket is in a SOCKHASH. The listener's TCP socket is a kernel socket, and
 * so is its child at first. accept may run before pair_server, and clears that
 * mark of the child before it waits for the child's lock (mptcp_stream_accept).
 * So this looks at the child where it is made (inet_csk_clone_lock).
 */
SEC("tp_btf/inet_sock_set_state")
int keep_mptcp_out(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	__u64 netns;

	if ((int)ctx[2] != TCP_SYN_RECV || !kernel_socket(sk))
		return 0;
	netns = sk->__sk_common.skc_net.net->net_cookie;
	if (enrolled(netns))
		remember_port(0, netns, sk->__sk_common.skc_num, UNSUPPORTED_MPTCP_LISTENER);
	return 0;
}

/*
 * Returns true if the server's socket belongs to a part of the kernel. A child of an
 * MPTCP listener that has fallen back to plain TCP does not: it has the sk_data_ready of
 * a plain socket again (mptcp_subflow_tcp_fallback), which the client's socket shows.
 */
static __always_inline bool owned(const struct tcp_sock *tp, const struct flow *flow)
{
	const struct sock *client = (const struct sock *)flow->sock[SIDE_CLIENT];
	void *plain;

	return kernel_socket(&tp->inet_conn.icsk_inet.sk) &&
	       (bpf_core_read(&plain, sizeof(plain), &client->sk_data_ready) ||
		plain != tp->inet_conn.icsk_inet.sk.sk_data_ready);
}

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/* Addresses and ports of a sock_ops context, and the keys that are made of them. */
#ifndef PODSHUNT_ADDRESS_H
#define PODSHUNT_ADDRESS_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"

#define AF_INET 2
#define AF_INET6 10

/*
 * The two families' last words pass through barrier_var: clang 19 would merge
 * the loads of both branches into one from a computed offset, and the verifier
 * rejects that for a context.
 */
static __always_inline void local_address(const struct bpf_sock_ops *ctx, __be32 addr[4])
{
	__be32 last;

	if (ctx->family == AF_INET) {
		addr[0] = 0;
		addr[1] = 0;
		addr[2] = bpf_htonl(0xffff);
		last = ctx->local_ip4;
		barrier_var(last);
	} else {
		addr[0] = ctx->local_ip6[0];
		addr[1] = ctx->local_ip6[1];
		addr[2] = ctx->local_ip6[2];
		last = ctx->local_ip6[3];
	}
	addr[3] = last;
}

static __always_inline void remote_address(const struct bpf_sock_ops *ctx, __be32 addr[4])
{
	__be32 last;

	if (ctx->family == AF_INET) {
		addr[0] = 0;
		addr[1] = 0;
		addr[2] = bpf_htonl(0xffff);
		last = ctx->remote_ip4;
		barrier_var(last);
	} else {
		addr[0] = ctx->remote_ip6[0];
		addr[1] = ctx->remote_ip6[1];
		addr[2] = ctx->remote_ip6[2];
		last = ctx->remote_ip6[3];
	}
	addr[3] = last;
}

static __always_inline __u16 remote_port(const struct bpf_sock_ops *ctx)
{
	return bpf_ntohl(ctx->remote_port);
}

/* Loopback addresses are the same in every pod. */
static __always_inline bool is_loopback(const __be32 addr[4])
{
	if (addr[0] || addr[1])
		return false;
	if (addr[2] == bpf_htonl(0xffff))
		return (addr[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return addr[2] == 0 && addr[3] == bpf_htonl(1);
}

static __always_inline bool same_address(const __be32 a[4], const __be32 b[4])
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline void complete_client_key(struct client_key *key, __u16 port, __u64 netns)
{
	key->port = port;
	key->reserved = 0;
	key->netns = is_loopback(key->addr) ? netns : 0;
}

static __always_inline void fill_pending_key(struct pending_key *key, __u32 client_seq,
					     __u32 server_seq, const __be32 client_addr[4],
					     __u16 client_port)
{
	key->client_seq = client_seq;
	key->server_seq = server_seq;
	__builtin_memcpy(key->addr, client_addr, sizeof(key->addr));
	key->port = client_port;
	key->reserved = 0;
}

#endif

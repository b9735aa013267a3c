//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "flow.h"
#include "kernel.h"
#include "misfit.h"

#define AF_INET 2
#define AF_INET6 10
#define O_NONBLOCK 00004000 /* include/uapi/asm-generic/fcntl.h */
#define SOCK_NOSPACE (1UL << 2) /* include/linux/net.h */
#define SEND_SHUTDOWN 2 /* include/net/sock.h */
#define TCP_ESTABLISHED 1 /* enum in include/net/tcp_states.h */
#define TCP_SYN_RECV 3
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8

/* Defaults; the loader raises or lowers them. */
#define PODS_MAX 1024
#define POLICY_MAX 131072
#define HANDSHAKES_MAX 16384

/* Enrolled pods by netns cookie. Agent: writes. Full: the agent cannot enrol, the pod stays on TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u64);
	__type(value, __u32);
} pods SEC(".maps");

/* What the agent allows. Agent: writes. Full, or no entry: TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, POLICY_MAX);
	__type(key, struct policy_key);
	__type(value, struct policy);
} policies SEC(".maps");

/* One entry, read for every message. Agent: writes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} control SEC(".maps");

/*
 * A SYN reached a listener of an enrolled pod. track: writes, reads, deletes
 * at the end of the handshake; the agent sweeps what never ended. Full: the
 * oldest goes, and its connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, HANDSHAKES_MAX);
	__type(key, struct client_key);
	__type(value, struct hint);
} hints SEC(".maps");

/* A client that found its hint waits for the server's socket. As hints. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, HANDSHAKES_MAX);
	__type(key, struct handshake_key);
	__type(value, struct handshake);
} handshakes SEC(".maps");

/* Both sockets of every pair by socket cookie. The kernel deletes on close. Full: TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2 * PAIRS_MAX);
	__type(key, __u64);
	__type(value, __u64);
} sockets SEC(".maps");

/* Every decision, by enum outcome. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, OUTCOME_MAX);
	__type(key, enum outcome);
	__type(value, struct count);
} outcomes SEC(".maps");

/* Keep the types in the BTF that bpf2go reads. */
const enum pair_state *pair_state_type __attribute__((unused));
const enum misfit_reason *misfit_reason_type __attribute__((unused));

/* What a new pair starts from: the record is too large for the stack. */
static const struct pair blank;

static __always_inline void count(enum outcome outcome, __u64 bytes)
{
	struct count *count = bpf_map_lookup_elem(&outcomes, &outcome);

	if (count) {
		count->number++;
		count->bytes += bytes;
	}
}

static __always_inline struct settings *get_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline void look_up_policy(__u64 client, __u64 server, __u16 port,
					   struct policy *policy)
{
	struct policy_key key = {
		.prefixlen = POLICY_PREFIX_PORT,
		.client = { (__u32)client, client >> 32 },
		.server = { (__u32)server, server >> 32 },
		.port = bpf_htons(port),
	};
	struct policy *found = bpf_map_lookup_elem(&policies, &key);

	if (found)
		*policy = *found;
}

/*
 * deliver: which way a message goes.
 */

#define PAIR_ANY_LEAVES (PAIR_CLIENT_LEAVES | PAIR_SERVER_LEAVES)

/* The peer's memory may have been freed and used again: the cookie read last says for whom. */
static __always_inline bool peer_drained(const struct pair *pair, __u32 peer, __u32 write_seq)
{
	struct tcp_sock *tp = (struct tcp_sock *)pair->sock[peer];
	__u32 copied_seq;
	__s64 cookie;

	if (bpf_core_read(&copied_seq, sizeof(copied_seq), &tp->copied_seq) ||
	    bpf_core_read(&cookie, sizeof(cookie),
			  &tp->inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter))
		return false;
	return copied_seq == write_seq && (__u64)cookie == pair->cookie[peer];
}

/* OUTCOME_SHORTCUT: none. What is found is remembered, so it has to be the peer's own. */
static __always_inline enum outcome peer_obstacle(const struct pair *pair, __u32 peer)
{
	struct tcp_sock *tp = (struct tcp_sock *)pair->sock[peer];
	__s64 cookie;
	void *ulp;
	int lowat;

	if (bpf_core_read(&ulp, sizeof(ulp), &tp->inet_conn.icsk_ulp_ops) ||
	    bpf_core_read(&lowat, sizeof(lowat), &tp->inet_conn.icsk_inet.sk.sk_rcvlowat))
		return OUTCOME_PEER_GONE;
	if (!ulp && lowat <= 1)
		return OUTCOME_SHORTCUT;
	if (bpf_core_read(&cookie, sizeof(cookie),
			  &tp->inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter) ||
	    (__u64)cookie != pair->cookie[peer])
		return OUTCOME_PEER_GONE;
	return ulp ? OUTCOME_ULP : OUTCOME_LOWAT;
}

/*
 * A redirect that is not granted its memory fails with ENOMEM (bpf_tcp_ingress),
 * where TCP waits. It is always granted until the second value of tcp_mem is
 * exceeded (__sk_mem_raise_allocated); what is between the first and that one is
 * room for messages that are sent at once.
 */
static __always_inline bool short_of_memory(const struct tcp_sock *tp)
{
	const struct proto *prot = tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot;
	__s64 allocated;
	long low;

	return bpf_core_read(&allocated, sizeof(allocated), &prot->memory_allocated->counter) ||
	       bpf_core_read(&low, sizeof(low), prot->sysctl_mem) || allocated > low;
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
static __always_inline enum outcome choose(struct pair *pair, __u32 own, const struct settings *set,
					   const struct tcp_sock *tp, __u32 size)
{
	__u32 peer = own ^ 1;
	struct sending *dir = &pair->side[own & 1].sending;
	const struct receiving *reader = &pair->side[peer & 1].receiving;
	__u32 write_seq = tp->write_seq;
	__s64 unread;

	dir->tcp_bytes += write_seq - dir->last_seq;
	dir->last_seq = write_seq;

	if (!(pair->state & PAIR_SERVER_JOINED))
		return OUTCOME_PEER_MISSING;
	if (pair->state & (PAIR_CLIENT_GONE | PAIR_SERVER_GONE))
		return OUTCOME_PEER_GONE;
	if (pair->state & PAIR_ANY_LEAVES)
		return OUTCOME_LEFT;
	if (!set->redirect)
		return OUTCOME_SWITCHED_OFF;
	if (dir->generation != set->generation) {
		struct policy policy = {};

		dir->generation = set->generation;
		look_up_policy(pair->netns[SIDE_CLIENT], pair->netns[SIDE_SERVER],
			       pair->server_port, &policy);
		dir->verdict = policy.verdict;
		dir->policy_reason = policy.reason;
	}
	if (dir->verdict != VERDICT_ALLOW)
		return OUTCOME_NOT_ALLOWED;
	if (tp->inet_conn.icsk_inet.sk.sk_shutdown & SEND_SHUTDOWN)
		return OUTCOME_SHUT_DOWN;
	if (tp->inet_conn.icsk_ulp_ops)
		return OUTCOME_ULP;
	if (tp->inet_conn.icsk_inet.sk.__sk_common.skc_flags &
	    1UL << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY))
		return OUTCOME_ZEROCOPY;
	if (reader->state & READ_UNSERVED)
		return OUTCOME_UNSERVED;
	if (reader->sleeper && !set->sleepers)
		return OUTCOME_LEFT;
	if (!(reader->state & READ_SEEN))
		return OUTCOME_NOT_SEEN;
	if (write_seq != dir->drained_seq) {
		if (!peer_drained(pair, peer & 1, write_seq))
			return OUTCOME_DRAINING;
		dir->drained_seq = write_seq;
	}
	unread = dir->shortcut_bytes + dir->tcp_bytes - reader->read_bytes;
	if (!dir->shortcut && unread > 0)
		return OUTCOME_UNOBSERVED;
	if (unread + size > (__s64)set->budget)
		return OUTCOME_BUDGET;
	if (short_of_memory(tp))
		return OUTCOME_MEMORY;
	return peer_obstacle(pair, peer & 1);
}

/* Sockets of the kernel have no file, and count as such: they are none of a pod's. */
static __always_inline bool may_sleep(const struct tcp_sock *tp)
{
	return !(tp->inet_conn.icsk_inet.sk.sk_socket->file->f_flags & O_NONBLOCK);
}

/*
 * A recv that sleeps in tcp_bpf_recvmsg does not go back to sleep when it is
 * woken by anything but data: it returns EAGAIN (tcp_msg_wait_data; seen on
 * 6.18.44 after a signal, a reset, a full receive buffer, and when TCP's send
 * buffer has been full and drains). So sockets whose reads may sleep are kept
 * out, unless the user accepts it. If so, two cases are avoided: a socket that is
 * read by one thread and written by another leaves, and so does one whose send
 * buffer has been full (on_ack).
 */
static __always_inline bool should_leave(const struct side *own, const struct settings *set,
					 const struct tcp_sock *tp)
{
	__u32 reader = own->receiving.sleeper;

	return may_sleep(tp) &&
	       (!set->sleepers || (reader && reader != (__u32)bpf_get_current_pid_tgid()));
}

/* Options that may be set at any time, and are looked at with each message. */
static __always_inline void remember_obstacle(struct pair *pair, enum outcome outcome)
{
	switch (outcome) {
	case OUTCOME_ULP:
		remember(pair, MISFIT_ULP);
		break;
	case OUTCOME_ZEROCOPY:
		remember(pair, MISFIT_ZEROCOPY);
		break;
	case OUTCOME_LOWAT:
		remember(pair, MISFIT_LOWAT);
		break;
	default:
		break;
	}
}

SEC("sk_msg")
int deliver(struct sk_msg_md *msg)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = msg->sk;
	enum outcome outcome = OUTCOME_UNKNOWN_SOCKET;
	__u32 size = msg->size;
	struct sending *dir;
	struct member *self;
	struct tcp_sock *tp;
	struct pair *pair;
	__u32 own;

	if (!sk || !set)
		goto pass;
	self = bpf_sk_storage_get(&members, sk, NULL, 0);
	if (!self)
		goto pass;
	own = self->side & 1;
	pair = bpf_map_lookup_elem(&pairs, &self->pair);
	if (!pair)
		goto pass;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		goto pass;

	dir = &pair->side[own].sending;
	/* A full barrier: either take_out sees us at work, or we see that a socket leaves. */
	__sync_fetch_and_or(&dir->busy, 1);
	outcome = choose(pair, own, set, tp, size);
	/* SK_DROP here means that the peer has left the SOCKHASH: TCP then answers as always. */
	if (outcome == OUTCOME_SHORTCUT &&
	    bpf_msg_redirect_hash(msg, &sockets, &pair->cookie[own ^ 1], BPF_F_INGRESS) != SK_PASS)
		outcome = OUTCOME_REDIRECT_REFUSED;
	dir->last_size = size;
	if (outcome == OUTCOME_SHORTCUT) {
		dir->shortcut_bytes += size;
		dir->redirect_end = dir->shortcut_bytes + dir->tcp_bytes;
		dir->switches += !dir->shortcut;
		dir->shortcut = true;
	} else {
		dir->reason = outcome;
		dir->shortcut = false;
		remember_obstacle(pair, outcome);
	}
	if (!dir->leave)
		dir->leave = should_leave(&pair->side[own], set, tp);
	if (!set->sleepers && pair->side[own ^ 1].receiving.sleeper)
		dir->peer_leave = true;
	__sync_fetch_and_and(&dir->busy, 0);
pass:
	count(outcome, size);
	return SK_PASS;
}

/*
 * observe: what the application has read.
 */

static __always_inline void observe_read(struct sock *sk, int bytes, __u32 flags)
{
	struct receiving *reader;
	struct member *self;
	struct pair *pair;

	self = bpf_sk_storage_get(&members, sk, NULL, 0);
	if (!self)
		return;
	pair = bpf_map_lookup_elem(&pairs, &self->pair);
	if (!pair)
		return;
	reader = &pair->side[self->side & 1].receiving;
	if (flags & ~RECV_SERVED)
		disqualify_flags(pair, self->side, flags & ~RECV_SERVED);
	if (!(flags & MSG_DONTWAIT))
		reader->sleeper = (__u32)bpf_get_current_pid_tgid();
	if (flags & MSG_PEEK)
		return;
	/* Several threads may read one socket at once, and a guard may find it misfit. */
	__sync_fetch_and_add(&reader->read_bytes, bytes);
	if (!(reader->state & READ_SEEN))
		__sync_fetch_and_or(&reader->state, READ_SEEN);
}

/* Kernels from 6.3 on; needs no trampoline. Fires for every socket of the node that receives. */
SEC("tp_btf/sock_recv_length")
int observe_tracepoint(__u64 *ctx)
{
	int bytes = ctx[1];

	if (bytes > 0)
		observe_read((struct sock *)ctx[0], bytes, ctx[2]);
	return 0;
}

/* Where the kernel allows trampolines. Fires for sockets that sit in a sockmap only. */
SEC("fexit/tcp_bpf_recvmsg")
int observe_fexit(__u64 *ctx)
{
	/* The number of arguments has changed over time, so the result is asked for (5.17). */
	__u64 ret = 0;

	if (bpf_get_func_ret(ctx, &ret) == 0 && (int)ret > 0)
		observe_read((struct sock *)ctx[0], (int)ret, ctx[3]);
	return 0;
}

/*
 * track: pairing by handshake.
 */

static __always_inline bool enrolled(__u64 netns)
{
	return bpf_map_lookup_elem(&pods, &netns) != NULL;
}

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

static __always_inline void complete_client_key(struct client_key *key, __u16 port, __u64 netns)
{
	key->port = port;
	key->reserved = 0;
	key->netns = is_loopback(key->addr) ? netns : 0;
}

/* The result of bpf_sock_hash_update as an outcome. */
static __always_inline enum outcome join_failure(int err)
{
	switch (err) {
	case -E2BIG:
		return OUTCOME_SOCKETS_FULL;
	case -EBUSY:
		return OUTCOME_SOCKET_BUSY;
	default:
		return OUTCOME_NO_MEMORY;
	}
}

/*
 * Puts a socket where deliver will find it. The socket storage comes first, so
 * that no message meets a socket of the SOCKHASH without it.
 */
static __always_inline enum outcome join(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 pair,
					 __u32 side, __u64 cookie)
{
	struct member self = { .pair = pair, .side = side };
	int err;

	if (!bpf_sk_storage_get(&members, sk, &self, BPF_SK_STORAGE_GET_F_CREATE))
		return OUTCOME_NO_MEMORY;
	err = bpf_sock_hash_update(ctx, &sockets, &cookie, BPF_NOEXIST);
	if (err) {
		bpf_sk_storage_delete(&members, sk);
		return join_failure(err);
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG |
					       BPF_SOCK_OPS_RTT_CB_FLAG);
	return OUTCOME_PAIRED;
}

/* Undoes join for a socket of which nothing redirected is to be read any more. */
static __always_inline void leave(struct bpf_sock *sk, __u64 cookie)
{
	bpf_map_delete_elem(&sockets, &cookie);
	bpf_sk_storage_delete(&members, sk);
}

static __always_inline void fill_handshake_key(struct handshake_key *key, __u32 client_seq,
					       __u32 server_seq, const __be32 client_addr[4],
					       __u16 client_port)
{
	key->client_seq = client_seq;
	key->server_seq = server_seq;
	__builtin_memcpy(key->addr, client_addr, sizeof(key->addr));
	key->port = client_port;
	key->reserved = 0;
}

/* Before the SYN-ACK is sent: leave a hint for the client. ctx->sk is NULL here. */
static __always_inline void on_syn(struct bpf_sock_ops *ctx)
{
	struct hint hint = {};
	struct client_key key;

	hint.server_netns = bpf_get_netns_cookie(ctx);
	if (!enrolled(hint.server_netns))
		return;
	remote_address(ctx, key.addr);
	complete_client_key(&key, remote_port(ctx), hint.server_netns);
	hint.written_ns = bpf_ktime_get_ns();
	hint.server_port = ctx->local_port;
	if (bpf_map_update_elem(&hints, &key, &hint, BPF_ANY))
		count(OUTCOME_HINTS_FULL, 0);
}

static __always_inline void start_direction(struct sending *dir, __u32 seq,
					    const struct settings *set, const struct policy *policy)
{
	dir->last_seq = seq;
	dir->drained_seq = seq;
	dir->generation = set->generation;
	dir->verdict = policy->verdict;
	dir->policy_reason = policy->reason;
	dir->reason = OUTCOME_NOT_SEEN;
}

static __always_inline enum outcome pair_client(struct bpf_sock_ops *ctx, __u64 netns,
						const struct client_key *client,
						const struct hint *hint)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct policy policy = {};
	struct handshake_key key;
	struct handshake value;
	enum outcome outcome;
	struct tcp_sock *tp;
	struct pair *pair;

	if (!set || !sk)
		return OUTCOME_NO_MEMORY;
	look_up_policy(netns, hint->server_netns, hint->server_port, &policy);
	if (policy.verdict == VERDICT_REFUSE)
		return OUTCOME_POLICY_REFUSED;
	if (is_misfit(hint->server_netns, hint->server_port))
		return OUTCOME_MISFIT;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return OUTCOME_NO_MEMORY;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return OUTCOME_MPTCP;
	if (tp->inet_conn.icsk_ulp_ops)
		return OUTCOME_CLIENT_ULP;
	if (!set->sleepers && may_sleep(tp))
		return OUTCOME_SLEEPER;

	value.pair = bpf_get_socket_cookie(ctx);
	value.written_ns = hint->written_ns;
	if (bpf_map_update_elem(&pairs, &value.pair, &blank, BPF_NOEXIST))
		return OUTCOME_PAIRS_FULL;
	pair = bpf_map_lookup_elem(&pairs, &value.pair);
	if (!pair)
		return OUTCOME_PAIRS_FULL;
	/* Nobody else knows the record before the socket joins. */
	pair->cookie[SIDE_CLIENT] = value.pair;
	pair->sock[SIDE_CLIENT] = (__u64)tp;
	pair->netns[SIDE_CLIENT] = netns;
	pair->netns[SIDE_SERVER] = hint->server_netns;
	pair->since_ns = hint->written_ns;
	__builtin_memcpy(pair->client_addr, client->addr, sizeof(pair->client_addr));
	remote_address(ctx, pair->dialled_addr);
	pair->client_port = client->port;
	pair->dialled_port = remote_port(ctx);
	pair->server_port = hint->server_port;
	pair->client_seq = ctx->snd_nxt;
	pair->server_seq = ctx->rcv_nxt;
	start_direction(&pair->side[SIDE_CLIENT].sending, pair->client_seq, set, &policy);
	start_direction(&pair->side[SIDE_SERVER].sending, pair->server_seq, set, &policy);
	pair->state = value.pair << PAIR_STATE_BITS | PAIR_CLIENT_JOINED;

	outcome = join(ctx, sk, value.pair, SIDE_CLIENT, value.pair);
	if (outcome != OUTCOME_PAIRED)
		goto forget;
	fill_handshake_key(&key, pair->client_seq, pair->server_seq, client->addr, client->port);
	/* Two connections with the same numbers cannot be told apart: neither is paired. */
	if (bpf_map_update_elem(&handshakes, &key, &value, BPF_NOEXIST)) {
		outcome = OUTCOME_HANDSHAKES_FULL;
		leave(sk, value.pair);
		goto forget;
	}
	return OUTCOME_PAIRED;
forget:
	bpf_map_delete_elem(&pairs, &value.pair);
	return outcome;
}

/* The client's handshake is done. No hint: the peer is no enrolled pod of this node. */
static __always_inline void on_active(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	enum outcome outcome;
	struct client_key key;
	struct hint *hint;

	if (!enrolled(netns))
		return;
	local_address(ctx, key.addr);
	complete_client_key(&key, ctx->local_port, netns);
	hint = bpf_map_lookup_elem(&hints, &key);
	if (!hint)
		return;
	outcome = pair_client(ctx, netns, &key, hint);
	if (outcome == OUTCOME_PAIRED)
		hint->claimed = true; /* counted when the server joins */
	else
		count(outcome, 0);
}

/*
 * The TCP socket of an MPTCP listener is one of the kernel's own, and what it
 * accepts from a plain client inherits that: nothing else tells it from a child
 * of a plain listener. Kernels without fbade4bd08ba take such a socket, once in
 * a SOCKHASH, for an MPTCP one when it is accepted.
 */
static __always_inline bool kernel_socket(const struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD(sk, sk_kern_sock);
}

/*
 * Sees such a child where it is made (inet_csk_clone_lock): accept may run before
 * pair_server, and makes it the program's own before it waits for the child's
 * lock (mptcp_stream_accept).
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
		remember_port(netns, sk->__sk_common.skc_num, MISFIT_MPTCP_LISTENER);
	return 0;
}

static __always_inline enum outcome pair_server(struct bpf_sock_ops *ctx, __u64 netns,
						const struct client_key *client)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct handshake *handshake;
	struct handshake_key key;
	enum outcome outcome;
	__u64 cookie, id, state;
	struct tcp_sock *tp;
	struct pair *pair;

	if (!sk || !set)
		return OUTCOME_UNMATCHED;
	fill_handshake_key(&key, ctx->rcv_nxt, ctx->snd_nxt, client->addr, client->port);
	handshake = bpf_map_lookup_elem(&handshakes, &key);
	if (!handshake)
		return OUTCOME_UNMATCHED;
	id = handshake->pair;
	bpf_map_delete_elem(&handshakes, &key);
	pair = bpf_map_lookup_elem(&pairs, &id);
	state = id << PAIR_STATE_BITS | PAIR_CLIENT_JOINED;
	if (!pair || pair->state != state)
		return OUTCOME_CLIENT_CLOSED;
	/* The client was let in for the pod and port of the hint. */
	if (pair->netns[SIDE_SERVER] != netns || pair->server_port != ctx->local_port)
		return OUTCOME_UNMATCHED;
	/* Found since then, perhaps by keep_mptcp_out of this very connection. */
	if (is_misfit(netns, pair->server_port))
		return OUTCOME_MISFIT;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return OUTCOME_NO_MEMORY;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return OUTCOME_MPTCP;
	/* keep_mptcp_out is not run on a CPU that it was interrupted on. */
	if (set->no_mptcp_listeners && kernel_socket(&tp->inet_conn.icsk_inet.sk)) {
		remember(pair, MISFIT_MPTCP_LISTENER);
		return OUTCOME_MISFIT;
	}
	cookie = bpf_get_socket_cookie(ctx);
	pair->cookie[SIDE_SERVER] = cookie;
	pair->sock[SIDE_SERVER] = (__u64)tp;
	local_address(ctx, pair->server_addr);
	outcome = join(ctx, sk, id, SIDE_SERVER, cookie);
	if (outcome != OUTCOME_PAIRED)
		return outcome;
	/* From here on deliver may redirect, unless the client's socket was closed meanwhile. */
	if (__sync_val_compare_and_swap(&pair->state, state, state | PAIR_SERVER_JOINED) != state) {
		leave(sk, cookie);
		return OUTCOME_CLIENT_CLOSED;
	}
	return OUTCOME_PAIRED;
}

/* The server's handshake is done, before any data of the client is looked at. */
static __always_inline void on_passive(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct client_key key;
	struct hint *hint;
	bool claimed;

	if (!enrolled(netns))
		return;
	remote_address(ctx, key.addr);
	complete_client_key(&key, remote_port(ctx), netns);
	hint = bpf_map_lookup_elem(&hints, &key);
	if (!hint) {
		count(OUTCOME_HINT_LOST, 0);
		return;
	}
	claimed = hint->claimed;
	/* Another server's SYN from the same client port has replaced ours. */
	if (hint->server_netns == netns)
		bpf_map_delete_elem(&hints, &key);
	if (claimed)
		count(pair_server(ctx, netns, &key), 0);
}

/*
 * Takes a socket out of the SOCKHASH in two steps: no more redirects to it,
 * then, with nothing on the way and all read, the delete. It goes on as a plain
 * TCP socket.
 */
static __always_inline void take_out(struct pair *pair, __u32 side)
{
	__u64 leaves = side == SIDE_CLIENT ? PAIR_CLIENT_LEAVES : PAIR_SERVER_LEAVES;
	__u64 left = side == SIDE_CLIENT ? PAIR_CLIENT_LEFT : PAIR_SERVER_LEFT;
	struct sending *toward = &pair->side[side ^ 1].sending;

	if (pair->state & left)
		return;
	__sync_fetch_and_or(&pair->state, leaves);
	if (toward->busy || toward->redirect_end > pair->side[side].receiving.read_bytes)
		return;
	if (__sync_fetch_and_or(&pair->state, left) & left)
		return;
	bpf_map_delete_elem(&sockets, &pair->cookie[side]);
	count(OUTCOME_SOCKET_LEFT, 0);
}

/*
 * Bytes by TCP were acknowledged. A thread that has filled the send buffer still
 * waits in write for this, and the kernel wakes it only after us: when it comes
 * to read, its socket has left.
 */
static __always_inline void on_ack(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;
	struct sending *dir;
	struct member *self;
	struct pair *pair;
	__u32 own;

	if (!sk)
		return;
	self = bpf_sk_storage_get(&members, sk, NULL, 0);
	if (!self)
		return;
	own = self->side & 1;
	pair = bpf_map_lookup_elem(&pairs, &self->pair);
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!pair || !tp)
		return;
	dir = &pair->side[own].sending;
	if (tp->inet_conn.icsk_inet.sk.sk_socket->flags & SOCK_NOSPACE && may_sleep(tp))
		dir->leave = true;
	if (dir->leave)
		take_out(pair, own);
	if (dir->peer_leave && pair->state & PAIR_SERVER_JOINED)
		take_out(pair, own ^ 1);
}

/* A client is closed before its server came: nobody else would delete what it wrote. */
static __always_inline void withdraw(const struct pair *pair)
{
	struct handshake_key handshake;
	struct client_key client;

	fill_handshake_key(&handshake, pair->client_seq, pair->server_seq, pair->client_addr,
			   pair->client_port);
	bpf_map_delete_elem(&handshakes, &handshake);
	__builtin_memcpy(client.addr, pair->client_addr, sizeof(client.addr));
	complete_client_key(&client, pair->client_port, pair->netns[SIDE_CLIENT]);
	bpf_map_delete_elem(&hints, &client);
}

/* The second one of the two sockets to go deletes the pair. */
static __always_inline void mark_gone(const struct member *self)
{
	struct pair *pair = bpf_map_lookup_elem(&pairs, &self->pair);
	__u64 gone, other, state;

	if (!pair)
		return;
	gone = self->side == SIDE_CLIENT ? PAIR_CLIENT_GONE : PAIR_SERVER_GONE;
	other = self->side == SIDE_CLIENT ? PAIR_SERVER_GONE : PAIR_CLIENT_GONE;
	state = __sync_fetch_and_or(&pair->state, gone);
	if (!(state & PAIR_SERVER_JOINED))
		withdraw(pair);
	else if (!(state & other))
		return;
	bpf_map_delete_elem(&pairs, &self->pair);
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

/* A socket of a pair is closed. */
static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct member *self;

	if (!sk)
		return;
	self = bpf_sk_storage_get(&members, sk, NULL, 0);
	if (!self)
		return;
	mark_gone(self);
	/* The SOCKHASH would keep redirected bytes, for whoever reads next. */
	if (disconnected(ctx, sk))
		leave(sk, bpf_get_socket_cookie(ctx));
}

/* Returns 1 from every path: 0 would be taken for an error of all programs on the cgroup. */
SEC("sockops")
int track(struct bpf_sock_ops *ctx)
{
	if (ctx->family != AF_INET && ctx->family != AF_INET6)
		return 1;
	switch (ctx->op) {
	case BPF_SOCK_OPS_RWND_INIT:
		if (!ctx->is_fullsock)
			on_syn(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		on_active(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_passive(ctx);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		on_ack(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == TCP_CLOSE)
			on_close(ctx);
		break;
	}
	return 1;
}

char __license[] SEC("license") = "Dual BSD/GPL";

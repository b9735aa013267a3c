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
#include "unsupported.h"

#define AF_INET 2
#define AF_INET6 10
#define O_NONBLOCK 00004000 /* include/uapi/asm-generic/fcntl.h */
#define SOCK_NOSPACE (1UL << 2) /* include/linux/net.h */
#define SEND_SHUTDOWN 2 /* include/net/sock.h */
#define SOCK_RCVBUF_LOCK 2
#define TCP_ESTABLISHED 1 /* enum in include/net/tcp_states.h */
#define TCP_SYN_RECV 3
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8

/* Defaults; the loader raises or lowers them. */
#define POLICY_MAX 131072
#define PENDING_MAX 16384

/* What a redirected message takes of the kernel beside its bytes: struct sk_msg, a slab object of 1 KiB. */
#define MESSAGE_COST 1024
/* The first limit of a direction: TCP's receive buffer starts with as much (tcp_rmem). */
#define LIMIT_START (128 << 10)
/* A burst up to here counts as small. HAProxy splices from 4 KiB on. */
#define BURST_SMALL 4096
/* What has been proved for a burst of this size is proved for all. */
#define BURST_WHOLE (64 << 10)
#define EPOLLET (1U << 31) /* include/uapi/linux/eventpoll.h */
/* How many of those who wait for a socket are looked at. */
#define WAITERS_MAX 4

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

/*
 * What all receivers of a pod have left unread, in bytes as for struct sending's
 * limit, by netns cookie. Agent: creates and deletes with the pod. deliver adds,
 * observe and track subtract. No entry: TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u64);
	__type(value, __s64);
} charges SEC(".maps");

/*
 * A SYN reached a listener of an enrolled pod. track: writes, reads, deletes
 * at the end of the handshake; the agent sweeps what never ended. Full: the
 * oldest goes, and its connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PENDING_MAX);
	__type(key, struct client_key);
	__type(value, struct syn);
} syns SEC(".maps");

/* A client that found its entry in syns waits for the server's socket. As syns. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PENDING_MAX);
	__type(key, struct pending_key);
	__type(value, struct pending);
} pending SEC(".maps");

/* Both sockets of every flow by socket cookie. The kernel deletes on close. Full: TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2 * FLOWS_MAX);
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
const enum flow_state *flow_state_type __attribute__((unused));
const enum unsupported *unsupported_type __attribute__((unused));

/* What a new flow starts from: the record is too large for the stack. */
static const struct flow blank;

static __always_inline void count(enum outcome outcome, __u64 bytes)
{
	struct count *count = bpf_map_lookup_elem(&outcomes, &outcome);

	if (count) {
		count->number++;
		count->bytes += bytes;
	}
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

#define FLOW_ANY_EVICTING (FLOW_CLIENT_EVICTING | FLOW_SERVER_EVICTING)

/* The peer's memory may have been freed and used again: the cookie read last says for whom. */
static __always_inline bool peer_drained(const struct flow *flow, __u32 peer, __u32 write_seq)
{
	struct tcp_sock *tp = (struct tcp_sock *)flow->sock[peer];
	__u32 copied_seq;
	__s64 cookie;

	if (bpf_core_read(&copied_seq, sizeof(copied_seq), &tp->copied_seq) ||
	    bpf_core_read(&cookie, sizeof(cookie),
			  &tp->inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter))
		return false;
	return copied_seq == write_seq && (__u64)cookie == flow->cookie[peer];
}

/* OUTCOME_SHORTCUT: none. What is found is remembered, so it has to be the peer's own. */
static __always_inline enum outcome peer_unsupported(const struct flow *flow, __u32 peer)
{
	struct tcp_sock *tp = (struct tcp_sock *)flow->sock[peer];
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
	    (__u64)cookie != flow->cookie[peer])
		return OUTCOME_PEER_GONE;
	return ulp ? OUTCOME_ULP : OUTCOME_LOWAT;
}

/*
 * A redirect that is not granted its memory fails with ENOMEM (bpf_tcp_ingress),
 * where TCP waits. It is always granted until the second value of tcp_mem is
 * exceeded (__sk_mem_raise_allocated); what is between the first and that one is
 * room for messages that are sent at once.
 */
static __always_inline bool memory_pressure(const struct tcp_sock *tp)
{
	const struct proto *prot = tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot;
	__s64 allocated;
	long low;

	return bpf_core_read(&allocated, sizeof(allocated), &prot->memory_allocated->counter) ||
	       bpf_core_read(&low, sizeof(low), prot->sysctl_mem) || allocated > low;
}

/* The verdict on both ports, if the pod's own NAT makes two of them. */
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

/*
 * Reads that observe has missed (the kernel does not run it on a CPU where another
 * thread was preempted in it) look like unread bytes for ever. They are found when
 * TCP's bytes have all been copied, as the caller knows, and the queue of
 * redirected messages is empty. A recv that holds bytes and waits for more does not
 * exist in non-blocking mode; bytes that splice has taken are known by its guard.
 * A read that ended just now is counted after us: decide sees then that more is
 * read than was sent.
 */
static __always_inline bool recount(const struct flow *flow, __u32 peer, const struct settings *set)
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
	return !bpf_core_read(&cookie, sizeof(cookie), &sk->__sk_common.skc_cookie.counter) &&
	       (__u64)cookie == flow->cookie[peer];
}

/*
 * Redirected bytes count in the receive buffer (bpf_tcp_ingress), and a segment
 * that finds no room there is dropped and sent again later and later. So what is
 * redirected leaves room for all that the sender may send by TCP, a quarter of it
 * more for what the kernel keeps with the bytes, or as much as the kernel has
 * reckoned with when it said what may be sent. A buffer that the application has
 * not fixed grows up to tcp_rmem (tcp_clamp_window).
 */
static __always_inline bool has_room(const struct flow *flow, __u32 peer,
				     const struct tcp_sock *own, __s64 bytes)
{
	struct sock *sk = (struct sock *)flow->sock[peer];
	__s64 by_tcp = own->snd_wnd + own->snd_wnd / 4;
	struct net *net;
	int room, highest;

	if (bpf_core_read(&room, sizeof(room), &sk->sk_rcvbuf))
		return false;
	bytes += by_tcp < room ? by_tcp : room;
	if (bytes <= room)
		return true;
	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_RCVBUF_LOCK)
		return false;
	if (bpf_core_read(&net, sizeof(net), &sk->__sk_common.skc_net.net) ||
	    bpf_core_read(&highest, sizeof(highest), &net->ipv4.sysctl_tcp_rmem[2]))
		return false;
	return bytes <= highest;
}

/*
 * Messages in the queue: at most those that were sent since a mark whose bytes
 * have all been read. Reads are seen in bytes, and several may take one message.
 */
static __always_inline void count_queued(struct sending *dir, __u64 end, __u64 read)
{
	if (read >= end) {
		dir->queued_before = 0;
		dir->queued_since = 0;
	} else if (read >= dir->mark) {
		dir->queued_before = dir->queued_since;
		dir->queued_since = 0;
		dir->mark = end;
	}
}

/*
 * The reader has read all, and the direction takes the shortcut for the first time
 * or since it met its limit. The reader may leave as much unread as it has read
 * since the limit grew last, as on TCP (tcp_rcv_space_adjust), and twice as much as
 * the limit that it met.
 */
static __always_inline void grow(struct sending *dir, __u64 read, const struct settings *set)
{
	__u64 limit = read - dir->grown, least = dir->limit;

	if (dir->flags & SENDING_SPILLED)
		least *= 2;
	else if (dir->switches)
		return;
	dir->flags &= ~SENDING_SPILLED;
	dir->grown = read;
	if (limit < least)
		limit = least;
	if (limit > set->budget)
		limit = set->budget;
	if (limit <= dir->limit)
		return;
	dir->limit = limit;
	dir->flags &= ~SENDING_LEARNED;
}

/*
 * A program may use splice, FIONREAD and the like on a connection that it has only
 * read by recv so far: HAProxy splices the first body that is large enough, nginx
 * asks FIONREAD after a recv that has filled its buffer. Nothing can help it once
 * redirected bytes are unread. So whatever is larger than all that it has taken by
 * recv goes by TCP first, where such calls are served and seen. A burst is what is
 * sent without an answer: to a reader, ten messages in a row are one large one.
 */
static __always_inline bool on_trial(struct sending *dir, const struct receiving *answers,
				     const struct receiving *reader, const struct settings *set,
				     __s64 unread, __u32 size)
{
	__u32 done = unread < dir->burst ? dir->burst - (__u32)(unread > 0 ? unread : 0) : 0;

	if (reader->reads >= set->trial_reads &&
	    (!set->trial_bytes || (dir->bulk >= set->trial_bytes && dir->proved >= BURST_WHOLE)))
		return false;
	if (done > dir->proved) {
		dir->proved = done;
		dir->flags &= ~SENDING_LEARNED;
	}
	if ((__u32)answers->read_bytes != dir->answered || done >= BURST_WHOLE) {
		dir->answered = answers->read_bytes;
		if (done > BURST_SMALL && dir->bulk < set->trial_bytes) {
			dir->bulk += done;
			dir->flags &= ~SENDING_LEARNED;
		}
		dir->burst -= done;
	}
	dir->burst += size;
	if (reader->reads < set->trial_reads)
		return true;
	if (!set->trial_bytes)
		return false;
	return dir->burst > dir->proved ||
	       (dir->burst > BURST_SMALL && dir->bulk < set->trial_bytes);
}

/*
 * TCP bytes behind redirected ones that are unread, as after a spill, are a
 * second message to epoll, but one edge with the first if nobody has waited in
 * between. A recv then returns the redirected bytes alone. A program that takes a
 * recv that was not filled for the last one, as epoll(7) lets it, and waits for the
 * next edge, waits for ever: nginx, tokio, netty's own epoll. One that was seen to
 * call recv once more, and to find nothing, always comes to the TCP bytes (Go,
 * envoy); so does one that waits for levels.
 */
static __always_inline bool edge_triggered(const struct flow *flow, __u32 peer)
{
	struct sock *sk = (struct sock *)flow->sock[peer];
	struct list_head *head, *next;
	struct socket_wq *wq;

	if (bpf_core_read(&wq, sizeof(wq), &sk->sk_wq))
		return true;
	head = &wq->wait.head;
	if (bpf_core_read(&next, sizeof(next), &head->next))
		return true;
	for (int i = 0; i < WAITERS_MAX; i++) {
		struct wait_queue_entry *entry;
		struct eppoll_entry *waiter;
		struct epitem *item;
		void *private;
		__u32 events;

		if (next == head)
			return false;
		entry = (void *)next - bpf_core_field_offset(struct wait_queue_entry, entry);
		/* Threads that sleep, and poll, have something here; epoll has not. */
		if (bpf_core_read(&private, sizeof(private), &entry->private))
			return true;
		waiter = (void *)entry - bpf_core_field_offset(struct eppoll_entry, wait);
		if (!private && (bpf_core_read(&item, sizeof(item), &waiter->base) ||
				 bpf_core_read(&events, sizeof(events), &item->event.events) ||
				 events & EPOLLET))
			return true;
		if (bpf_core_read(&next, sizeof(next), &next->next))
			return true;
	}
	return true;
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
	__u32 generation = *(volatile __u32 *)&set->generation;
	struct sending *dir = &flow->side[own & 1].sending;
	const struct receiving *reader = &flow->side[peer & 1].receiving;
	__s64 unread, cost;
	__u64 end, read;
	__u32 limit;
	bool trial;

	dir->tcp_bytes += write_seq - dir->last_seq;
	dir->last_seq = write_seq;
	end = dir->shortcut_bytes + dir->tcp_bytes;
	read = *(volatile __u64 *)&reader->read_bytes + dir->missed;
	if (read > end) { /* recount was wrong */
		dir->missed -= read - end < dir->missed ? read - end : dir->missed;
		read = end;
	}
	unread = end - read;
	count_queued(dir, end, read);
	trial = on_trial(dir, &flow->side[own & 1].receiving, reader, set, unread, size);

	if (!(flow->state & FLOW_SERVER_JOINED))
		return OUTCOME_PEER_MISSING;
	if (flow->state & (FLOW_CLIENT_GONE | FLOW_SERVER_GONE))
		return OUTCOME_PEER_GONE;
	if (flow->state & FLOW_ANY_EVICTING)
		return OUTCOME_EVICTED;
	if (!set->redirect)
		return OUTCOME_SWITCHED_OFF;
	if (set->lease_ns && now > set->lease_ns)
		return OUTCOME_STALE;
	if (dir->generation != generation) {
		struct policy policy = {};

		ask_policy(flow, &policy);
		dir->generation = generation;
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
	if (reader->state & READ_UNSUPPORTED)
		return OUTCOME_UNSUPPORTED;
	if (reader->blocking_reader && !set->allow_blocking)
		return OUTCOME_EVICTED;
	if (!(reader->state & READ_SEEN))
		return OUTCOME_NOT_SEEN;
	if (trial)
		return OUTCOME_TRIAL;
	if (!dir->shortcut && reader->drains < set->trial_drains && edge_triggered(flow, peer & 1))
		return OUTCOME_EDGE;
	if (set->refresh_ns && now - dir->last_tcp_ns >= set->refresh_ns)
		return OUTCOME_REFRESH;
	if (write_seq != dir->drained_seq) {
		if (!peer_drained(flow, peer & 1, write_seq))
			return OUTCOME_DRAINING;
		dir->drained_seq = write_seq;
	}
	if (!dir->shortcut && !unread)
		grow(dir, read, set);
	limit = dir->limit < set->budget ? dir->limit : set->budget;
	cost = unread + size + MESSAGE_COST * ((__s64)dir->queued_before + dir->queued_since + 1);
	if (unread && (!dir->shortcut || cost > limit) && recount(flow, peer & 1, set)) {
		dir->missed += unread;
		unread = 0;
		count_queued(dir, end, end);
		cost = size + MESSAGE_COST;
	}
	if (!dir->shortcut && unread)
		return OUTCOME_UNOBSERVED;
	if (cost > limit) {
		dir->flags |= SENDING_SPILLED;
		return OUTCOME_BUDGET;
	}
	if (!has_room(flow, peer & 1, tp, unread + size))
		return OUTCOME_RECEIVE_BUFFER;
	*held = cost;
	*charged = bpf_map_lookup_elem(&charges, &flow->netns[peer & 1]);
	if (!*charged || **charged + cost - (__u32)dir->charge > (__s64)set->pod_budget)
		return OUTCOME_POD_BUDGET;
	if (memory_pressure(tp))
		return OUTCOME_MEMORY;
	return peer_unsupported(flow, peer & 1);
}

/*
 * The pod's charge of a direction is what was unread when the last message was
 * redirected, until all of it has been read. The high word of charge says what
 * that was, so that a message that comes meanwhile is not taken back with it.
 */
static __always_inline void charge(struct sending *dir, __s64 *charged, __u32 cost)
{
	__u64 old = __sync_lock_test_and_set(&dir->charge, dir->redirect_end << 32 | cost);

	if (charged)
		__sync_fetch_and_add(charged, (__s64)cost - (__u32)old);
}

/* Takes back what the direction towards a receiver is charged with, if it is still the same. */
static __always_inline void uncharge(struct flow *flow, __u32 receiver, __u64 charge)
{
	struct sending *dir = &flow->side[(receiver ^ 1) & 1].sending;
	__s64 *charged;

	if (!(__u32)charge ||
	    __sync_val_compare_and_swap(&dir->charge, charge, charge & ~0xffffffffULL) != charge)
		return;
	charged = bpf_map_lookup_elem(&charges, &flow->netns[receiver & 1]);
	if (charged)
		__sync_fetch_and_add(charged, -(__s64)(__u32)charge);
}

/* A receiver is closed: nothing is read any more. */
static __always_inline void uncharge_all(struct flow *flow, __u32 receiver)
{
	uncharge(flow, receiver, flow->side[(receiver ^ 1) & 1].sending.charge);
}

/* What the receiver of a direction has proved shortens the trial of later connections to the port. */
static __always_inline void learn(const struct flow *flow, __u32 own, const struct settings *set)
{
	const struct sending *dir = &flow->side[own & 1].sending;
	__u32 reads = flow->side[(own ^ 1) & 1].receiving.reads;
	__u32 drains = flow->side[(own ^ 1) & 1].receiving.drains;
	struct learned_value *known;

	known = get_learned(own == SIDE_SERVER ? flow->netns[SIDE_CLIENT] : 0,
			    flow->netns[SIDE_SERVER], flow->server_port, set->learned_share);
	if (!known)
		return;
	if (known->reads < reads)
		known->reads = reads;
	if (known->proved < dir->proved)
		known->proved = dir->proved;
	if (known->bulk < dir->bulk)
		known->bulk = dir->bulk;
	if (known->drains < drains)
		known->drains = drains;
	if (known->limit < dir->limit)
		known->limit = dir->limit;
}

/* Sockets of the kernel have no file, and count as such: they are none of a pod's. */
static __always_inline bool is_blocking(const struct tcp_sock *tp)
{
	return !(tp->inet_conn.icsk_inet.sk.sk_socket->file->f_flags & O_NONBLOCK);
}

/*
 * A recv that sleeps in tcp_bpf_recvmsg does not go back to sleep when it is
 * woken by anything but data: it returns EAGAIN (tcp_msg_wait_data; seen on
 * 6.18.44 after a signal, a reset, a full receive buffer, and when TCP's send
 * buffer has been full and drains). So sockets whose reads may sleep are kept
 * out, unless the user accepts it. If so, two cases are avoided: a socket that is
 * read by one thread and written by another is evicted, and so is one whose send
 * buffer has been full (on_ack).
 */
static __always_inline bool should_evict(const struct side *own, const struct settings *set,
					 const struct tcp_sock *tp)
{
	__u32 reader = own->receiving.blocking_reader;

	return is_blocking(tp) &&
	       (!set->allow_blocking || (reader && reader != (__u32)bpf_get_current_pid_tgid()));
}

/* Options that may be set at any time, and are looked at with each message. */
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
	/* A full barrier: either evict sees us at work, or we see that a socket is to be evicted. */
	__sync_fetch_and_or(&dir->busy, 1);
	outcome = decide(flow, own, set, tp, size, now, &charged, &held);
	/* SK_DROP here means that the peer was evicted: TCP then answers as always. */
	if (outcome == OUTCOME_SHORTCUT &&
	    bpf_msg_redirect_hash(msg, &sockets, &flow->cookie[own ^ 1], BPF_F_INGRESS) != SK_PASS)
		outcome = OUTCOME_REDIRECT_REFUSED;
	dir->last_size = size;
	if (outcome == OUTCOME_SHORTCUT) {
		dir->shortcut_bytes += size;
		dir->redirect_end = dir->shortcut_bytes + dir->tcp_bytes;
		dir->queued_since++;
		dir->switches += !dir->shortcut;
		dir->shortcut = true;
		charge(dir, charged, held);
	} else {
		dir->reason = outcome;
		dir->shortcut = false;
		dir->last_tcp_ns = now;
		remember_option(flow, own, outcome, tp);
	}
	if (!(dir->flags & SENDING_LEARNED) &&
	    flow->side[own ^ 1].receiving.reads >= set->trial_reads && set->trial_bytes) {
		dir->flags |= SENDING_LEARNED;
		learn(flow, own, set);
	}
	if (!dir->evict && should_evict(&flow->side[own], set, tp)) {
		dir->evict = true;
		if (!set->allow_blocking)
			remember(flow, own, UNSUPPORTED_BLOCKING);
	}
	if (!set->allow_blocking && flow->side[own ^ 1].receiving.blocking_reader) {
		dir->evict_peer = true;
		remember(flow, own ^ 1, UNSUPPORTED_BLOCKING);
	}
	__sync_fetch_and_and(&dir->busy, 0);
pass:
	count(outcome, size);
	return SK_PASS;
}

/*
 * observe: what the application has read.
 */

/* A recv has found nothing. */
static __always_inline void observe_nothing(struct sock *sk, __u32 flags)
{
	struct receiving *reader;
	struct sk_flow *self;
	struct flow *flow;

	if (flags & (MSG_PEEK | MSG_ERRQUEUE | MSG_OOB))
		return;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
		return;
	flow = flow_of(self, sk);
	if (!flow)
		return;
	reader = &flow->side[self->side & 1].receiving;
	if (reader->unfilled && reader->drains < ~0U)
		reader->drains++;
	reader->unfilled = false;
}

static __always_inline void observe_read(struct sock *sk, int bytes, bool unfilled, __u32 flags)
{
	struct receiving *reader;
	struct sk_flow *self;
	struct flow *flow;
	__u64 charge, read;
	__u32 side;

	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
		return;
	flow = flow_of(self, sk);
	if (!flow)
		return;
	side = self->side & 1;
	reader = &flow->side[side].receiving;
	if (flags & ~RECV_SUPPORTED)
		mark_unsupported_flags(flow, side, flags & ~RECV_SUPPORTED);
	if (!(flags & MSG_DONTWAIT))
		reader->blocking_reader = (__u32)bpf_get_current_pid_tgid();
	/* None of these takes bytes from the stream, but MSG_OOB does with redirected ones. */
	if (flags & (MSG_PEEK | MSG_ERRQUEUE) || (flags & MSG_OOB && bytes == 1))
		return;
	reader->unfilled = unfilled;
	/* Several threads may read one socket at once, and a guard may mark it unsupported. */
	read = __sync_fetch_and_add(&reader->read_bytes, bytes) + bytes;
	if (reader->reads < ~0U)
		reader->reads++;
	if (!(reader->state & READ_SEEN))
		__sync_fetch_and_or(&reader->state, READ_SEEN);
	charge = *(volatile __u64 *)&flow->side[side ^ 1].sending.charge;
	if ((__u32)charge &&
	    (__s32)((__u32)read + flow->side[side ^ 1].sending.missed - (__u32)(charge >> 32)) >= 0)
		uncharge(flow, side, charge);
}

/* Kernels from 6.3 on; needs no trampoline. Fires for every socket of the node that receives. */
SEC("tp_btf/sock_recv_length")
int observe_tracepoint(__u64 *ctx)
{
	int bytes = ctx[1];

	/* How much was asked for is not told here. */
	if (bytes > 0)
		observe_read((struct sock *)ctx[0], bytes, true, ctx[2]);
	else if (bytes == -EAGAIN)
		observe_nothing((struct sock *)ctx[0], ctx[2]);
	return 0;
}

/* Where the kernel allows trampolines. Fires for sockets that sit in a sockmap only. */
SEC("fexit/tcp_bpf_recvmsg")
int observe_fexit(__u64 *ctx)
{
	/* The number of arguments has changed over time, so the result is asked for (5.17). */
	__u64 ret = 0;

	if (bpf_get_func_ret(ctx, &ret))
		return 0;
	if ((int)ret > 0)
		observe_read((struct sock *)ctx[0], (int)ret, (__u32)ret < ctx[2], ctx[3]);
	else if ((int)ret == -EAGAIN)
		observe_nothing((struct sock *)ctx[0], ctx[3]);
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
static __always_inline enum outcome join(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 flow,
					 __u32 side, __u64 cookie)
{
	struct sk_flow self = { .flow = flow, .side = side };
	int err;

	if (!bpf_sk_storage_get(&sk_flows, sk, &self, BPF_SK_STORAGE_GET_F_CREATE))
		return OUTCOME_NO_MEMORY;
	err = bpf_sock_hash_update(ctx, &sockets, &cookie, BPF_NOEXIST);
	if (err) {
		bpf_sk_storage_delete(&sk_flows, sk);
		return join_failure(err);
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG |
					       BPF_SOCK_OPS_RTT_CB_FLAG);
	return OUTCOME_PAIRED;
}

/* Undoes join for a socket of which nothing redirected is to be read any more. */
static __always_inline void remove_socket(struct bpf_sock *sk, __u64 cookie)
{
	bpf_map_delete_elem(&sockets, &cookie);
	bpf_sk_storage_delete(&sk_flows, sk);
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

/*
 * The context's sock is a request here, which the program is not shown. A listener
 * in blocking mode is most often one of a program whose reads sleep.
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

/* Before the SYN-ACK is sent: leave an entry for the client. ctx->sk is NULL here. */
static __always_inline void on_syn(struct bpf_sock_ops *ctx)
{
	struct syn syn = {};
	struct client_key key;

	syn.server_netns = bpf_get_netns_cookie(ctx);
	if (!enrolled(syn.server_netns))
		return;
	remote_address(ctx, key.addr);
	complete_client_key(&key, remote_port(ctx), syn.server_netns);
	syn.written_ns = bpf_ktime_get_ns();
	syn.server_port = ctx->local_port;
	syn.blocking = blocking_listener(ctx);
	if (bpf_map_update_elem(&syns, &key, &syn, BPF_ANY))
		count(OUTCOME_SYNS_FULL, 0);
}

static __always_inline void set_verdict(struct sending *dir, const struct policy *policy)
{
	dir->verdict = policy->verdict;
	dir->policy_reason = policy->reason;
}

static __always_inline void start_direction(struct flow *flow, __u32 from, __u32 seq,
					    __u32 generation, const struct policy *policy)
{
	struct receiving *reader = &flow->side[from ^ 1].receiving;
	struct sending *dir = &flow->side[from].sending;
	const struct learned_value *known;

	dir->last_seq = seq;
	dir->drained_seq = seq;
	dir->generation = generation;
	set_verdict(dir, policy);
	dir->reason = OUTCOME_NOT_SEEN;
	dir->last_tcp_ns = flow->since_ns;
	dir->limit = LIMIT_START;
	known = find_learned(from == SIDE_SERVER ? flow->netns[SIDE_CLIENT] : 0,
			     flow->netns[SIDE_SERVER], flow->server_port);
	if (known) {
		reader->reads = known->reads;
		reader->drains = known->drains;
		dir->proved = known->proved;
		dir->bulk = known->bulk;
		if (dir->limit < known->limit)
			dir->limit = known->limit;
	}
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
 * A socket that the kernel has made for itself belongs to whoever did: AF_SMC
 * takes sk_user_data for its own after accept, and the SOCKHASH's entry with it
 * (WARN, and an endless loop in newer trees).
 */
static __always_inline bool kernel_socket(const struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD(sk, sk_kern_sock);
}

static __always_inline enum outcome pair_client(struct bpf_sock_ops *ctx, __u64 netns,
						const struct client_key *client,
						const struct syn *syn)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct policy policy = {};
	struct pending_key key;
	struct pending value;
	enum outcome outcome;
	struct tcp_sock *tp;
	struct flow *flow;
	__u32 generation;

	if (!set || !sk)
		return OUTCOME_NO_MEMORY;
	if (set->lease_ns && bpf_ktime_get_ns() > set->lease_ns)
		return OUTCOME_PAIRING_STALE;
	/* Before the policy: a change that comes in between is then asked for once more. */
	generation = *(volatile __u32 *)&set->generation;
	look_up_policy(netns, syn->server_netns, syn->server_port, &policy);
	if (policy.verdict == VERDICT_REFUSE)
		return OUTCOME_POLICY_REFUSED;
	if (is_unsupported(netns, syn->server_netns, syn->server_port))
		return OUTCOME_UNSUPPORTED_PORT;
	if (!has_share(netns, set) || !has_share(syn->server_netns, set))
		return OUTCOME_SHARE;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return OUTCOME_NO_MEMORY;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return OUTCOME_MPTCP;
	if (kernel_socket(&tp->inet_conn.icsk_inet.sk))
		return OUTCOME_KERNEL_SOCKET;
	if (tp->inet_conn.icsk_ulp_ops)
		return OUTCOME_CLIENT_ULP;
	if (!set->allow_blocking && is_blocking(tp))
		return OUTCOME_BLOCKING_CLIENT;
	if (!set->allow_blocking && syn->blocking) {
		const struct learned_value *known =
			find_learned(0, syn->server_netns, syn->server_port);

		if (!known || !known->non_blocking)
			return OUTCOME_BLOCKING_SERVER;
	}

	value.flow = bpf_get_socket_cookie(ctx);
	value.written_ns = syn->written_ns;
	if (bpf_map_update_elem(&flows, &value.flow, &blank, BPF_NOEXIST))
		return OUTCOME_FLOWS_FULL;
	flow = bpf_map_lookup_elem(&flows, &value.flow);
	if (!flow)
		return OUTCOME_FLOWS_FULL;
	/* Nobody else knows the record before the socket joins. */
	flow->cookie[SIDE_CLIENT] = value.flow;
	flow->sock[SIDE_CLIENT] = (__u64)tp;
	flow->netns[SIDE_CLIENT] = netns;
	flow->netns[SIDE_SERVER] = syn->server_netns;
	flow->since_ns = syn->written_ns;
	__builtin_memcpy(flow->client_addr, client->addr, sizeof(flow->client_addr));
	remote_address(ctx, flow->orig_dst_addr);
	flow->client_port = client->port;
	flow->orig_dst_port = remote_port(ctx);
	flow->server_port = syn->server_port;
	flow->client_seq = ctx->snd_nxt;
	flow->server_seq = ctx->rcv_nxt;
	start_direction(flow, SIDE_CLIENT, flow->client_seq, generation, &policy);
	start_direction(flow, SIDE_SERVER, flow->server_seq, generation, &policy);
	add_share(flow, 1);
	flow->state = value.flow << FLOW_STATE_BITS | FLOW_CLIENT_JOINED;

	outcome = join(ctx, sk, value.flow, SIDE_CLIENT, value.flow);
	if (outcome != OUTCOME_PAIRED)
		goto forget;
	fill_pending_key(&key, flow->client_seq, flow->server_seq, client->addr, client->port);
	/* Two connections with the same numbers cannot be told apart: neither is paired. */
	if (bpf_map_update_elem(&pending, &key, &value, BPF_NOEXIST)) {
		outcome = OUTCOME_PENDING_FULL;
		remove_socket(sk, value.flow);
		goto forget;
	}
	return OUTCOME_PAIRED;
forget:
	delete_flow(flow, value.flow);
	return outcome;
}

/* The client's handshake is done. No entry in syns: the peer is no enrolled pod of this node. */
static __always_inline void on_active(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	enum outcome outcome;
	struct client_key key;
	struct syn *syn, copy;

	if (!enrolled(netns))
		return;
	local_address(ctx, key.addr);
	complete_client_key(&key, ctx->local_port, netns);
	syn = bpf_map_lookup_elem(&syns, &key);
	if (!syn)
		return;
	/* The map may give the entry to another client at any moment. */
	copy = *(volatile struct syn *)syn;
	outcome = pair_client(ctx, netns, &key, &copy);
	if (outcome == OUTCOME_PAIRED) {
		syn->claimed = CLAIM_PAIR; /* counted when the server joins */
		return;
	}
	if (outcome == OUTCOME_BLOCKING_SERVER)
		syn->claimed = CLAIM_WATCH;
	count(outcome, 0);
}

/*
 * The TCP socket of an MPTCP listener is one of the kernel's own, and what it
 * accepts from a plain client inherits that. Kernels without fbade4bd08ba take such
 * a socket, once in a SOCKHASH, for an MPTCP one when it is accepted. This sees the
 * child where it is made (inet_csk_clone_lock): accept may run before
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
		remember_port(0, netns, sk->__sk_common.skc_num, UNSUPPORTED_MPTCP_LISTENER);
	return 0;
}

/*
 * Tells a child of an MPTCP listener that has become plain TCP
 * (mptcp_subflow_tcp_fallback gives it back what a plain socket has) from one that
 * has another owner in the kernel. The client is a plain one.
 */
static __always_inline bool owned(const struct tcp_sock *tp, const struct flow *flow)
{
	const struct sock *client = (const struct sock *)flow->sock[SIDE_CLIENT];
	void *plain;

	return kernel_socket(&tp->inet_conn.icsk_inet.sk) &&
	       (bpf_core_read(&plain, sizeof(plain), &client->sk_data_ready) ||
		plain != tp->inet_conn.icsk_inet.sk.sk_data_ready);
}

static __always_inline enum outcome pair_server(struct bpf_sock_ops *ctx, __u64 netns,
						const struct client_key *client)
{
	struct settings *set = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct pending *handshake;
	struct pending_key key;
	enum outcome outcome;
	__u64 cookie, id, state;
	struct tcp_sock *tp;
	struct flow *flow;

	if (!sk || !set)
		return OUTCOME_UNMATCHED;
	fill_pending_key(&key, ctx->rcv_nxt, ctx->snd_nxt, client->addr, client->port);
	handshake = bpf_map_lookup_elem(&pending, &key);
	if (!handshake)
		return OUTCOME_UNMATCHED;
	id = handshake->flow;
	bpf_map_delete_elem(&pending, &key);
	flow = bpf_map_lookup_elem(&flows, &id);
	state = id << FLOW_STATE_BITS | FLOW_CLIENT_JOINED;
	if (!flow || flow->state != state)
		return OUTCOME_CLIENT_CLOSED;
	/* The client was let in for the pod and port of its entry in syns. */
	if (flow->netns[SIDE_SERVER] != netns || flow->server_port != ctx->local_port)
		return OUTCOME_UNMATCHED;
	/* Found since then, perhaps by keep_mptcp_out of this very connection. */
	if (is_unsupported(flow->netns[SIDE_CLIENT], netns, flow->server_port))
		return OUTCOME_UNSUPPORTED_PORT;
	tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return OUTCOME_NO_MEMORY;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return OUTCOME_MPTCP;
	/* keep_mptcp_out is not run on a CPU that it was interrupted on. */
	if (set->no_mptcp_listeners && kernel_socket(&tp->inet_conn.icsk_inet.sk)) {
		remember(flow, SIDE_SERVER, UNSUPPORTED_MPTCP_LISTENER);
		return OUTCOME_UNSUPPORTED_PORT;
	}
	if (owned(tp, flow))
		return OUTCOME_KERNEL_SOCKET;
	cookie = bpf_get_socket_cookie(ctx);
	flow->cookie[SIDE_SERVER] = cookie;
	flow->sock[SIDE_SERVER] = (__u64)tp;
	local_address(ctx, flow->server_addr);
	if (flow->orig_dst_port != flow->server_port &&
	    same_address(flow->orig_dst_addr, flow->server_addr)) {
		struct policy policy = {};

		/* The pod itself has redirected the port. The client's deliver does not look at these yet. */
		flow->port_in_doubt = true;
		ask_policy(flow, &policy);
		set_verdict(&flow->side[SIDE_CLIENT].sending, &policy);
		set_verdict(&flow->side[SIDE_SERVER].sending, &policy);
	}
	outcome = join(ctx, sk, id, SIDE_SERVER, cookie);
	if (outcome != OUTCOME_PAIRED)
		return outcome;
	/* From here on deliver may redirect, unless the client's socket was closed meanwhile. */
	if (__sync_val_compare_and_swap(&flow->state, state, state | FLOW_SERVER_JOINED) != state) {
		remove_socket(sk, cookie);
		return OUTCOME_CLIENT_CLOSED;
	}
	return OUTCOME_PAIRED;
}

/* A server's socket that is not paired: on_ack sees its mode when the server has accepted it. */
static __always_inline void watch(struct bpf_sock_ops *ctx)
{
	struct sk_flow self = { .side = SIDE_SERVER };
	struct bpf_sock *sk = ctx->sk;

	if (sk && bpf_sk_storage_get(&sk_flows, sk, &self, BPF_SK_STORAGE_GET_F_CREATE))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
}

/* The server's handshake is done, before any data of the client is looked at. */
static __always_inline void on_passive(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct client_key key;
	struct syn *syn;
	__u16 claimed;

	if (!enrolled(netns))
		return;
	remote_address(ctx, key.addr);
	complete_client_key(&key, remote_port(ctx), netns);
	syn = bpf_map_lookup_elem(&syns, &key);
	if (!syn) {
		count(OUTCOME_SYN_LOST, 0);
		return;
	}
	claimed = syn->claimed;
	/* Another server's SYN from the same client port has replaced ours. */
	if (syn->server_netns == netns)
		bpf_map_delete_elem(&syns, &key);
	if (claimed == CLAIM_PAIR)
		count(pair_server(ctx, netns, &key), 0);
	else if (claimed == CLAIM_WATCH)
		watch(ctx);
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

/* What a watched socket shows holds for the port, until somebody listens there anew. */
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

/*
 * Bytes by TCP were acknowledged. A thread that has filled the send buffer still
 * waits in write for this, and the kernel wakes it only after us: when it comes
 * to read, its socket is evicted.
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
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_reuse(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		on_reuse(ctx);
		on_listen(ctx);
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
		else if (ctx->args[0] == TCP_ESTABLISHED && ctx->args[1] == TCP_FIN_WAIT1)
			on_half_close(ctx);
		break;
	}
	return 1;
}

/* The agent ends a flow whose sockets are gone without our having been told. */
SEC("syscall")
int end_flow(struct flow_id *ctx)
{
	struct flow *flow;
	__u64 id = ctx->id;

	flow = bpf_map_lookup_elem(&flows, &id);
	if (flow && flow->state >> FLOW_STATE_BITS == id)
		delete_flow(flow, id);
	return 0;
}

char __license[] SEC("license") = "Dual BSD/GPL";

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Keys and records of a flow: a TCP connection between two enrolled pods of
 * this node. Addresses are IPv6 or v4-mapped IPv6 in network byte order, so
 * that one key type serves both families; ports are in host byte order (in the
 * sock_ops context local_port is in host order already, while remote_port is in
 * network order in 32 bits). Netns are netns cookies, sockets socket cookies.
 */
#ifndef PODSHUNT_FLOW_H
#define PODSHUNT_FLOW_H

#include <stdbool.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "outcome.h"

/*
 * The number of the layout of all maps. Raise it whenever a map, or what a value in one
 * means, changes: agents of another number do not take the maps over, they drain them.
 * For that, builds of any number read what is marked FROZEN, by these names: see
 * agent/datapath/contract.go.
 */
enum layout { LAYOUT = 6 };

/*
 * The client's address and port, as both sides see them. netns is 0 unless the address is a
 * loopback one, which means something else in each pod.
 */
struct client_key {
	__be32 addr[4];
	__u64 netns;
	__u32 port;
	__u32 reserved;
};

/* What track notes when a SYN reaches a listener. */
struct syn {
	__u64 server_netns;
	__u64 written_ns; /* CLOCK_MONOTONIC */
	__u32 server_port;
	__u16 claimed; /* enum claim; 0 until the handshake of a client in an enrolled pod is done */
	__u16 blocking; /* the listener is in blocking mode */
};

enum claim {
	CLAIM_PAIR = 1,
	CLAIM_WATCH, /* not to be paired; the server's socket is watched for its mode */
};

/*
 * The two sockets of a handshake find each other by this. Both sides know both
 * initial sequence numbers, DNAT does not rewrite them, and nobody else can
 * guess them.
 */
struct pending_key {
	__u32 client_seq;
	__u32 server_seq;
	__be32 addr[4];
	__u32 port;
	__u32 reserved;
};

struct pending {
	__u64 flow;
	__u64 written_ns;
};

/* The storage of a socket: its flow and side. */
struct sk_flow {
	__u64 flow; /* 0: none: see watch_mode and has_options */
	__u32 side;
	__u32 skip; /* above 0: the socket has left, and skips so many callbacks, and all reads: see may_return */
};

enum side_index { SIDE_CLIENT, SIDE_SERVER, SIDE_MAX };

enum flow_state {
	FLOW_CLIENT_JOINED = 1,
	FLOW_SERVER_JOINED = 2,
	FLOW_CLIENT_GONE = 4,
	FLOW_SERVER_GONE = 8,
	/*
	 * Nothing is redirected to the socket any more: it is evicted once it has read
	 * everything.
	 */
	FLOW_CLIENT_EVICTING = 16,
	FLOW_SERVER_EVICTING = 32,
	FLOW_CLIENT_EVICTED = 64,
	FLOW_SERVER_EVICTED = 128,
	/* Both sockets of a watched connection have to be ready before they have joined: see watch.h. */
	FLOW_CLIENT_READY = 256,
	FLOW_SERVER_READY = 512,
	/*
	 * The flow's id stands above these bits, so that a compare-and-swap fails on a
	 * record that was used again.
	 */
	FLOW_STATE_BITS = 10,
};

#define FLOW_ANY_EVICTING (FLOW_CLIENT_EVICTING | FLOW_SERVER_EVICTING)
#define FLOW_JOINED (FLOW_CLIENT_JOINED | FLOW_SERVER_JOINED)
#define FLOW_READY (FLOW_CLIENT_READY | FLOW_SERVER_READY)
/* Both sockets have left, and neither is closed. Otherwise as after FLOW_JOINED. */
#define FLOW_LEFT (FLOW_JOINED | FLOW_ANY_EVICTING | FLOW_CLIENT_EVICTED | FLOW_SERVER_EVICTED)

enum verdict {
	VERDICT_REFUSE, /* do not pair new connections; flows go by TCP */
	VERDICT_ALLOW,
	VERDICT_HOLD, /* pair new connections, but keep them on TCP */
};

enum sending_flag {
	/* The direction has met its limit, and the receiver has not read everything since. */
	SENDING_SPILLED = 1,
	/* What the receiver has proved has been noted for the port. */
	SENDING_LEARNED = 2,
	/* That the shortcut pays for the flow has been noted for the port. */
	SENDING_PAYS = 4,
};

/*
 * One direction. deliver writes it, and track sets evict, both under the
 * sending socket's lock; only charge is written without it. TCP bytes are
 * derived from write_seq, so that bytes which reach TCP without passing deliver
 * count as well. A position counts bytes from the start of the connection, by
 * shortcut and by TCP together.
 */
struct sending {
	__u64 shortcut_bytes;
	__u64 tcp_bytes; /* up to last_seq */
	__u32 last_seq; /* write_seq when deliver last ran */
	__u32 drained_seq; /* the last write_seq that the peer's copied_seq was seen to equal */
	__u32 busy; /* deliver is at work */
	__u32 generation; /* generation of the policy that verdict is from */
	__u8 verdict; /* enum verdict */
	__u8 tcp_cost; /* what a byte of TCP takes of the receive buffer: see measure_cost */
	__u8 blocking; /* of the policy */
	__u8 leaves; /* above 0: both sockets are to be evicted, for this enum outcome: see leave.h */
	__u32 policy_reason;
	enum outcome reason; /* why the last message that went by TCP did not take the shortcut */
	__u32 switches; /* from TCP to the shortcut */
	__u32 last_size; /* of the last message, in bytes */
	__u8 shortcut; /* the last message took the shortcut */
	__u8 evict; /* the sending socket is to be evicted */
	__u8 evict_peer; /* the receiving socket is to be evicted */
	__u8 flags; /* enum sending_flag */
	__u64 redirect_end; /* FROZEN: position after the last redirected byte */

	__u64 last_tcp_ns; /* CLOCK_MONOTONIC, when TCP last took a message */
	__u64 mark; /* position up to which queued_before counts messages */
	__u64 charge; /* redirect_end << 32 | bytes charged to the receiving pod (map charges) */
	__u32 queued_before; /* redirected messages up to mark; 0 once all up to mark is read */
	__u32 queued_since; /* redirected messages after mark */
	__u32 limit; /* bytes that may be unread, each message counting MESSAGE_COST more */
	__s32 missed; /* FROZEN: bytes that were read and not counted, see recount; below 0: counted twice */
	__u32 burst; /* bytes sent since the sender last read something */
	__u32 proved; /* the largest burst that the receiver has taken by recv */
	__u32 bulk; /* bytes of bursts above BURST_SMALL that the receiver has taken by recv */
	__u32 answered; /* low word of what the sender had read itself when the last burst ended */
	__u64 grown; /* what the receiver had read when limit last grew */
};

/* Returns the position in the stream after all that was sent, as far as is counted. */
static __always_inline __u64 sent(const struct sending *dir)
{
	return dir->shortcut_bytes + dir->tcp_bytes;
}

/* Returns true if messages go by TCP for what the receiver does, or has set, and mostly for good. */
static __always_inline bool lasts(enum outcome outcome)
{
	switch (outcome) {
	case OUTCOME_EDGE:
	case OUTCOME_UNSUPPORTED:
	case OUTCOME_ZEROCOPY:
	case OUTCOME_LOWAT:
	case OUTCOME_ULP:
		return true;
	default:
		return false;
	}
}

enum read_state {
	READ_SEEN = 1,
	READ_UNSUPPORTED = 2,
	READ_ANEW = 4, /* the next read starts the count: see count_anew */
};

/*
 * Calls and options that do not work on a socket in the SOCKHASH as on a plain one: see
 * unsupported.h.
 */
enum unsupported {
	UNSUPPORTED_WAITALL = 1, /* recv with MSG_WAITALL */
	UNSUPPORTED_OOB = 2, /* send or recv with MSG_OOB */
	UNSUPPORTED_RECV_FLAGS = 4, /* recv with any other flag outside RECV_SUPPORTED */
	UNSUPPORTED_LOWAT = 8, /* SO_RCVLOWAT above 1 */
	UNSUPPORTED_FIONREAD = 16,
	UNSUPPORTED_SPLICE = 32,
	UNSUPPORTED_ULP = 64, /* kTLS or another upper layer protocol */
	UNSUPPORTED_ZEROCOPY = 128, /* SO_ZEROCOPY */
	UNSUPPORTED_MPTCP_LISTENER = 256,
	UNSUPPORTED_BLOCKING = 512, /* a server's socket in blocking mode */
	UNSUPPORTED_TCP_OPTIONS = 1024, /* another program writes options into its segments */
	UNSUPPORTED_MAX = 11,
};

#define READS_MAX (1U << 30)

/* One receiver. observe and the guards write it. */
struct receiving {
	__u64 read_bytes; /* FROZEN */
	enum read_state state;
	__u32 unsupported_flags; /* of recv */
	__u32 blocking_reader; /* the last thread that read without MSG_DONTWAIT, or 0 */
	__u32 reads; /* finished recv calls, also those on earlier connections to the port: at most READS_MAX */
	__u32 drains; /* recv calls that found nothing after one that was not filled, as for reads */
	__u32 unfilled; /* the last recv call was not filled */
	__u32 window; /* the limit of the window before on_transmit lowered it, in bytes, or 0 */
	__u32 reads_needed; /* reads before anything is redirected: see await_reads */
	__u64 began; /* position of the stream at its start, or where there was no room: see window.h */
	/* Of the messages that this socket has sent lately; deliver writes them: see leave.h. */
	__u32 paid;
	__u32 unpaid;
	__u32 heard; /* low word of what the peer had sent when these were last weighed */
	__u32 returns; /* segments of data after which a socket that has left may join again, or 0 */
};

/* How fast messages went one way. */
struct pace {
	__u64 bytes;
	__u64 ns; /* from one message to the next */
};

/*
 * Of a direction: how fast it is each way, as far as it is a stream. deliver writes it, and
 * cpu is observe's: see compare.h.
 */
struct compare {
	struct pace shortcut;
	struct pace tcp;
	__u32 last_ns; /* CLOCK_MONOTONIC, of the last message, low word */
	__u32 answered; /* low word of what the sender had read itself at the last message */
	__u32 window; /* of the last message */
	__u32 began; /* the window in which comparing has begun, or ended */
	__u32 kept; /* bytes in 1024 ns by the shortcut, when it was last found faster */
	__u16 rest; /* windows until it begins again */
	__u16 row; /* messages that were sent without an answer */
	__u8 overlaps; /* how many messages lately found something unread: see OVERLAP_STEP */
	__u8 comparing;
	__u8 slower; /* the shortcut is: the flow is to leave */
	__u8 turn; /* enum turn, of the last message */
	__u8 longer; /* windows are, as a power of 2 */
	__s8 apart; /* above 0: the ends mostly run on different CPUs */
	__u16 cpu; /* on which this side has last read */
};

struct side {
	struct sending sending; /* FROZEN */
	struct receiving receiving; /* FROZEN */
	struct compare compare;
};

/*
 * A flow. The record starts with 8 bytes and goes on in blocks of 64. The
 * kernel puts an element header of 48 bytes and the key of 8 bytes before it,
 * so what the two sockets write lies on cache lines of its own.
 *
 * FROZEN are the name of the struct, cookie and side, and that the socket of a side has
 * read all that was redirected to it once side[1 - side].sending.redirect_end is not above
 * side[side].receiving.read_bytes + side[1 - side].sending.missed.
 */
struct flow {
	__u64 state; /* id << FLOW_STATE_BITS | enum flow_state */

	__u64 cookie[SIDE_MAX]; /* FROZEN */
	__u64 sock[SIDE_MAX]; /* kernel address of the tcp_sock */
	__u64 netns[SIDE_MAX];
	__u64 since_ns; /* CLOCK_MONOTONIC */

	__be32 client_addr[4];
	__be32 orig_dst_addr[4]; /* not server_addr behind a Service */
	__be32 server_addr[4];
	__u16 client_port;
	__u16 orig_dst_port;
	__u16 server_port;
	__u8 port_in_doubt; /* the server's pod has redirected orig_dst_port to server_port */
	__u8 watched; /* enum watched of joining.h */
	__u32 unsupported[SIDE_MAX]; /* enum unsupported: what is remembered of what the side did */
	__u32 client_seq;
	__u32 server_seq;

	struct side side[SIDE_MAX]; /* FROZEN */
};

_Static_assert(sizeof(struct client_key) == 32, "no padding in keys");
_Static_assert(sizeof(struct pending_key) == 32, "no padding in keys");
_Static_assert(sizeof(struct sending) == 2 * 64, "two cache lines");
_Static_assert(sizeof(struct receiving) == 64, "a cache line");
_Static_assert(sizeof(struct compare) == 64, "a cache line");
_Static_assert(sizeof(struct flow) == 8 + 64 + 64 + 8 * 64, "whole cache lines behind the state");

/*
 * Key of the policy, a longest-prefix match. The 128 bits of the client's and
 * the server's netns must always match, and of the port as many bits as the
 * prefix has. For example, the ports 8000 to 8015 are one prefix of 128 + 12
 * bits; most ranges take a few prefixes.
 */
struct policy_key {
	__u32 prefixlen;
	__u32 client[2]; /* the cookie in two words: an LPM key has no 64-bit alignment */
	__u32 server[2];
	__be16 port;
	__u16 reserved;
};

/* Prefix lengths of keys in bits: of the two pods, and of these with one port. */
enum policy_prefix { POLICY_PREFIX_PODS = 128, POLICY_PREFIX_PORT = 144 };

struct policy {
	enum verdict verdict;
	__u32 reason; /* policy.Reason of the agent; the programs only store it */
	__u32 blocking; /* both pods let blocking sockets take part: see allows_blocking */
};

/*
 * Key of what is known of a server port: with client 0 what the server's
 * programs have shown, else what those of that client's pod have shown on
 * connections to the port.
 */
struct learned_key {
	__u64 server; /* netns */
	__u64 client;
	__u32 port;
	__u32 reserved;
};

struct learned_value {
	__u64 since_ns; /* CLOCK_MONOTONIC, when the first reason was noted */
	__u32 reasons; /* enum unsupported; new connections are not paired unless it is 0 */
	/* What the program has proved as a receiver: as in struct sending and receiving. */
	__u32 reads;
	__u32 proved;
	__u32 bulk;
	__u32 drains;
	__u32 limit;
	__u16 non_blocking; /* the server was seen to accept into non-blocking mode */
	__u16 early; /* of the server's entry, as the rest: connections join at the handshake */
	__u32 join_after; /* segments, if more than in the settings: see joins_after */
	__u64 join_ns; /* CLOCK_MONOTONIC, when that was set */
};

_Static_assert(sizeof(struct learned_key) == 24, "no padding in keys");

/* Entries that one pod uses of the maps that connections fill. */
struct share {
	__u32 flows;
	__u32 learned;
};

/* FROZEN are the name of the struct, redirect and layout. */
struct settings {
	__u32 generation; /* raised after every change of the policy */
	__u32 redirect; /* FROZEN: 0 sends every message by TCP */
	__u32 budget; /* bytes: the highest limit of a direction */
	__u32 allow_blocking; /* of all pods: see allows_blocking */
	__u64 pod_budget; /* bytes that all receivers of a pod may leave unread, counted as for limit */
	__u64 refresh_ns; /* a direction sends a message by TCP at least this often; 0: never */
	__u64 lease_ns; /* CLOCK_MONOTONIC until which the policy may be trusted; 0: for ever */
	__u32 trial_reads; /* see on_trial */
	__u32 trial_bytes;
	__u32 trial_drains; /* see edge_triggered */
	__u32 flow_share; /* entries of flows that one pod may use */
	__u32 learned_share;
	__u32 no_mptcp_listeners; /* do not pair what MPTCP listeners accept: see keep_mptcp_out */
	__u32 splice_seen; /* a guard sees receivers that use splice: see recount */
	__u32 no_callbacks; /* sockets that join late get none: see end_late */
	__u32 join_after; /* segments of data before a connection joins; 0: all join at the handshake */
	__u32 leave_ratio; /* see weigh; 0: no flow leaves */
	__u32 layout; /* FROZEN: enum layout */
	__u32 compare; /* eighths of TCP's speed that the shortcut must reach for a stream; 0: not compared */
	__u32 busy_ns; /* between messages, of a stream that sends as fast as it can: see sets_pace */
	__u32 untraced; /* the kernel does not run the guards, nor observe_fexit */
	__u64 join_halves_ns; /* after this, half of a port's own join_after is enough */
};

/* The argument of end_flow. */
struct flow_id {
	__u64 id;
};

struct count {
	__u64 number;
	__u64 bytes;
};

#endif

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Joining: what programs and agent tell each other of connections that may become flows.
 * Addresses and ports are as in flow.h.
 */
#ifndef PODSHUNT_JOINING_H
#define PODSHUNT_JOINING_H

#include <linux/types.h>

#include "flow.h"

/* A socket of an open connection, for the agent: see find_sockets. */
struct open_socket {
	__u64 cookie;
	__u64 netns;
	__be32 local_addr[4];
	__be32 remote_addr[4];
	__u16 local_port;
	__u16 remote_port;
	/* Where the two streams began: a client's own one with its SYN, all others with a byte. */
	__u32 sends_from;
	__u32 receives_from;
	__u32 reserved;
};

enum join_step {
	JOIN_START,
	JOIN_INSERTED, /* in the SOCKHASH */
	JOIN_READY, /* waits for the peer */
	JOIN_GIVE_UP, /* agent: it was not ready in time */
	JOIN_LEAVE, /* its peer does not join */
	JOIN_EVICT, /* agent: it has joined, and is to be evicted */
};

/* A socket that is to join, or that offers to, and the flow that is to be made. */
struct join_entry {
	__u64 flow;
	__u64 cookie[SIDE_MAX];
	__u64 netns[SIDE_MAX];
	__be32 client_addr[4];
	__be32 orig_dst_addr[4];
	__be32 server_addr[4];
	__u16 client_port;
	__u16 orig_dst_port;
	__u16 server_port;
	__u8 side; /* the socket's own */
	__u8 step; /* enum join_step */
	__u32 client_seq;
	__u32 server_seq;
	__u32 visits; /* by join_sockets; without one in a round, the socket is gone */
	__u32 callbacks; /* those that the socket had before */
	__u32 generation; /* that of the policy that holds the watched connection: see take_offer */
	__u16 watched; /* enum watched */
	__u16 blocking; /* 1 << side for each socket in blocking mode */
};

/* The two streams of a connection: the sequence numbers of the first byte of each. */
struct numbers {
	__u32 client_seq;
	__u32 server_seq;
};

/* How the connection has joined. */
enum watched {
	WATCHED = 1, /* by watch.h; 0: at its handshake, or as an open one */
	WATCHED_LATE, /* so, and long after it had earned it, as when the agent was away */
};

/* A socket of a watched connection that has earned to join: see watch.h. */
struct candidate {
	__u64 flow;
	__u64 cookie;
	__u32 side;
	enum join_step step; /* JOIN_START, JOIN_INSERTED or JOIN_LEAVE */
};

#endif

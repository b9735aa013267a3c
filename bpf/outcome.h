/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * What became of a message (one for each run of deliver), of a connection or of
 * a socket (decisions of track). Each is counted once, under one of these.
 * agent/datapath/outcome.go has their codes; a test walks to OUTCOME_MAX.
 */

#ifndef PODSHUNT_OUTCOME_H
#define PODSHUNT_OUTCOME_H

enum outcome {
	/* Messages, in bytes and number. The first is the shortcut, all others went by TCP. */
	OUTCOME_SHORTCUT,
	OUTCOME_UNKNOWN_SOCKET, /* in the SOCKHASH, but its flow record is gone */
	OUTCOME_SWITCHED_OFF, /* podshunt is unloading */
	OUTCOME_UNTRACED, /* the kernel does not run the guards, nor observe_fexit */
	OUTCOME_PEER_MISSING, /* the peer's socket has not joined */
	OUTCOME_PEER_GONE, /* the peer's socket is closed */
	OUTCOME_NO_GAIN, /* both sockets are evicted, or about to be: see leave.h */
	OUTCOME_EVICTED, /* either socket is evicted, or about to be: see lifetime.h */
	OUTCOME_STALE, /* the agent has not vouched for the policy for too long */
	OUTCOME_NOT_ALLOWED, /* policy */
	OUTCOME_SHUT_DOWN, /* the sender has shut down writing: TCP returns the error */
	OUTCOME_ULP, /* kTLS or another upper layer protocol on either socket */
	OUTCOME_ZEROCOPY, /* the sender has SO_ZEROCOPY: only TCP sends completions */
	OUTCOME_LOWAT, /* the receiver has SO_RCVLOWAT above 1 */
	OUTCOME_NOT_SEEN, /* the receiver has not been seen to read by recv */
	OUTCOME_UNSUPPORTED, /* either end was seen to use a call that does not work on the shortcut: see unsupported.h */
	OUTCOME_TRIAL, /* the receiver has not yet proved by TCP that it takes such messages by recv */
	OUTCOME_EDGE, /* the receiver waits for an edge of epoll, and may do so after a recv that was not filled */
	OUTCOME_COMPARED, /* to see how fast TCP is: see compare.h */
	OUTCOME_REFRESH, /* so that conntrack and the like see that the connection is in use */
	OUTCOME_PIGGYBACK, /* to carry TCP's acknowledgement: see carries_ack */
	OUTCOME_DRAINING, /* TCP bytes are still unread */
	OUTCOME_UNOBSERVED, /* TCP bytes left the queue, but no finished recv accounts for them */
	OUTCOME_BUDGET, /* spill: the receiver has left too much unread, see limits.h */
	OUTCOME_RECEIVE_BUFFER, /* spill: TCP's bytes would find no room in the receive buffer */
	OUTCOME_POD_BUDGET, /* spill: all receivers of the pod together have left too much unread */
	OUTCOME_MEMORY, /* the node's TCP uses more memory than the first value of tcp_mem */
	OUTCOME_REDIRECT_REFUSED, /* the kernel did not take the redirect: the peer is closing */
	/* Connections, in number. */
	OUTCOME_PAIRED, /* both sockets have joined */
	OUTCOME_POLICY_REFUSED,
	OUTCOME_PAIRING_STALE, /* as OUTCOME_STALE */
	OUTCOME_UNSUPPORTED_PORT, /* the server port is marked unsupported */
	OUTCOME_SHARE, /* one of the pods has used up its share of flows */
	OUTCOME_KERNEL_SOCKET, /* either end is a socket of the kernel's own, such as AF_SMC's */
	OUTCOME_MPTCP,
	OUTCOME_BLOCKING_CLIENT, /* the client's socket is blocking */
	OUTCOME_BLOCKING_SERVER, /* the listener is in blocking mode, and may accept into it */
	OUTCOME_CLIENT_ULP, /* the client's socket has an upper layer protocol already */
	OUTCOME_SYNS_FULL,
	OUTCOME_SYN_LOST, /* the entry was dropped or replaced before the handshake ended, or never written (SYN cookies) */
	OUTCOME_PENDING_FULL,
	OUTCOME_FLOWS_FULL,
	OUTCOME_SOCKETS_FULL,
	OUTCOME_SOCKET_BUSY, /* another product's sk_msg program holds the socket */
	OUTCOME_NO_MEMORY, /* socket storage or psock could not be allocated */
	OUTCOME_UNMATCHED, /* a client was to be paired, but no pending entry has these sequence numbers */
	OUTCOME_CLIENT_CLOSED, /* the client's socket closed before the server's joined */
	OUTCOME_REUSED, /* a socket is evicted because it connects or listens once more */
	OUTCOME_SOCKET_EVICTED, /* a socket is taken out of the SOCKHASH and goes on as a plain one */
	/* Open connections, in number. */
	OUTCOME_JOINED, /* an open connection has joined: see late.h */
	OUTCOME_JOIN_ENDED, /* it has not: it was closed or shut down meanwhile, or not ready in time */
	OUTCOME_CALLBACKS, /* the kernel gives an open connection no callbacks */
	OUTCOME_EVICT_DUE, /* a socket is to be evicted */
	OUTCOME_RETURNED, /* a connection that had left has joined again: see may_return */
	OUTCOME_NO_PEER, /* a connection is not watched any more: its other end is in no pod that takes part */
	OUTCOME_MAX,
};

#endif

//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)

/*
 * The object of the shortcut: its maps and its programs. deliver decides about each message
 * (deliver.h), observe counts what is read (observe.h), and track makes flows of handshakes
 * (pairing.h), or watches connections until these have earned it (watch.h), keeps the windows
 * of receivers small (window.h), ends flows (lifetime.h), and leaves other programs of the node
 * their callbacks (neighbour.h). find_sockets (find.h) and join_sockets (late.h) make flows of
 * open connections.
 *
 * All functions are inlined but those that several rare events call: with copies of them track
 * would be twice as long, and to load a program takes the kernel the square of its length.
 */

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "joining.h"
#include "kernel.h"
#include "maps.h"

/* Defaults; the loader raises or lowers them. */
#define POLICY_MAX 131072
#define PENDING_MAX 16384

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
 * What all receivers of a pod have left unread, in bytes and MESSAGE_COST
 * for each message, by netns cookie. Agent: creates and deletes with the
 * pod. deliver: adds. observe, track: subtract. No entry: TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u64);
	__type(value, __s64);
} charges SEC(".maps");

/*
 * SYNs that reached a listener of an enrolled pod. track: writes, reads, and
 * deletes at the end of the handshake; the agent sweeps those of handshakes
 * that never ended. Full: the oldest goes, and its connection stays on TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PENDING_MAX);
	__type(key, struct client_key);
	__type(value, struct syn);
} syns SEC(".maps");

/* Clients that found their entry in syns and wait for the server's socket. Otherwise as syns. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PENDING_MAX);
	__type(key, struct pending_key);
	__type(value, struct pending);
} pending SEC(".maps");

/* FROZEN. Sockets of flows, by cookie. track: adds, evicts. The kernel deletes on close. Full: TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2 * FLOWS_MAX);
	__type(key, __u64);
	__type(value, __u64);
} sockets SEC(".maps");

/* Sockets for insert_candidates. track: creates and deletes. Goes with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct candidate);
} candidates SEC(".maps");

/* Counters of every decision, by enum outcome. All programs: write. Agent: reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, OUTCOME_MAX);
	__type(key, enum outcome);
	__type(value, struct count);
} outcomes SEC(".maps");

/* Keep the types in the BTF that bpf2go reads. */
const struct open_socket *open_socket_type __attribute__((unused));
const enum join_step *join_step_type __attribute__((unused));
const enum flow_state *flow_state_type __attribute__((unused));
const enum policy_prefix *policy_prefix_type __attribute__((unused));
const enum side_index *side_index_type __attribute__((unused));
const enum layout *layout_type __attribute__((unused));
const enum unsupported *unsupported_type __attribute__((unused));

static __always_inline void count(enum outcome outcome, __u64 bytes)
{
	struct count *count = bpf_map_lookup_elem(&outcomes, &outcome);

	if (count) {
		count->number++;
		count->bytes += bytes;
	}
}

static __noinline void look_up_policy(__u64 client, __u64 server, __u16 port, struct policy *policy)
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

static __always_inline bool enrolled(__u64 netns)
{
	return bpf_map_lookup_elem(&pods, &netns) != NULL;
}

/* These use the maps and helpers above. */
#include "deliver.h"
#include "observe.h"
#include "pairing.h"
#include "window.h"
#include "late.h"
#include "watch.h"

/* Returns 1 on every path: the kernel takes 0 for an error of all programs on the cgroup. */
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
		drop_mark(ctx);
		on_listen(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		on_active(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_passive(ctx);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		/* The kernel also asks before it takes a message, to know how long segments get. */
		if (ctx->args[0] == BPF_WRITE_HDR_TCP_CURRENT_MSS)
			break;
		/* fallthrough */
	case BPF_SOCK_OPS_RTT_CB:
		on_traffic(ctx);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		on_tcp_options(ctx, true);
		break;
	case BPF_SOCK_OPS_PARSE_HDR_OPT_CB:
		/* Who asks for all segments may find nothing of its own in this one. */
		if (!(ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG))
			on_tcp_options(ctx, false);
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

char __license[] SEC("license") = "Dual BSD/GPL";

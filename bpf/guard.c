//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)

/*
 * Guards: programs that run before the kernel serves a call that does not work on a
 * shortcut socket. They need trampolines, are loaded one by one, and are attached
 * only while a pod takes part or a flow is left. Each looks at sockets of flows only.
 */

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "flow.h"
#include "kernel.h"
#include "maps.h"
#include "unsupported.h"

#define FIONREAD 0x541B /* include/uapi/asm-generic/ioctls.h */
#define MAY_READ 4 /* include/linux/fs.h */
#define SOL_TCP 6
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define TCP_ULP 31

/*
 * A mark says that the task is inside a call that is to be refused. Two
 * programs are needed: one that may use socket storage decides, and the
 * one that can refuse reads the mark. Its value is the address of the
 * file or socket, so that a stale mark (the kernel may skip splice_ends)
 * fits no other one. Each guard has a map of its own. Goes with the task.
 */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} marks SEC(".maps");

static __always_inline void set_mark(__u64 of)
{
	__u64 *mark = bpf_task_storage_get(&marks, bpf_get_current_task_btf(), NULL,
					   BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (mark)
		*mark = of;
}

/* Returns true if the mark was set, and clears it. */
static __always_inline bool take_mark(__u64 of)
{
	__u64 *mark = bpf_task_storage_get(&marks, bpf_get_current_task_btf(), NULL, 0);

	if (!mark || *mark != of)
		return false;
	*mark = 0;
	return true;
}

static __always_inline struct flow *find_flow(struct sock *sk, __u32 *side)
{
	struct sk_flow *self;
	struct flow *flow;

	if (!sk)
		return NULL;
	self = bpf_sk_storage_get(&sk_flows, sk, NULL, 0);
	if (!self)
		return NULL;
	*side = self->side & 1;
	flow = flow_by_id(self->flow);
	if (!flow)
		return NULL;
	/* The agent proves guards with a flow whose sock is 0: it does not know that. */
	if (flow->sock[SIDE_CLIENT] && flow->sock[*side & 1] != (__u64)sk)
		return NULL;
	return flow;
}

static __always_inline bool evicted(const struct flow *flow, __u32 side)
{
	return flow->state & (side == SIDE_CLIENT ? FLOW_CLIENT_EVICTED : FLOW_SERVER_EVICTED);
}

/*
 * The guard splice. splice does not see redirected bytes. While some are unread it
 * is refused, as for a file that cannot be spliced, and programs read and write
 * instead. From the first call on everything goes by TCP, where splice works.
 */

static __always_inline bool redirected(const struct flow *flow, __u32 side)
{
	const struct sending *toward = &flow->side[side ^ 1].sending;

	return *(volatile __u64 *)&toward->redirect_end >
	       flow->side[side].receiving.read_bytes + toward->missed;
}

/* A message that deliver is at work on may still be redirected, unless it saw the mark. */
static __always_inline bool busy(const struct flow *flow, __u32 side)
{
	return *(volatile __u32 *)&flow->side[side ^ 1].sending.busy;
}

SEC("fentry/do_splice")
int splice_begins(__u64 *ctx)
{
	struct socket *socket = bpf_sock_from_file((struct file *)ctx[0]);
	struct flow *flow;
	__u32 side;
	bool first;

	if (!socket)
		return 0;
	flow = find_flow(socket->sk, &side);
	if (!flow || evicted(flow, side))
		return 0;
	first = !(flow->side[side].receiving.state & READ_UNSUPPORTED);
	/* A full barrier: either deliver sees this, or busy sees deliver at work. */
	mark_unsupported(flow, side, side, UNSUPPORTED_SPLICE);
	/*
	 * A program that has spliced once takes a refusal for the end of the
	 * connection: Go's io.Copy, for example. So a later call is refused only for
	 * redirected bytes: what deliver works on since the first call goes by TCP.
	 */
	if (redirected(flow, side) || (first && busy(flow, side)))
		set_mark(ctx[0]);
	return 0;
}

SEC("fexit/do_splice")
int splice_ends(__u64 *ctx)
{
	if (bpf_sock_from_file((struct file *)ctx[0]))
		take_mark(ctx[0]);
	return 0;
}

/* Runs for every read and write of a file on the node. */
SEC("fmod_ret/security_file_permission")
int splice_refused(__u64 *ctx)
{
	struct file *file = (struct file *)ctx[0];

	if (!(ctx[1] & MAY_READ) || (file->f_inode->i_mode & S_IFMT) != S_IFSOCK)
		return 0;
	return take_mark(ctx[0]) ? -EINVAL : 0;
}

/* sendfile from a socket to a pipe calls this without do_splice. It is too late to refuse. */
SEC("fentry/tcp_splice_read")
int splice_seen(__u64 *ctx)
{
	struct flow *flow;
	__u32 side;

	flow = find_flow(((struct socket *)ctx[0])->sk, &side);
	if (flow && !evicted(flow, side))
		mark_unsupported(flow, side, side, UNSUPPORTED_SPLICE);
	return 0;
}

/*
 * The guard ulp. kTLS would take bytes that were redirected before its setup for decrypted
 * ones. So TCP_ULP fails as on a kernel without kTLS, and programs encrypt themselves.
 * Both programs are on one function: the first may use socket storage, the second refuse.
 */

static __always_inline bool sets_ulp(const __u64 *ctx)
{
	return (int)ctx[1] == SOL_TCP && (int)ctx[2] == TCP_ULP;
}

SEC("fentry/security_socket_setsockopt")
int ulp_begins(__u64 *ctx)
{
	struct flow *flow;
	__u32 side;

	if (!sets_ulp(ctx))
		return 0;
	flow = find_flow(((struct socket *)ctx[0])->sk, &side);
	if (!flow || evicted(flow, side))
		return 0;
	remember(flow, side, UNSUPPORTED_ULP);
	set_mark(ctx[0]);
	return 0;
}

SEC("fmod_ret/security_socket_setsockopt")
int ulp_refused(__u64 *ctx)
{
	return sets_ulp(ctx) && take_mark(ctx[0]) ? -ENOENT : 0;
}

/* The guard fionread, for kernels whose FIONREAD does not count redirected bytes. */
SEC("fentry/tcp_ioctl")
int fionread_seen(__u64 *ctx)
{
	struct flow *flow;
	__u32 side;

	if ((int)ctx[1] != FIONREAD)
		return 0;
	flow = find_flow((struct sock *)ctx[0], &side);
	if (flow)
		mark_unsupported(flow, side, side, UNSUPPORTED_FIONREAD);
	return 0;
}

/* The guard flags: sees flags of recv before it waits, and of send before deliver runs. */

SEC("fentry/tcp_bpf_recvmsg")
int flags_of_recv(__u64 *ctx)
{
	__u32 flags = (__u32)ctx[3] & ~RECV_SUPPORTED;
	struct flow *flow;
	__u32 side;

	if (!flags)
		return 0;
	flow = find_flow((struct sock *)ctx[0], &side);
	if (flow)
		mark_unsupported_flags(flow, side, flags);
	return 0;
}

SEC("fentry/tcp_bpf_sendmsg")
int flags_of_send(__u64 *ctx)
{
	struct msghdr *msg = (struct msghdr *)ctx[1];
	struct flow *flow;
	__u32 side;

	if (!(msg->msg_flags & MSG_OOB))
		return 0;
	flow = find_flow((struct sock *)ctx[0], &side);
	if (flow)
		mark_unsupported(flow, side ^ 1, side, UNSUPPORTED_OOB);
	return 0;
}

char __license[] SEC("license") = "Dual BSD/GPL";

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Kernel structures, with only the fields of interest. CO-RE relocates each
 * read to the layout of the running kernel.
 */
#ifndef PODSHUNT_KERNEL_H
#define PODSHUNT_KERNEL_H

#include <linux/types.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpadded"
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__s64 counter;
} atomic64_t;

typedef struct {
	int counter;
} atomic_t;

struct netns_ipv4 {
	int sysctl_tcp_rmem[3];
};

struct net {
	__u64 net_cookie;
	struct netns_ipv4 ipv4;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct proto {
	atomic64_t *memory_allocated; /* pages */
	long *sysctl_mem; /* tcp_mem, pages */
};

struct sock;

struct in6_addr {
	__be32 words[4];
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	struct sock *skc_listener; /* of a request_sock */
	struct proto *skc_prot;
	possible_net_t skc_net;
	unsigned long skc_flags;
	atomic64_t skc_cookie;
};

struct inode {
	unsigned short i_mode;
};

struct file {
	unsigned int f_flags;
	struct inode *f_inode;
};

struct socket {
	unsigned long flags;
	struct file *file;
	struct sock *sk;
};

struct msghdr {
	unsigned int msg_flags;
};

enum sock_flags { SOCK_ZEROCOPY };

struct list_head {
	struct list_head *next;
};

struct sk_psock {
	struct list_head ingress_msg; /* redirected messages that are unread */
};

struct pipe_inode_info {
	unsigned int head;
	unsigned int tail;
};

struct task_struct {
	void *stack; /* its lowest address */
	struct pipe_inode_info *splice_pipe;
};

struct wait_queue_entry {
	void *private;
	struct list_head entry;
};

struct wait_queue_head {
	struct list_head head;
};

struct socket_wq {
	struct wait_queue_head wait;
};

struct epoll_event {
	__u32 events;
};

struct epitem {
	struct epoll_event event;
};

struct eppoll_entry {
	struct epitem *base;
	struct wait_queue_entry wait;
};

struct sock {
	struct sock_common __sk_common;
	struct socket_wq *sk_wq;
	struct socket *sk_socket;
	void *sk_user_data;
	void *sk_data_ready; /* a function */
	int sk_rcvbuf;
	struct {
		atomic_t rmem_alloc;
	} sk_backlog;
	int sk_rcvlowat;
	int sk_err;
	__u8 sk_shutdown;
	__u8 sk_kern_sock : 1;
	__u8 sk_userlocks : 4;
};

struct inet_sock {
	struct sock sk;
};

struct tcp_ulp_ops;

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	const struct tcp_ulp_ops *icsk_ulp_ops;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u64 bytes_received;
	__u64 bytes_acked;
	__u32 data_segs_in;
	__u32 data_segs_out;
	__u32 rcv_nxt;
	__u32 rcv_wup;
	__u32 copied_seq;
	__u32 write_seq;
	__u32 snd_una;
	__u32 snd_wnd; /* what the receiver has room for */
	__u32 mss_cache;
	__u32 window_clamp; /* the limit of what this socket tells its sender */
	_Bool is_mptcp;
	__u8 repair : 1;
	__u8 nonagle : 4;
	__u8 bpf_sock_ops_cb_flags;
};

struct seq_file;

/* The contexts of iterators. */
struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	void *map;
	struct sock *sk;
	void *value;
};

/* The kernel's own structure behind the context of a sock_ops program. */
struct bpf_sock_ops_kern {
	struct sock *sk;
};

#pragma clang attribute pop
#pragma clang diagnostic pop

/* Linux 6.2. */
extern void *bpf_rdonly_cast(const void *address, __u32 type) __ksym __weak;

/*
 * Reads a field of a kernel structure whose memory may have been freed: with bpf_rdonly_cast
 * by a load, which gives 0 where the address cannot be read, or else by a call of
 * bpf_probe_read_kernel, which takes some 20 ns. Returns 0, or the error of the call.
 */
#define read_field(to, from, field)                                                                \
	({                                                                                         \
		long _err = 0;                                                                     \
		if (bpf_rdonly_cast) {                                                             \
			typeof(*(from)) *_from =                                                   \
				bpf_rdonly_cast(from, bpf_core_type_id_kernel(typeof(*(from))));   \
			*(to) = *(volatile typeof(*(to)) *)&_from->field;                          \
		} else {                                                                           \
			_err = bpf_core_read(to, sizeof(*(to)), &(from)->field);                   \
		}                                                                                  \
		_err;                                                                              \
	})

#endif

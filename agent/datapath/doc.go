// SPDX-License-Identifier: Apache-2.0

// Package datapath is the sole owner of podshunt's kernel objects: it loads the
// programs, attaches and pins them, writes which pods take part and what is
// allowed between them, reads what became of it, and takes everything out
// again without losing a byte.
//
// Objects live under one directory of a bpffs. They outlive the process: flows
// and new pairings go on while no agent runs, and the next Open takes them over.
//
// Four words name why a socket or a message is not on the shortcut, here and in
// the C, in counters and in what users read (docs/glossary.md has all words):
//
//   - blocking: the socket has no O_NONBLOCK, so its recv may sleep in the kernel,
//     and can then return EAGAIN on the shortcut. Such sockets are not paired, unless
//     Config.AllowBlocking lets them in (bpf/blocking.h).
//   - unsupported: a call or an option, such as splice, does not work on the shortcut
//     as on TCP. Whatever uses it stays on TCP: the direction, and new connections to
//     the server port (unsupported.go, bpf/unsupported.h).
//   - evict: a socket is taken out of the SOCKHASH without losing a byte, because it
//     turned out to be blocking, for example. Its connection goes on by TCP
//     (bpf/lifetime.h).
//   - budget: the most bytes that a receiver may leave unread, Config.Budget for each
//     direction and Config.PodBudget for all receivers of a pod. What would exceed it
//     spills: it goes by TCP, whose window stops the sender (bpf/limits.h).
package datapath

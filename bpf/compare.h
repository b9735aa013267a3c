/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */

/*
 * Compare: whether the shortcut is faster than TCP for a stream, by trying both in turns. What
 * decides that is the size of the messages, how many CPUs the ends run on, whether both send at
 * once (a redirect waits for the receiver's lock, where TCP does not), and what the scheduler
 * makes of it: no rule foresees it. Requests and answers are not compared, as they always gain.
 */
#ifndef PODSHUNT_COMPARE_H
#define PODSHUNT_COMPARE_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "kernel.h"

/* Time is cut into windows of 1 << WINDOW_SHIFT ns (4.2 ms), the same for all flows. */
#define WINDOW_SHIFT 22

/* What windows are for, in turns. */
enum turn {
	TURN_SHORTCUT, /* measured */
	TURN_TCP,
	TURN_SETTLE, /* the shortcut, while TCP's bytes are still read */
	TURNS,
};

/* It is decided after so many windows at first, in doubt after so many at last. */
#define COMPARE_LEAST 6U
#define COMPARE_MOST 12U
/* Without enough messages by then there is no decision. */
#define COMPARE_GIVE_UP 48U
/* At most so long, in ns, is needed of either way. */
#define MEASURED_LEAST (1ULL << 21)
/* How many times as far apart messages are that are too few to tell. */
#define SPARSE 10ULL
/* The most windows between two messages of a sender that is not idle. */
#define WINDOWS_IDLE 2
/* Windows until it is compared again: at first, and in the end. */
#define REST_FIRST 256
#define REST_LAST 16384
/* A stream that has half its pace, measured for so long, in ns, is compared at once. */
#define SLOW_LEAST (1ULL << 25)

/*
 * A message counts OVERLAP_STEP if something was unread, or if it follows ROW others without an
 * answer, and less 1 if not: a quarter makes a stream.
 */
#define ROW 4
#define OVERLAP_STEP 3
#define OVERLAP_STREAM 48
#define OVERLAP_MAX 96

/* So many messages more from another CPU than the peer reads on, or less, tell where the ends run. */
#define APART 32
/* Windows are so much longer, as a power of 2, for ends on one CPU. */
#define LONGER 2

#define TCP_NAGLE_OFF 1 /* include/net/tcp.h */

/* Messages below this size are joined by TCP: a segment has room for them. */
#define NAGLE_SIZE 1460
/* From here on messages are long for a window of 64 KiB. */
#define MESSAGE_LARGE (32 << 10)

/* Returns true if TCP joins messages of this size, as the sender has no TCP_NODELAY. */
static __always_inline bool tcp_joins(const struct tcp_sock *tp, __u32 size)
{
	return size < NAGLE_SIZE && !(BPF_CORE_READ_BITFIELD(tp, nonagle) & TCP_NAGLE_OFF);
}

/*
 * Returns how many eighths of TCP's pace the shortcut must reach. In the SOCKHASH, TCP itself is
 * slower than outside, to which the flow would leave: by about an eighth; by more where it
 * waits to join small messages, and for large ones in a row, as its window is kept small (window.h).
 */
static __always_inline __u32 needed(const struct compare *c, const struct settings *set,
				    const struct tcp_sock *tp, __u32 size)
{
	if (size >= MESSAGE_LARGE && c->row >= ROW)
		return set->compare * 14 / 9;
	return tcp_joins(tp, size) ? set->compare * 12 / 9 : set->compare;
}

/* Returns true if what this side sends is a stream, and not requests or answers. */
static __always_inline bool in_stream(const struct flow *flow, __u32 own)
{
	return flow->side[own & 1].compare.overlaps >= OVERLAP_STREAM;
}

/* Returns true if this side mostly sends on the CPU on which its peer reads. */
static __always_inline bool on_one_cpu(const struct flow *flow, __u32 own)
{
	return flow->side[own & 1].compare.apart <= -APART;
}

/*
 * Returns true if both sides send streams at once, the peer at least a quarter as many messages, as
 * these are weighed (leave.h). A client that waits for a long answer sends no stream.
 */
static __always_inline bool both_stream(const struct flow *flow, __u32 own)
{
	const struct receiving *mine = &flow->side[own & 1].receiving;
	const struct receiving *other = &flow->side[(own ^ 1) & 1].receiving;

	return in_stream(flow, own) && in_stream(flow, own ^ 1) &&
	       (__u32)sent(&flow->side[(own ^ 1) & 1].sending) != mine->heard &&
	       4 * (other->paid + other->unpaid) >= mine->paid + mine->unpaid;
}

/* Returns true if the peer has sent at least a quarter as many bytes. */
static __always_inline bool two_way(const struct flow *flow, __u32 own)
{
	return 4 * sent(&flow->side[(own ^ 1) & 1].sending) >= sent(&flow->side[own & 1].sending);
}

static __always_inline __u64 bytes_per_us(const struct pace *p)
{
	return (p->bytes << 10) / p->ns;
}

/*
 * Returns true if the program sets the pace, and not the way of its messages: by TCP, more time passes
 * between messages of this size than idle_ns and what they take at 1 Gbit/s. Both ways are as fast then.
 */
static __always_inline bool sets_pace(const struct compare *c, __u64 idle_ns, __u32 size)
{
	return c->tcp.ns * size > c->tcp.bytes * (idle_ns + 8ULL * size);
}

/* Decides after a window. Returns true if the comparison is over. */
static __always_inline bool judge(struct compare *c, const struct settings *set, __u32 needed,
				  __u32 size, __u32 window)
{
	__u64 shortcut = 8 * c->shortcut.bytes * c->tcp.ns;
	__u64 tcp = c->tcp.bytes * c->shortcut.ns;
	__u32 passed = window - c->began;

	if (passed < COMPARE_LEAST << c->longer)
		return false;
	if (c->shortcut.ns < MEASURED_LEAST << c->longer || c->tcp.ns < MEASURED_LEAST << c->longer)
		return passed > COMPARE_GIVE_UP << c->longer;
	/* So few messages show nothing. */
	if (sets_pace(c, SPARSE * set->busy_ns, size))
		return true;
	if (shortcut >= needed * tcp || (shortcut >= 7 * tcp && sets_pace(c, set->busy_ns, size))) {
		c->kept = bytes_per_us(&c->shortcut);
		return true;
	}
	if (passed < COMPARE_MOST << c->longer && shortcut >= 7 * tcp)
		return false;
	c->slower = true;
	return true;
}

/* Ends a comparison, and says when the next one begins. */
static __always_inline void rest(struct compare *c, __u32 window)
{
	c->comparing = false;
	if (c->rest < REST_LAST)
		c->rest = c->rest ? 2 * c->rest : REST_FIRST;
	c->began = window;
}

/* Begins to compare, or ends it, at the first message of a window. */
static __always_inline void next_window(struct compare *c, const struct settings *set, __u32 needed,
					__u32 size, bool by_shortcut, __u32 window)
{
	__u32 passed = window - c->began;

	if (c->comparing) {
		if (!judge(c, set, needed, size, window))
			return;
		rest(c, window);
	} else if (!by_shortcut) {
		return;
	} else if (!c->rest && c->apart < APART) {
		/* What is on one CPU takes turns in steps of the scheduler's: it takes longer. */
		if (c->apart <= -APART) {
			c->rest = REST_FIRST;
			c->began = window;
		}
		return;
	} else if (passed >= c->rest ||
		   (c->shortcut.ns >= SLOW_LEAST && 2 * bytes_per_us(&c->shortcut) < c->kept)) {
		c->comparing = true;
		c->longer = c->apart < APART ? LONGER : 0;
		c->began = window;
	} else if (c->shortcut.ns < SLOW_LEAST) {
		return;
	}
	c->shortcut.bytes = c->shortcut.ns = 0;
	c->tcp.bytes = c->tcp.ns = 0;
}

/*
 * Returns true if TCP is to take a message of a side that does not compare, as the peer does, and
 * has TCP's turn: a flow that leaves is on TCP in both directions. If one stayed on the shortcut,
 * TCP would seem slower to the other than it is.
 */
static __always_inline bool follows(const struct compare *peer, __u32 window)
{
	return peer->comparing && window - peer->window <= WINDOWS_IDLE &&
	       (window >> peer->longer) % TURNS == TURN_TCP;
}

/*
 * Notes a message that might take the shortcut. Returns true if TCP is to take it, to compare.
 * overlaps says that something sent in either direction is unread. The time from one message to
 * the next counts for the turn of the first, unless it is so long that the sender was idle.
 */
static __always_inline bool take_turns(struct flow *flow, __u32 own, const struct settings *set,
				       const struct tcp_sock *tp, __u32 size, bool overlaps)
{
	const struct sending *dir = &flow->side[own & 1].sending;
	const struct sending *other = &flow->side[(own ^ 1) & 1].sending;
	const struct compare *peer = &flow->side[(own ^ 1) & 1].compare;
	struct compare *c = &flow->side[own & 1].compare;
	enum turn turn = TURN_SHORTCUT;
	struct pace *pace;
	__u32 window;
	__u64 now;

	if (!set->compare)
		return false;
	if (c->answered != (__u32)flow->side[own & 1].receiving.read_bytes) {
		c->answered = flow->side[own & 1].receiving.read_bytes;
		c->row = 0;
	} else if (c->row < ROW) {
		c->row++;
	}
	/* By TCP a stream may overlap less, and is compared all the same. */
	if (c->turn != TURN_TCP) {
		if (!overlaps && c->row < ROW)
			c->overlaps -= c->overlaps > 0;
		else if (c->overlaps < OVERLAP_MAX)
			c->overlaps += OVERLAP_STEP;
	}
	if (peer->cpu == (__u16)bpf_get_smp_processor_id())
		c->apart -= c->apart > -APART;
	else
		c->apart += c->apart < APART;
	/* The direction that sends more decides. */
	if (!in_stream(flow, own) || sent(dir) < sent(other) / 2) {
		if (c->comparing)
			rest(c, c->window);
		c->turn = TURN_SHORTCUT;
		return peer->comparing && follows(peer, bpf_ktime_get_ns() >> WINDOW_SHIFT);
	}
	now = bpf_ktime_get_ns();
	window = now >> WINDOW_SHIFT;
	if (window - c->window <= WINDOWS_IDLE && c->turn != TURN_SETTLE) {
		pace = c->turn == TURN_TCP ? &c->tcp : &c->shortcut;
		pace->bytes += dir->last_size;
		pace->ns += (__u32)now - c->last_ns;
	}
	if (window != c->window)
		next_window(c, set, needed(c, set, tp, size), size, dir->shortcut, window);
	if (c->comparing)
		turn = (window >> c->longer) % TURNS;
	else if (follows(peer, window))
		turn = TURN_TCP;
	c->turn = turn;
	c->window = window;
	c->last_ns = now;
	return turn == TURN_TCP;
}

#endif

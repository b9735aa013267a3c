// SPDX-License-Identifier: Apache-2.0

// What is measured: the rows of the tables, and the ways to connect the two pods that
// are compared in each.

package main

import (
	"fmt"
	"strings"

	"github.com/podshunt/podshunt/agent/datapath"
	"github.com/podshunt/podshunt/e2e/measure"
)

// row is one line of the result.
type row struct {
	kind measure.Kind
	// size is that of a message; connections have requests instead.
	size, requests int
	noDelay        bool
	mode           mode
	// watched rows are also measured with connections that are watched and do not join;
	// watchedOnly ones with nothing else of podshunt.
	watched, watchedOnly bool
	// bare rows are measured with nothing loaded as well.
	bare bool
}

// mode is how podshunt is loaded for a row, and what the row's sockets are like.
type mode string

const (
	// usual is the agent's default: only non-blocking sockets take part.
	usual mode = ""
	// watching lets no connection join. It is for rows whose connections end before that, and for
	// what is watched, where a kernel lets none join but at its handshake.
	watching mode = "watching"
	// blocking accepts the hazard of sockets in blocking mode, and uses such sockets.
	blocking mode = "blocking"
	// watchingBlocking is both.
	watchingBlocking mode = "watching, blocking"
)

func modes() []mode { return []mode{usual, watching, blocking, watchingBlocking} }

// change makes the datapath's settings those of the mode.
func (m mode) change(cfg *datapath.Config) {
	switch m {
	case usual:
	case watching:
		cfg.WatchOnly = true
	case blocking:
		cfg.AllowBlocking = true
	case watchingBlocking:
		cfg.AllowBlocking, cfg.WatchOnly = true, true
	}
}

// blocks says whether the row's sockets are in blocking mode.
func (m mode) blocks() bool { return m == blocking || m == watchingBlocking }

const (
	kib = 1 << 10
	mib = 1 << 20
)

// rows lists what is measured. noWatch says that watched connections cannot join on this
// kernel: then those that are watched have rows of their own.
func rows(noWatch bool) []row {
	var all []row
	for _, noDelay := range []bool{true, false} {
		each := func(kind measure.Kind, sizes ...int) {
			for _, size := range sizes {
				all = append(all, row{
					kind: kind, size: size, noDelay: noDelay,
					watched: kind == measure.PingPong && noDelay && (size == 1 || size == kib),
					bare:    kind == measure.PingPong && noDelay && size == 1 || kind == measure.Stream && !noDelay && size == 16*kib,
				})
			}
		}
		each(measure.PingPong, 1, 64, 512, kib, 4*kib, 16*kib, 64*kib, 256*kib, mib)
		each(measure.RandomSizes, 64*kib)
		each(measure.Stream, 64, 128, 512, kib, 4*kib, 16*kib, 64*kib, 256*kib, mib)
		each(measure.BothWays, 64, 128, 512, kib, 4*kib, 16*kib, 64*kib, 256*kib, mib)
		each(measure.Replies, 64*kib)
		if noDelay { // a single byte is never held back
			for _, requests := range []int{1, 10, 20, 40, 100} {
				all = append(all, row{kind: measure.Connect, requests: requests, noDelay: true, watched: true, bare: requests == 1})
			}
		}
	}
	for _, r := range []row{
		{kind: measure.PingPong, size: 1},
		{kind: measure.PingPong, size: kib},
		{kind: measure.PingPong, size: 16 * kib},
		{kind: measure.PingPong, size: 64 * kib},
		{kind: measure.Stream, size: 16 * kib},
		{kind: measure.Stream, size: 64 * kib},
		{kind: measure.Connect, requests: 1},
		{kind: measure.Connect, requests: 100},
	} {
		r.noDelay, r.mode = true, blocking
		all = append(all, r)
	}
	if noWatch {
		all = withoutJoins(all)
	}
	return all
}

// withoutJoins moves to the mode watching what does not need that a watched connection joins.
func withoutJoins(rows []row) []row {
	var joined, unjoined []row
	for _, r := range rows {
		w := r
		w.mode = watching
		switch {
		case r.kind == measure.Connect && r.requests <= 10: // they end before
			if r.mode.blocks() {
				w.mode = watchingBlocking
			}
			unjoined = append(unjoined, w)
			continue
		case r.watched:
			w.watchedOnly, w.bare = true, false
			unjoined = append(unjoined, w)
			r.watched = false
		}
		joined = append(joined, r)
	}
	return append(joined, unjoined...)
}

// name is that of the row in its table.
func (r row) name() string {
	switch r.kind {
	case measure.Connect:
		if r.requests == 1 {
			return "connections, 1 request"
		}
		return fmt.Sprintf("connections, %d requests", r.requests)
	case measure.RandomSizes:
		return "ping-pong, random to " + sizeName(r.size)
	case measure.Replies:
		return "stream " + sizeName(r.size) + ", replies"
	}
	return string(r.kind) + " " + sizeName(r.size)
}

func sizeName(n int) string {
	switch {
	case n < kib:
		return fmt.Sprintf("%d B", n)
	case n < mib:
		return fmt.Sprintf("%d KiB", n/kib)
	}
	return fmt.Sprintf("%d MiB", n/mib)
}

// mayEndEarly reports whether connections may end before they have joined.
func (r row) mayEndEarly() bool { return r.kind == measure.Connect }

// table is the heading that the row goes under, in the section of a placement.
func (r row) table() string {
	switch {
	case r.mode == blocking:
		return "sockets in blocking mode, hazard accepted"
	case r.mode == watchingBlocking:
		return "watched connections, sockets in blocking mode"
	case r.mode == watching:
		return "watched connections, TCP_NODELAY"
	case r.noDelay:
		return "TCP_NODELAY"
	}
	return "without TCP_NODELAY"
}

// title names the row among all rows: -rows is matched with it.
func (r row) title() string {
	word := "nagle"
	switch {
	case r.mode != usual:
		word = string(r.mode)
	case r.noDelay:
		word = "nodelay"
	}
	return r.name() + ", " + word
}

// variant is a way for the two pods to be connected.
type variant int

const (
	// tcp runs where no program of podshunt is attached, and so does tcpAgain: how
	// they differ is the noise of the machine.
	tcp variant = iota
	shortcut
	tcpAgain
	// watched has both pods enrolled, and a policy that lets no connection join yet.
	watched
	// clientOnly and serverOnly have the other pod not enrolled.
	clientOnly
	serverOnly
	unixSocket
)

// both says whether both pods are enrolled.
func (v variant) both() bool { return v == shortcut || v == watched }

// variants of a row, in the order of the first round. To save time, peers that are not
// enrolled are measured with connections, with ping-pong as most programs set
// TCP_NODELAY for it, and with streams as most do not.
func (r row) variants() []variant {
	all := []variant{tcp, shortcut, tcpAgain}
	switch {
	case r.watchedOnly:
		return []variant{tcp, tcpAgain, watched}
	case r.kind == measure.Connect:
		all = append(all, clientOnly, serverOnly)
	case r.kind == measure.PingPong && r.noDelay, r.kind == measure.Stream && !r.noDelay:
		all = append(all, clientOnly)
	}
	if r.watched {
		all = append(all, watched)
	}
	return append(all, unixSocket)
}

// placement says which CPUs the ends are pinned to.
type placement struct {
	flag, name     string
	server, client int
}

// free is of no CPU: see measure.End.
const free = -1

// placements that are possible on these CPUs and were asked for.
func placements(cpus []int, cores []string) ([]placement, error) {
	all := []placement{{"one", "Both ends on one core", cpus[0], cpus[0]}}
	if len(cpus) > 1 {
		all = append(all, placement{"two", "Across two cores", cpus[0], cpus[1]}, placement{"free", "Pinned to no core", free, free})
	}
	var chosen []placement
	for _, p := range all {
		for _, name := range cores {
			if p.flag == name {
				chosen = append(chosen, p)
			}
		}
	}
	if chosen == nil {
		return nil, fmt.Errorf("cores %s: this machine allows %d", strings.Join(cores, ","), len(cpus))
	}
	return chosen, nil
}

// has says whether a row is measured in a placement. To save time, ends that are not
// pinned are measured as most programs are: non-blocking, and with TCP_NODELAY.
func (p placement) has(r row) bool {
	return p.server != free || r.noDelay && r.mode == usual
}

// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"fmt"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioSignal is sent for O_ASYNC; the C library and the Go runtime leave it alone.
const ioSignal = unix.Signal(40)

func eventRows() []row {
	return []row{
		{name: "poll", run: pollEvents},
		{name: "epoll, level-triggered", run: epollLevel},
		{name: "epoll, edge-triggered", run: epollEdge},
		{name: "epoll, once", run: epollOnce},
		{name: "epoll, writable edge", run: epollWritable, nonblocking: true, tcp: spills},
		{name: "epoll, the end", run: epollEnd, ends: true},
		{name: "epoll, reset", run: epollReset, ends: true},
		{name: "epoll wakes a blocking reader", run: epollWaiter},
		{name: "poll of many", run: pollMany},
		{name: "O_ASYNC", run: async},
	}
}

func pollEvents(c *conn) {
	c.saw("idle", c.b.now())
	c.saw("idle for a while", c.b.silent(unix.POLLIN|unix.POLLRDHUP|unix.POLLPRI))
	c.a.send(20)
	c.b.until(unix.POLLIN)
	c.saw("readable", c.b.now())
	c.settle()
	c.saw("read a part", c.b.recv(10, 0))
	c.saw("still readable", c.b.now())
	c.saw("peek", c.b.recv(10, unix.MSG_PEEK))
	c.saw("after the peek", c.b.now())
	c.saw("read the rest", c.b.recv(10, 0))
	c.saw("idle again", c.b.now())
	got := c.asleep(func() any { return c.b.wait(unix.POLLIN, deadline) })
	c.a.send(10)
	c.saw("a blocking reader is woken", got())
	c.saw("read", c.b.recv(10, 0))
}

// epoll watches a descriptor.
type epoll struct {
	c      *conn
	fd, of int
}

func (c *conn) epoll(of int, events uint32) *epoll {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	c.must(err)
	c.closeAtEnd(fd)
	c.must(unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, of, &unix.EpollEvent{Events: events, Fd: int32(of)}))
	return &epoll{c, fd, of}
}

// get returns the events that come within d.
func (e *epoll) get(d time.Duration) string {
	var events [4]unix.EpollEvent
	for limit := time.Now().Add(d); ; {
		n, err := unix.EpollWait(e.fd, events[:], max(0, int(time.Until(limit).Milliseconds())))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return errno(err)
		}
		if n == 0 {
			return "none"
		}
		return eventNames(events[0].Events)
	}
}

// next returns events that must come.
func (e *epoll) next() string { return e.get(deadline) }

// none returns the events that come within quiet.
func (e *epoll) none() string { return e.get(quiet) }

func epollLevel(c *conn) {
	e := c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLPRI)
	c.saw("idle", e.none())
	c.a.send(20)
	c.saw("readable", e.next())
	c.settle()
	c.saw("still readable", e.next())
	c.saw("read a part", c.b.recv(10, 0))
	c.saw("readable with a part", e.next())
	c.saw("read the rest", c.b.recv(20, 0))
	c.saw("idle again", e.none())
}

func epollEdge(c *conn) {
	e := c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLET)
	c.saw("idle", e.none())
	c.a.send(20)
	c.settle()
	c.saw("readable", e.next())
	c.saw("no other event", e.none())
	c.saw("read a part", c.b.recv(10, 0))
	c.saw("no event by a read", e.none())
	c.a.send(20)
	c.settle()
	c.saw("readable again", e.next())
	c.saw("read all", c.b.recv(100, 0))
	c.a.send(20)
	c.settle()
	c.saw("readable at last", e.next())
	c.saw("read", c.b.recv(100, 0))
	c.saw("nothing", c.b.recv(100, unix.MSG_DONTWAIT))
	c.saw("idle again", e.none())
	c.a.shutdown(unix.SHUT_WR)
	c.b.until(unix.POLLRDHUP) // a FIN wakes twice
	c.saw("the end", e.next())
	c.saw("once", e.none())
}

func epollOnce(c *conn) {
	e := c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLONESHOT)
	c.a.send(10)
	c.settle()
	c.saw("readable", e.next())
	c.saw("disarmed", e.none())
	c.a.send(10)
	c.settle()
	c.saw("still disarmed", e.none())
	arm := func() {
		c.must(unix.EpollCtl(e.fd, unix.EPOLL_CTL_MOD, e.of, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT}))
	}
	arm()
	c.saw("armed", e.next())
	c.saw("read", c.b.recv(100, 0))
	arm()
	c.saw("armed with nothing there", e.none())
	c.a.send(10)
	c.saw("readable again", e.next())
	c.saw("read again", c.b.recv(100, 0))
}

func epollWritable(c *conn) {
	e := c.epoll(c.a.fd, unix.EPOLLOUT|unix.EPOLLET)
	c.saw("writable", e.next())
	c.saw("once", e.none())
	start := c.a.sent.Load()
	filled, full := c.a.fill(), e.none()
	for try := 0; try < 10 && full != "none"; try++ { // by a timer of TCP
		filled += c.a.fill()
		full = e.none()
	}
	c.saw("full", full)
	got := c.asleep(func() any { return e.next() })
	c.saw("all bytes are read", c.b.recvAll(filled) == moved(c.content.piece(start, filled), filled, nil))
	c.saw("writable again", got())
}

func epollEnd(c *conn) {
	c.a.send(10)
	c.settle()
	c.prove()
	e := c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP)
	c.saw("open", e.next())
	c.a.shutdown(unix.SHUT_WR)
	c.b.until(unix.POLLRDHUP)
	c.saw("half-closed", e.next())
	c.saw("read", c.b.recv(100, 0))
	c.saw("nothing left", e.next())
	c.b.shutdown(unix.SHUT_WR)
	c.b.gone()
	c.saw("closed", e.next())
	c.saw("the end", c.b.recv(100, 0))
}

func epollReset(c *conn) {
	c.prove()
	edge := c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLET)
	c.a.reset()
	c.saw("edge", edge.next())
	c.saw("level", c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP).next())
	c.saw("read", c.b.recv(100, 0))
	c.saw("after the error was read", c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP).next())
}

func epollWaiter(c *conn) {
	e := c.epoll(c.b.fd, unix.EPOLLIN|unix.EPOLLET)
	for i := range 5 {
		got := c.asleep(func() any { return e.next() })
		c.a.send(100)
		c.saw(fmt.Sprintf("event %d", i), got())
		c.saw(fmt.Sprintf("read %d", i), c.b.recv(1000, unix.MSG_DONTWAIT))
	}
}

// pollMany has more connections, of which a few get bytes.
func pollMany(c *conn) {
	const connections = 16
	l, address := c.listen(c.pods[c.way][1], c.freePort(), nil)
	var senders, receivers []*end
	for range connections {
		fd, _ := c.dial(c.pods[c.way][0], address, c.client, nil)
		client := &end{c: c, fd: fd, pod: c.pods[c.way][0], blocking: c.client}
		server := &end{c: c, fd: c.accept(l, c.server), pod: c.pods[c.way][1], blocking: c.server}
		c.exchange(client, server, warmUpRounds, 10)
		c.proveAnother(client, address)
		if c.swapped {
			client, server = server, client
		}
		senders, receivers = append(senders, client), append(receivers, server)
	}
	var fds []unix.PollFd
	for _, e := range receivers {
		fds = append(fds, unix.PollFd{Fd: int32(e.fd), Events: unix.POLLIN})
	}
	got := c.asleep(func() any {
		n, err := unix.Poll(fds, int(deadline.Milliseconds()))
		return fmt.Sprint(n, err)
	})
	senders[5].send(100)
	c.saw("a blocking reader is woken", got())
	for _, i := range []int{3, 5, 11} {
		senders[i].send(10)
		receivers[i].until(unix.POLLIN)
	}
	_, err := unix.Poll(fds, 0)
	c.must(err)
	var ready []int
	for i, fd := range fds {
		if fd.Revents != 0 {
			ready = append(ready, i)
		}
	}
	c.saw("ready", fmt.Sprint(ready))
	for _, i := range slices.Sorted(slices.Values(ready)) {
		c.saw(fmt.Sprintf("read %d", i), receivers[i].recv(1, 0))
	}
}

// async has a signal sent when there is something to read.
func async(c *conn) {
	// struct f_owner_ex
	owner := struct{ kind, pid int32 }{0, int32(unix.Gettid())} // F_OWNER_TID
	flags, err := unix.FcntlInt(uintptr(c.b.fd), unix.F_GETFL, 0)
	c.must(err)
	if _, _, no := unix.Syscall(unix.SYS_FCNTL, uintptr(c.b.fd), unix.F_SETOWN_EX, uintptr(unsafe.Pointer(&owner))); no != 0 {
		c.must(no)
	}
	for _, set := range [][2]int{{unix.F_SETSIG, int(ioSignal)}, {unix.F_SETFL, flags | unix.O_ASYNC}} {
		_, err := unix.FcntlInt(uintptr(c.b.fd), set[0], set[1])
		c.must(err)
	}
	drain := func() {
		for signals(c) != "none" {
		}
	}
	drain() // the buffer may have become writable
	c.a.send(10)
	c.settle()
	c.mustBecome("a signal", "I/O", func() string { return signals(c) })
	c.saw("read", c.b.recv(100, 0))
	drain()
	c.saw("no signal", signals(c))
	_, err = unix.FcntlInt(uintptr(c.b.fd), unix.F_SETFL, flags)
	c.must(err)
	drain()
}

// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// wakeRows are about what wakes a thread that sleeps in recv and is no data. TCP
// goes back to sleep, or says what has happened.
func wakeRows() []row {
	return []row{
		{name: "half-close, then a sleeping read", run: func(c *conn) { sleepAfterHalfClose(c, 0) }, blocking: true, blockingTCP: halfClosed},
		{
			name: "half-close with bytes unread, then a sleeping read", run: func(c *conn) { sleepAfterHalfClose(c, 50) },
			blocking: true, blockingTCP: halfClosed, differs: early(shortcut),
		},
		{name: "half-close under a sleeping read", run: halfCloseSleeping, blocking: true, blockingTCP: halfClosed, differs: early(held, shortcut)},
		{name: "shutdown of reading under a sleeping read", run: shutDownReadingSleeping, blocking: true, differs: early(held, shortcut)},
		{name: "shut down both ways under a sleeping read", run: shutDownSleeping, blocking: true, ends: true, differs: early(held, shortcut)},
		{name: "SO_SNDBUF set under a sleeping read", run: func(c *conn) {
			setSleeping(c, unix.SOL_SOCKET, unix.SO_SNDBUF, 100_000)
		}, blocking: true, differs: early(held, shortcut)},
		{name: "TCP_NOTSENT_LOWAT set under a sleeping read", run: func(c *conn) {
			setSleeping(c, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 16<<10)
		}, blocking: true, differs: early(held, shortcut)},
		{name: "a full send buffer drains under a sleeping read", run: drainSleeping, blocking: true, tcp: spills, differs: early(held, shortcut)},
		{name: "MSG_ZEROCOPY completes under a sleeping read", run: zerocopySleeping, blocking: true, tcp: "SO_ZEROCOPY is set", differs: early(held, shortcut)},
		{
			name: "SO_TIMESTAMPING of a send under a sleeping read", run: timestampSleeping, blocking: true,
			differs: append(early(held), differs(shortcut, "notifications", "events")...),
		},
		{name: "a process that sleeps in a read is stopped and continued", run: stopSleeping, blocking: true, differs: early(held, shortcut)},
		{name: "two sleeping reads and one message", run: twoSleep, blocking: true, differs: early(held, shortcut)},
		{name: "keepalive ends a sleeping read", run: keepAliveSleeping, blocking: true, ends: true, differs: errorLate(unix.ETIMEDOUT)},
		{name: "TCP_USER_TIMEOUT ends a sleeping read", run: userTimeoutSleeping, blocking: true, ends: true, differs: errorLate(unix.ETIMEDOUT)},
		{name: "SOCK_DESTROY of a sleeping read", run: destroySleeping, blocking: true, ends: true, differs: errorLate(unix.ECONNABORTED)},
		{
			name: "ICMP error with IP_RECVERR", run: icmpError,
			differs: alike("icmp-error", "read", "send", "next send", "SO_ERROR"),
		},
	}
}

// early is the known difference of a recv that is woken without data.
func early(ways ...way) (all []difference) {
	for _, w := range ways {
		all = append(all, difference{way: w, fact: "read", entry: sleepingRecv, value: "EAGAIN"})
	}
	return all
}

// errorLate is that of one that is woken by an error, which the next recv reports.
func errorLate(err error) []difference {
	all := early(held, shortcut)
	for _, d := range early(held, shortcut) {
		d.fact, d.value = "next read", errno(err)
		all = append(all, d)
	}
	return all
}

// threadInRecv is a thread in a recv that has come to sleep.
type threadInRecv struct {
	*end
	result func() any
	tid    int
	ended  func() bool
}

const sleepSize = 10

func (e *end) sleepInRecv() *threadInRecv {
	e.c.t.Helper()
	s := &threadInRecv{end: e}
	s.result, s.tid, s.ended = e.c.start(func() any { return e.recvOnce(sleepSize, 0) })
	s.settle()
	return s
}

// settle waits until a thread that the kernel has woken sleeps again, or has
// returned. A wake-up makes it runnable at once, so none is overlooked.
func (s *threadInRecv) settle() {
	s.c.t.Helper()
	s.c.mustSleep(s.tid, s.ended)
}

// message sends what TCP sleeps for. Who has returned before it reads it with the next recv.
func (s *threadInRecv) message(from *end) {
	s.c.t.Helper()
	s.settle()
	sent := from.send(sleepSize)
	got := s.result()
	s.c.saw("read", got)
	if got == "EAGAIN" {
		got = s.recv(sleepSize, 0)
	}
	s.c.saw("message", got == sent)
}

// deafen makes a socket drop all that the network brings it, until the result is
// called. What it has sent before is acknowledged.
func (e *end) deafen() (hear func()) {
	e.c.t.Helper()
	e.c.mustBecome("unacknowledged", "0", func() string { return e.ioctl(unix.TIOCOUTQ) })
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	e.c.must(unix.SetsockoptSockFprog(e.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop}))
	return func() { e.c.must(unix.SetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)) }
}

// sleepAfterHalfClose is what HTTP/1.0 clients, nc and ssh do: they say that they
// have sent all, and wait for the answer. The acknowledgement of their end, which
// wakes them, is kept back until they sleep.
func sleepAfterHalfClose(c *conn, unread int) {
	c.a.send(10)
	c.saw("request", c.b.recv(10, 0))
	if unread > 0 {
		c.b.send(unread)
		c.settle()
	}
	hear := c.a.deafen()
	c.saw("shutdown", c.a.shutdown(unix.SHUT_WR))
	if unread > 0 {
		c.saw("read what had come", c.a.recv(unread, 0))
	}
	s := c.a.sleepInRecv()
	hear()
	c.mustBecome("state", fmt.Sprint(unix.BPF_TCP_FIN_WAIT2), func() string { return fmt.Sprint(c.a.info().State) })
	s.message(c.b)
}

func halfCloseSleeping(c *conn) {
	s := c.b.sleepInRecv()
	c.saw("shutdown", c.b.shutdown(unix.SHUT_WR))
	s.message(c.a)
}

func shutDownReadingSleeping(c *conn) {
	s := c.b.sleepInRecv()
	c.saw("shutdown", c.b.shutdown(unix.SHUT_RD))
	c.saw("read", s.result())
	c.saw("next read", c.b.recv(10, 0))
}

func shutDownSleeping(c *conn) {
	c.prove()
	s := c.b.sleepInRecv()
	c.saw("shutdown", c.b.shutdown(unix.SHUT_RDWR))
	c.saw("read", s.result())
	c.saw("next read", c.b.recv(10, 0))
}

func setSleeping(c *conn, level, option, value int) {
	s := c.b.sleepInRecv()
	c.saw("set", c.b.set(level, option, value))
	s.message(c.a)
}

// drainSleeping has another thread fill the send buffer, which the peer then empties.
func drainSleeping(c *conn) {
	s := c.b.sleepInRecv()
	start := c.b.sent.Load()
	filled := c.b.fill()
	c.saw("all bytes are read", c.a.recvAll(filled) == moved(c.content.piece(start, filled), filled, nil))
	c.b.until(unix.POLLOUT)
	s.message(c.a)
}

// errorEdge watches a socket's errors. Its event comes by the kernel's wake-up, as the
// last one: whoever began to wait after it has been woken by then.
func (c *conn) errorEdge(of *end) *epoll { return c.epoll(of.fd, unix.EPOLLET) }

func zerocopySleeping(c *conn) {
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1))
	edge := c.errorEdge(c.b)
	s := c.b.sleepInRecv()
	c.saw("send", c.b.sendOnce(16<<10, unix.MSG_ZEROCOPY))
	c.saw("events", edge.next())
	s.message(c.a)
	c.saw("read of the other", c.a.recvAll(16<<10))
}

func timestampSleeping(c *conn) {
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_TIMESTAMPING,
		unix.SOF_TIMESTAMPING_SOFTWARE|unix.SOF_TIMESTAMPING_TX_SOFTWARE|unix.SOF_TIMESTAMPING_OPT_TSONLY))
	edge := c.errorEdge(c.b)
	s := c.b.sleepInRecv()
	c.saw("send", c.b.sendOnce(10, 0))
	patience := deadline
	if c.resembles() == shortcut {
		patience = 10 * quiet
	}
	c.saw("events", edge.get(patience))
	s.message(c.a)
	c.saw("read of the other", c.a.recvAll(10))
}

// twoSleep: the message wakes both threads, and one of them finds it.
func twoSleep(c *conn) {
	both := []*threadInRecv{c.b.sleepInRecv(), c.b.sleepInRecv()}
	first := c.a.send(sleepSize)
	c.settle()
	for _, s := range both {
		s.settle()
	}
	second := c.a.send(sleepSize)
	winner, loser := both[0].result(), both[1].result()
	if loser == first {
		winner, loser = loser, winner
	}
	c.saw("read of the one", winner == first)
	c.saw("read", loser)
	if loser == "EAGAIN" {
		loser = c.b.recv(sleepSize, 0)
	}
	c.saw("second message", loser == second)
}

// stopSleeping is what job control does.
func stopSleeping(c *conn) {
	c.b.timeout(unix.SO_RCVTIMEO, 0) // a read with one is interrupted for good
	pid := c.startChild(sleeps, c.b.fd)
	c.mustSleepInChild(pid)
	c.must(unix.Kill(pid, unix.SIGSTOP))
	var status unix.WaitStatus
	_, err := unix.Wait4(pid, &status, unix.WUNTRACED, nil)
	c.must(err)
	c.saw("stopped", status.Stopped())
	c.must(unix.Kill(pid, unix.SIGCONT))
	c.mustSleepInChild(pid)
	sent := c.a.send(sleepSize)
	got, left := "a message", sent
	switch status := c.endChild(pid); status {
	case statusRead:
	case statusAgain:
		got = "EAGAIN"
		left = c.b.recv(sleepSize, 0)
	default:
		got = fmt.Sprint("status ", status)
	}
	c.saw("read", got)
	c.saw("message", left == sent)
}

// Statuses of a process that has received once.
const statusRead, statusAgain, statusOther = 0, 5, 6

func recvStatus(fd int) int {
	// The Go runtime's own signals would interrupt it as well.
	runtime.LockOSThread()
	all := unix.Sigset_t{Val: [16]uint64{^uint64(0)}}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil); err != nil {
		fmt.Fprintln(os.Stderr, "block signals:", err)
		return statusOther
	}
	n, _, err := unix.Recvfrom(fd, make([]byte, sleepSize), 0)
	switch {
	case err == nil && n == sleepSize:
		return statusRead
	case errors.Is(err, unix.EAGAIN):
		return statusAgain
	}
	fmt.Fprintln(os.Stderr, "recv:", n, err)
	return statusOther
}

// mustSleepInChild waits until a thread of the other process sleeps in recv, or the process has ended.
func (c *conn) mustSleepInChild(pid int) {
	c.t.Helper()
	recv := fmt.Sprintf("%d 0x3 ", unix.SYS_RECVFROM)
	c.mustBecome("the other process", "asleep", func() string {
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return "asleep" // for ever
		}
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
		c.must(err)
		for _, path := range threads {
			if text, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(text), recv) {
				return "asleep"
			}
		}
		return "running"
	})
}

func keepAliveSleeping(c *conn) {
	c.prove()
	for _, option := range []int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT} {
		c.saw(fmt.Sprintf("set option %d", option), c.b.set(unix.IPPROTO_TCP, option, 1))
	}
	c.b.deafen()
	s := c.b.sleepInRecv()
	c.saw("set SO_KEEPALIVE", c.b.set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1))
	s.mustEnd()
}

// userTimeoutSleeping sends what nobody acknowledges.
func userTimeoutSleeping(c *conn) {
	c.prove()
	c.saw("to TCP", c.b.set(unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1)) // as each message while it is set
	c.saw("set", c.b.set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 500))
	c.b.deafen()
	s := c.b.sleepInRecv()
	c.saw("send", c.b.sendOnceNow(10))
	s.mustEnd()
}

// mustEnd waits until the connection has ended with an error, and reads on.
func (s *threadInRecv) mustEnd() {
	s.c.t.Helper()
	s.gone()
	s.c.saw("read", s.result())
	s.c.saw("next read", s.recv(10, 0))
	s.c.saw("third read", s.recv(10, 0))
}

// destroySleeping ends the connection as "ss -K" does.
func destroySleeping(c *conn) {
	c.prove()
	s := c.b.sleepInRecv()
	c.must(c.b.pod.Do(func() error { return destroy(localAddress(c.t, c.b.fd), localAddress(c.t, c.a.fd)) }))
	s.mustEnd()
}

// destroy asks the kernel to end the connection of a socket of this network namespace.
func destroy(local, remote netip.AddrPort) error {
	const sockDestroy = 21 // SOCK_DESTROY of include/uapi/linux/sock_diag.h
	// struct inet_diag_req_v2 of include/uapi/linux/inet_diag.h: with no states, any
	// interface and no cookie.
	request := make([]byte, 56)
	request[0], request[1] = unix.AF_INET, unix.IPPROTO_TCP
	if local.Addr().Is6() {
		request[0] = unix.AF_INET6
	}
	binary.BigEndian.PutUint16(request[8:], local.Port())
	binary.BigEndian.PutUint16(request[10:], remote.Port())
	copy(request[12:28], local.Addr().AsSlice())
	copy(request[28:44], remote.Addr().AsSlice())
	for i := 48; i < 56; i++ {
		request[i] = 0xff
	}
	link, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return err
	}
	_, err = link.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDestroy, Flags: netlink.Request | netlink.Acknowledge}, Data: request,
	})
	return errors.Join(err, link.Close())
}

// icmpError has a router say that it cannot reach the peer. TCP tells whoever has asked for it.
func icmpError(c *conn) {
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	if c.ipv6 {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	c.saw("set", c.b.set(level, option, 1))
	c.settle()
	quote := c.b.quote(localAddress(c.t, c.a.fd))
	read := func() any {
		c.b.gone()
		return c.b.recvOnce(10, 0)
	}
	if c.b.blocking {
		read = c.b.sleepInRecv().result
	}
	start := c.b.sent.Load()
	c.must(c.a.pod.Do(func() error { return unreachable(localAddress(c.t, c.b.fd).Addr(), quote) }))
	c.saw("read", read())
	c.saw("next read", c.b.recv(10, unix.MSG_DONTWAIT))
	for _, name := range []string{"send", "next send"} {
		c.saw(name, c.b.sendOnceNow(10))
	}
	c.saw("SO_ERROR", c.b.get(unix.SOL_SOCKET, unix.SO_ERROR))
	sent := int(c.b.sent.Load() - start)
	c.saw("read of the other", c.a.recvAll(sent) == moved(c.content.piece(start, sent), sent, nil))
	c.exchange(c.a, c.b, 3, 100)
}

// quote is the begin of a packet that a socket could have sent last: its IP header, and
// as much of that of TCP as an ICMP message has.
func (e *end) quote(to netip.AddrPort) []byte {
	from := localAddress(e.c.t, e.fd)
	var p []byte
	if from.Addr().Is4() {
		p = make([]byte, ipv4.HeaderLen)
		p[0], p[9] = 0x45, unix.IPPROTO_TCP
		p = append(append(p[:12], from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	} else {
		p = make([]byte, 8, ipv6.HeaderLen)
		p[0], p[6] = 0x60, unix.IPPROTO_TCP
		p = append(append(p, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	}
	p = binary.BigEndian.AppendUint16(p, from.Port())
	p = binary.BigEndian.AppendUint16(p, to.Port())
	return binary.BigEndian.AppendUint32(p, e.sequence())
}

// sequence is the number of the next byte that TCP sends.
func (e *end) sequence() uint32 {
	const on, off = 1, -1 // TCP_REPAIR_ON, and TCP_REPAIR_OFF_NO_WP of include/uapi/linux/tcp.h
	const sendQueue = 2   // TCP_SEND_QUEUE
	e.c.must(unix.SetsockoptInt(e.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, on))
	e.c.must(unix.SetsockoptInt(e.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, sendQueue))
	seq, err := unix.GetsockoptInt(e.fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
	e.c.must(err)
	e.c.must(unix.SetsockoptInt(e.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, off))
	return uint32(seq)
}

// unreachable sends an ICMP message about the packet of which it has the quote.
func unreachable(to netip.Addr, quote []byte) error {
	message := icmp.Message{Type: ipv4.ICMPTypeDestinationUnreachable, Code: 1, Body: &icmp.DstUnreach{Data: quote}}
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if to.Is6() {
		// The kernel sums this one up.
		message.Type, message.Code = ipv6.ICMPTypeDestinationUnreachable, 0
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	p, err := message.Marshal(nil)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	return errors.Join(unix.Sendto(fd, p, 0, sockaddr(netip.AddrPortFrom(to, 0))), unix.Close(fd))
}

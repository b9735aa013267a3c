// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"flag"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// withMPTCP adds the rows about MPTCP. Kernels without commit fbade4bd08ba may
// panic over them, so they are for virtual machines.
var withMPTCP = flag.Bool("mptcp", false, "run the rows about MPTCP too; a kernel without commit fbade4bd08ba may panic")

func optionRows() []row {
	all := []row{
		{name: "options read back", run: options},
		{name: "SO_ERROR", run: socketError},
		{name: "keepalive", run: keepAlive, listen: keepAliveOptions, dial: keepAliveOptions},
		{name: "TCP_USER_TIMEOUT", run: userTimeout},
		{name: "TCP_INFO", run: info, differs: differs(shortcut, "tcp-info", "bytes received")},
		{name: "TCP_ULP", run: upperLayer, tcp: "an upper layer protocol may be on the socket"},
		{name: "options of the listener", run: inherited, listen: toInherit},
		{name: "SO_REUSEPORT", run: reusePort},
		{name: "TCP_DEFER_ACCEPT", run: deferAccept, tcp: "the server's socket joins with the first message"},
		{name: "TCP Fast Open", run: fastOpen, listen: acceptFastOpen},
		{name: "addresses", run: addresses},
	}
	if *withMPTCP {
		all = append(all, row{name: "MPTCP listener", run: func(c *conn) { multipath(c, 0) }},
			row{name: "MPTCP at both ends", run: func(c *conn) { multipath(c, unix.IPPROTO_MPTCP) }})
	}
	return all
}

func options(c *conn) {
	for _, o := range []struct {
		name                 string
		level, option, value int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"SO_RCVBUF", unix.SOL_SOCKET, unix.SO_RCVBUF, 100_000},
		{"SO_SNDBUF", unix.SOL_SOCKET, unix.SO_SNDBUF, 100_000},
		{"SO_PRIORITY", unix.SOL_SOCKET, unix.SO_PRIORITY, 3},
		{"SO_RCVLOWAT", unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1},
		{"SO_OOBINLINE", unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
		{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, 0},
		{"SO_TYPE", unix.SOL_SOCKET, unix.SO_TYPE, 0},
		{"SO_ACCEPTCONN", unix.SOL_SOCKET, unix.SO_ACCEPTCONN, 0},
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{"TCP_QUICKACK", unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1},
		{"TCP_NOTSENT_LOWAT", unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 16384},
		{"TCP_WINDOW_CLAMP", unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, 60_000},
		{"TCP_LINGER2", unix.IPPROTO_TCP, unix.TCP_LINGER2, 5},
		{"TCP_SYNCNT", unix.IPPROTO_TCP, unix.TCP_SYNCNT, 5},
		{"TCP_MAXSEG", unix.IPPROTO_TCP, unix.TCP_MAXSEG, 0},
	} {
		if o.value != 0 {
			c.saw("set "+o.name, c.b.set(o.level, o.option, o.value))
		}
		c.saw(o.name, c.b.get(o.level, o.option))
	}
	congestion, err := unix.GetsockoptString(c.b.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	c.saw("TCP_CONGESTION", congestion+" "+done(err))
	c.exchange(c.a, c.b, 3, 1000)
}

func socketError(c *conn) {
	c.saw("idle", c.b.get(unix.SOL_SOCKET, unix.SO_ERROR))
	c.a.send(10)
	c.saw("with bytes unread", c.b.get(unix.SOL_SOCKET, unix.SO_ERROR))
	c.saw("read", c.b.recv(100, 0))
}

// keepAliveOptions are the shortest intervals that there are.
func keepAliveOptions(fd int) error {
	for _, o := range [][3]int{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 2},
	} {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return err
		}
	}
	return nil
}

// keepAlive waits until probes have been sent, which a living peer answers.
func keepAlive(c *conn) {
	segments := c.a.info().Segs_in
	c.saw("options", c.a.get(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)+" "+c.b.get(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE))
	c.mustBecome("probes arrive", "true", func() string { return fmt.Sprint(c.a.info().Segs_in > segments+1) })
	c.saw("SO_ERROR", c.a.get(unix.SOL_SOCKET, unix.SO_ERROR))
	c.exchange(c.a, c.b, 3, 1000)
}

func userTimeout(c *conn) {
	c.saw("set", c.a.set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 5000))
	c.saw("value", c.a.get(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT))
	c.exchange(c.a, c.b, 3, 1000)
}

func info(c *conn) {
	before := c.b.info()
	c.a.send(1000)
	c.saw("read", c.b.recvAll(1000))
	c.settle()
	after := c.b.info()
	c.saw("state", after.State)
	c.saw("bytes received", after.Bytes_received-before.Bytes_received)
	c.saw("retransmits", after.Total_retrans)
	c.again = after.Total_retrans > 0 // an acknowledgement was late
}

// upperLayer asks for kTLS, which kernels without it refuse.
func upperLayer(c *conn) {
	c.saw("set", done(unix.SetsockoptString(c.a.fd, unix.IPPROTO_TCP, unix.TCP_ULP, "tls")))
	c.saw("set again", done(unix.SetsockoptString(c.a.fd, unix.IPPROTO_TCP, unix.TCP_ULP, "tls")))
	c.saw("unknown", done(unix.SetsockoptString(c.b.fd, unix.IPPROTO_TCP, unix.TCP_ULP, "none-such")))
	c.exchange(c.a, c.b, 3, 1000) // without keys it passes bytes on
}

func toInherit(fd int) error {
	for _, o := range inheritedOptions() {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return err
		}
	}
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 7})
}

func inheritedOptions() [][3]int {
	return [][3]int{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUF, 200_000},
		{unix.SOL_SOCKET, unix.SO_SNDBUF, 200_000},
		{unix.SOL_SOCKET, unix.SO_PRIORITY, 2},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 9000},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 77},
	}
}

func inherited(c *conn) {
	server := c.b
	if c.swapped {
		server = c.a
	}
	for _, o := range inheritedOptions() {
		c.saw(fmt.Sprintf("option %d/%d", o[0], o[1]), server.get(o[0], o[1]))
	}
	linger := unix.Linger{}
	size := uint32(unsafe.Sizeof(linger))
	_, _, no := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(server.fd), unix.SOL_SOCKET, unix.SO_LINGER,
		uintptr(unsafe.Pointer(&linger)), uintptr(unsafe.Pointer(&size)), 0)
	if no != 0 {
		c.must(no)
	}
	c.saw("SO_LINGER", fmt.Sprint(linger))
	c.exchange(c.a, c.b, 3, 1000)
}

// ends are those of one more connection, from a's pod to b's.
func (c *conn) ends(a, b int) (*end, *end) {
	return &end{c: c, fd: a, pod: c.a.pod, blocking: c.a.blocking}, &end{c: c, fd: b, pod: c.b.pod, blocking: c.b.blocking}
}

// reusePort has two listeners on one port; who gets which connection is not compared.
func reusePort(c *conn) {
	reuse := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }
	l1, address := c.listen(c.b.pod, c.freePort(), reuse)
	l2, _ := c.listen(c.b.pod, address.Port(), reuse)
	served := 0
	for range 8 {
		fd, _ := c.dial(c.a.pod, address, c.a.blocking, nil)
		ready := []unix.PollFd{{Fd: int32(l1), Events: unix.POLLIN}, {Fd: int32(l2), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, int(deadline.Milliseconds())); err != nil {
			c.must(err)
		}
		l := l1
		if ready[1].Revents != 0 {
			l = l2
		}
		a, b := c.ends(fd, c.accept(l, c.b.blocking))
		c.exchange(a, b, 3, 100)
		c.proveAnother(a, address)
		served++
	}
	c.saw("served", served)
}

// deferAccept has a listener that hands out connections with their first bytes.
func deferAccept(c *conn) {
	l, address := c.listen(c.b.pod, c.freePort(), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 5)
	})
	fd, _ := c.dial(c.a.pod, address, c.a.blocking, nil)
	c.saw("before the first bytes", c.silent(l, unix.POLLIN))
	a, _ := c.ends(fd, -1)
	sent := a.send(100)
	_, b := c.ends(-1, c.accept(l, c.b.blocking))
	c.saw("first bytes", b.recvAll(100) == sent)
	c.exchange(b, a, 5, 1000)
	c.proveAnother(a, address)
}

func acceptFastOpen(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16)
}

// fastOpen connects until the client has a cookie, and sends data in the SYN.
func fastOpen(c *conn) {
	l, address := c.listen(c.b.pod, c.freePort(), acceptFastOpen)
	for i := range 3 {
		a, b := c.ends(c.socket(c.a.pod, true, 0), -1)
		p := a.next(100)
		n, err := unix.SendmsgN(a.fd, p, nil, sockaddr(address), unix.MSG_FASTOPEN)
		c.saw(fmt.Sprintf("send %d", i), a.accepted(p, n, err))
		b.fd = c.accept(l, c.b.blocking)
		c.saw(fmt.Sprintf("read %d", i), b.recvAll(100))
		a.blocking = true
		c.exchange(b, a, 3, 100)
	}
}

func addresses(c *conn) {
	for _, e := range []*end{c.a, c.b} {
		peer, err := unix.Getpeername(e.fd)
		c.must(err)
		other := c.a
		if e == c.a {
			other = c.b
		}
		local, err := unix.Getsockname(other.fd)
		c.must(err)
		c.saw(fmt.Sprintf("%s has the other's address", e), fmt.Sprint(peer) == fmt.Sprint(local))
		other.send(1)
		e.until(unix.POLLIN)
		_, from, err := unix.Recvfrom(e.fd, make([]byte, 1), 0)
		c.saw(fmt.Sprintf("address of a read, %s", e), fmt.Sprint(from, err))
	}
}

// multipath connects to an MPTCP listener, as those of Go are.
func multipath(c *conn, protocol int) {
	l := c.socket(c.b.pod, false, unix.IPPROTO_MPTCP)
	c.must(unix.Bind(l, sockaddr(c.podAddress(c.b.pod, c.freePort()))))
	c.must(unix.Listen(l, 8))
	for i := range 3 {
		fd := c.socket(c.a.pod, true, protocol)
		c.must(unix.Connect(fd, sockaddr(localAddress(c.t, l))))
		a, b := c.ends(fd, c.accept(l, c.b.blocking))
		a.blocking = true
		c.exchange(a, b, 10, 1000)
		c.saw(fmt.Sprintf("poll %d", i), b.now())
		c.must(unix.Shutdown(fd, unix.SHUT_WR))
		c.saw(fmt.Sprintf("the end %d", i), b.recv(10, 0))
		time.Sleep(time.Millisecond)
	}
}

// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// much is more than any buffer or budget takes.
const much = 9 << 20

const spills = "the receiver has left too much unread: spilled to TCP"

func writeRows() []row {
	all := []row{
		{name: "empty writes", run: emptyWrites},
		{name: "MSG_MORE", run: more, differs: differs(shortcut, "cork", "receiver meanwhile")},
		{name: "TCP_CORK", run: cork, differs: differs(shortcut, "cork", "receiver meanwhile")},
		{name: "TCP_NODELAY", run: noDelay},
		{
			name: "MSG_OOB", run: outOfBand,
			differs: differs(shortcut, "oob", "poll", "read to the mark", "at the mark", "read the urgent byte", "read the rest"),
		},
		{
			name: "MSG_OOB in line", run: outOfBandInline,
			differs: differs(shortcut, "oob", "poll", "read to the mark", "at the mark", "read the rest"),
		},
		{name: "SIOCOUTQ", run: bytesUnsent},
		{name: "sendfile", run: sendfile},
		{name: "splice in", run: spliceIn},
		{name: "vmsplice and splice", run: vmspliceIn},
		{name: "MSG_ZEROCOPY", run: zerocopySend, tcp: "each message goes by TCP while SO_ZEROCOPY is set"},
		{name: "SO_TIMESTAMPING of sends", run: sendTimestamps, differs: differs(shortcut, "notifications", "notification")},
		{name: "backpressure", run: backpressure, nonblocking: true, tcp: spills},
		{name: "a sleeping write is woken", run: wokenWrite, tcp: spills},
		{name: "SO_SNDTIMEO", run: sendTimeout, blocking: true, tcp: spills},
		{name: "small buffers", run: smallBuffers, listen: shrink, dial: shrink, tcp: spills},
		{name: "a write of many pieces", run: manyPieces},
	}
	for _, w := range []struct {
		name  string
		write func(fd int, p []byte) (int, error)
	}{
		{"write", unix.Write},
		{"writev", func(fd int, p []byte) (int, error) { return unix.Writev(fd, split(p)) }},
		{"send", func(fd int, p []byte) (int, error) { return unix.SendmsgN(fd, p, nil, nil, unix.MSG_NOSIGNAL) }},
		{"sendmsg", func(fd int, p []byte) (int, error) { return unix.SendmsgBuffers(fd, split(p), nil, nil, 0) }},
		{"sendmmsg", sendmmsg},
	} {
		all = append(all, row{name: "writes by " + w.name, run: func(c *conn) { writeBy(c, w.write) }})
	}
	return all
}

func sendmmsg(fd int, p []byte) (int, error) {
	all, _ := messages(p)
	n, _, no := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(all)), 2, 0, 0, 0)
	if no != 0 {
		return 0, no
	}
	if n != 2 {
		return 0, fmt.Errorf("%d messages", n)
	}
	return int(all[0].n + all[1].n), nil
}

func writeBy(c *conn, write func(int, []byte) (int, error)) {
	for _, size := range []int{3, 100, 20_000} {
		p := c.a.next(size)
		n, err := write(c.a.fd, p)
		c.saw(fmt.Sprintf("write %d", size), c.a.accepted(p, n, err))
		c.saw(fmt.Sprintf("read %d", size), c.b.recvAll(size))
	}
}

func emptyWrites(c *conn) {
	c.saw("send", c.a.sendOnce(0, 0))
	n, err := unix.Write(c.a.fd, nil)
	c.saw("write", moved(nil, n, err))
	c.saw("receiver", c.b.silent(unix.POLLIN))
	c.a.send(10)
	c.saw("read", c.b.recv(100, 0))
}

func more(c *conn) {
	start := time.Now()
	c.saw("send more", c.a.sendOnce(10, unix.MSG_MORE))
	got := c.b.silent(unix.POLLIN)
	c.saw("receiver meanwhile", got)
	// TCP also sends them when an acknowledgement comes, of what was before.
	c.again = time.Since(start) > corkTimer || c.resembles() != shortcut && got != eventNames(0)
	c.saw("send the rest", c.a.sendOnce(10, 0))
	c.saw("read", c.b.recvAll(20))
}

func cork(c *conn) {
	c.saw("cork", c.a.set(unix.IPPROTO_TCP, unix.TCP_CORK, 1))
	start := time.Now()
	c.a.send(10)
	c.a.send(10)
	c.saw("receiver meanwhile", c.b.silent(unix.POLLIN))
	c.again = time.Since(start) > corkTimer
	c.saw("uncork", c.a.set(unix.IPPROTO_TCP, unix.TCP_CORK, 0))
	c.saw("read", c.b.recvAll(20))
}

func noDelay(c *conn) {
	c.saw("before", c.a.get(unix.IPPROTO_TCP, unix.TCP_NODELAY))
	c.saw("set", c.a.set(unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	c.saw("after", c.a.get(unix.IPPROTO_TCP, unix.TCP_NODELAY))
	for range 3 {
		c.a.send(10)
	}
	c.settle()
	c.saw("read", c.b.recv(100, 0))
}

func outOfBand(c *conn) {
	c.a.send(10)
	c.saw("send", c.a.sendOnce(1, unix.MSG_OOB))
	c.a.send(10)
	c.settle()
	c.saw("poll", c.b.now())
	c.saw("read to the mark", c.b.recv(100, unix.MSG_DONTWAIT))
	c.saw("at the mark", c.b.ioctl(unix.SIOCATMARK))
	c.saw("read the urgent byte", c.b.recv(10, unix.MSG_OOB|unix.MSG_DONTWAIT))
	c.saw("read the rest", c.b.recv(100, unix.MSG_DONTWAIT))
}

func outOfBandInline(c *conn) {
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_OOBINLINE, 1))
	c.a.send(10)
	c.saw("send", c.a.sendOnce(1, unix.MSG_OOB))
	c.settle()
	c.saw("poll", c.b.now())
	c.saw("read to the mark", c.b.recv(100, unix.MSG_DONTWAIT))
	c.saw("at the mark", c.b.ioctl(unix.SIOCATMARK))
	c.saw("read the rest", c.b.recv(100, unix.MSG_DONTWAIT))
}

func bytesUnsent(c *conn) {
	none := func(what string) { c.mustBecome(what, "0", func() string { return c.a.ioctl(unix.TIOCOUTQ) }) }
	none("nothing sent")
	c.a.send(1000)
	none("unread, but acknowledged")
	c.saw("read", c.b.recvAll(1000))
}

// file returns a file with the next n bytes that e sends.
func (e *end) file(n int) int {
	fd, err := unix.MemfdCreate("conformance", unix.MFD_CLOEXEC)
	e.c.must(err)
	e.c.closeAtEnd(fd)
	_, err = unix.Pwrite(fd, e.next(n), 0)
	e.c.must(err)
	return fd
}

func sendfile(c *conn) {
	file := c.a.file(fits)
	p := c.a.next(fits)
	n, err := c.a.call(unix.POLLOUT, func() (int, error) { return unix.Sendfile(c.a.fd, file, nil, fits) })
	c.saw("send", c.a.accepted(p, n, err))
	c.saw("read", c.b.recvAll(fits))
	n, err = unix.Sendfile(c.a.fd, file, nil, fits)
	c.saw("at the file's end", moved(nil, n, err))
	c.a.send(10)
	c.saw("read what follows", c.b.recvAll(10))
}

// toSocket splices n bytes of a pipe, which p are.
func (c *conn) toSocket(r int, p []byte) string {
	n, err := unix.Splice(r, nil, c.a.fd, nil, len(p), 0)
	return c.a.accepted(p, int(n), err)
}

func spliceIn(c *conn) {
	r, w := c.pipe()
	for i, size := range []int{10, 5000, fits} {
		p := c.a.next(size)
		_, err := unix.Write(w, p)
		c.must(err)
		c.saw(fmt.Sprintf("splice %d", i), c.toSocket(r, p))
		c.saw(fmt.Sprintf("read %d", i), c.b.recvAll(size))
	}
}

func vmspliceIn(c *conn) {
	r, w := c.pipe()
	const size = 20_000
	p := c.a.next(size)
	n, err := unix.Vmsplice(w, []unix.Iovec{{Base: &p[0], Len: size}}, 0)
	c.saw("vmsplice", moved(p, n, err))
	c.saw("splice", c.toSocket(r, p))
	c.saw("read", c.b.recvAll(size))
}

func zerocopySend(c *conn) {
	c.saw("set", c.a.set(unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1))
	c.saw("send", c.a.sendOnce(16<<10, unix.MSG_ZEROCOPY))
	c.saw("read", c.b.recvAll(16<<10))
	c.saw("completion", c.a.notification(deadline))
}

// notification returns the control messages of the error queue that come within d.
func (e *end) notification(d time.Duration) string {
	if !e.wait(0, d) { // POLLERR is always asked for
		return "none"
	}
	_, control, _ := e.recvControl(10, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	return fmt.Sprint(control)
}

func sendTimestamps(c *conn) {
	c.saw("set", c.a.set(unix.SOL_SOCKET, unix.SO_TIMESTAMPING,
		unix.SOF_TIMESTAMPING_SOFTWARE|unix.SOF_TIMESTAMPING_TX_SOFTWARE|unix.SOF_TIMESTAMPING_OPT_TSONLY))
	c.saw("send", c.a.sendOnce(10, 0))
	c.saw("read", c.b.recvAll(10))
	patience := deadline
	if c.resembles() == shortcut {
		patience = 10 * quiet
	}
	c.saw("notification", c.a.notification(patience))
}

// fill writes until the kernel takes no more, and returns how much it took.
func (e *end) fill() int {
	before := e.sent.Load()
	for {
		p := e.next(64 << 10)
		n, err := unix.SendmsgN(e.fd, p, nil, nil, unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			// TCP takes more while it moves bytes on, and by its timers.
			if !e.wait(unix.POLLOUT, 10*quiet) {
				return int(e.sent.Load() - before)
			}
			continue
		}
		e.c.must(err)
		e.sent.Add(int64(n))
	}
}

func backpressure(c *conn) {
	start := c.a.sent.Load()
	filled := c.a.fill()
	c.saw("accepted", about(filled))
	got := c.asleep(func() any { return c.a.wait(unix.POLLOUT, deadline) })
	c.saw("all bytes are read", c.b.recvAll(filled) == moved(c.content.piece(start, filled), filled, nil))
	c.saw("writable again", got())
	c.exchange(c.a, c.b, 2, 100)
	c.saw("poll in the end", c.a.now())
}

// sendOnceNow is one call of send that does not sleep.
func (e *end) sendOnceNow(n int) string {
	p := e.next(n)
	n, err := unix.SendmsgN(e.fd, p, nil, nil, unix.MSG_DONTWAIT)
	return e.accepted(p, n, err)
}

// wokenWrite writes much more than fits while nobody reads.
func wokenWrite(c *conn) {
	start := c.a.sent.Load()
	got := c.onThread(func() any { return c.a.send(much) })
	time.Sleep(quiet)
	c.saw("written before it is read", c.a.sent.Load() == start+much)
	read := c.b.recvAll(much)
	c.saw("sent as read", read == got())
}

func sendTimeout(c *conn) {
	start := c.a.sent.Load()
	c.a.timeout(unix.SO_SNDTIMEO, quiet)
	c.a.sendOnce(much, 0)
	// How much that is depends on how soon TCP moves it on; the row of backpressure compares it.
	c.saw("some of a write is accepted", c.a.sent.Load() > start)
	// TCP may still take a little now and then.
	var last string
	var slept time.Duration
	for try := 0; try < 100 && last != "EAGAIN"; try++ {
		before := time.Now()
		last = c.a.sendOnce(much, 0)
		slept = time.Since(before)
	}
	c.saw("write when full", last)
	c.saw("slept", slept > quiet/2)
	c.a.timeout(unix.SO_SNDTIMEO, deadline)
	sent := int(c.a.sent.Load() - start)
	c.saw("all bytes are read", c.b.recvAll(sent) == moved(c.content.piece(start, sent), sent, nil))
	c.exchange(c.a, c.b, 2, 100)
}

// shrink gives a socket the smallest buffers.
func shrink(fd int) error {
	for _, option := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 4096); err != nil {
			return err
		}
	}
	return nil
}

func smallBuffers(c *conn) {
	const size = 100_000
	got := c.onThread(func() any { return c.a.send(size) })
	read := c.b.recvAll(size)
	c.saw("sent as read", read == got())
	c.saw("buffers", c.a.get(unix.SOL_SOCKET, unix.SO_SNDBUF)+" "+c.b.get(unix.SOL_SOCKET, unix.SO_RCVBUF))
}

// manyPieces writes more buffers than one message of the shortcut has room for.
func manyPieces(c *conn) {
	const pieces, size = 300, 37
	p := c.a.next(pieces * size)
	var all [][]byte
	for i := range pieces {
		all = append(all, p[i*size:(i+1)*size])
	}
	n, err := unix.Writev(c.a.fd, all)
	c.saw("write", c.a.accepted(p, n, err))
	c.saw("read", c.b.recvAll(len(p)))
}

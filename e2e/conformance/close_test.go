// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func closeRows() []row {
	return []row{
		{name: "half-close", run: halfClose, ends: true, blockingTCP: halfClosed},
		{name: "shut down both ways", run: shutDownBoth, ends: true},
		{name: "both shut down at once", run: shutDownAtOnce, ends: true},
		{name: "shutdown of reading", run: shutDownReading},
		{name: "shutdown of reading with bytes unread", run: shutDownReadingUnread},
		{name: "close after a message", run: closeAfterMessage, ends: true},
		{name: "close after a long message", run: closeAfterLongMessage, ends: true},
		{name: "close with bytes unread", run: closeUnread, ends: true, differs: differs(shortcut, "unread-close", "events", "read")},
		{name: "both close with bytes unread", run: closeBothUnread, ends: true, differs: differs(shortcut, "unread-close", "read again")},
		{name: "write after the peer's close", run: writeAfterClose, ends: true},
		{name: "write after own shutdown", run: writeAfterShutdown, blockingTCP: halfClosed},
		{name: "reset", run: reset, ends: true},
		{name: "reset with bytes unread", run: resetUnread, ends: true},
		{name: "reset of a sleeping read", run: resetSleeping, blocking: true, ends: true, differs: alike(sleepingRecv, "read", "next read")},
		{name: "reset of a sleeping write", run: resetWriter, blocking: true, tcp: spills, ends: true},
		{name: "close under a sleeping read", run: closeSleeping, ends: true},
		{name: "disconnect and connect again", run: disconnect, ends: true, differs: differs(late, "disconnect", "own read")},
		{name: "one of two descriptors is closed", run: closeDuplicate},
	}
}

// gone waits until a reset has arrived.
func (e *end) gone() {
	e.c.t.Helper()
	e.until(0) // POLLHUP and POLLERR are always asked for
}

func halfClose(c *conn) {
	c.a.send(100)
	c.saw("shutdown", c.a.shutdown(unix.SHUT_WR))
	c.b.until(unix.POLLRDHUP)
	c.saw("events", c.b.now())
	c.saw("read", c.b.recvAll(100))
	c.saw("the end", c.b.recv(10, 0))
	c.saw("the end again", c.b.recv(10, 0))
	c.saw("own events", c.a.now())
	for range 3 {
		c.b.send(5000)
		c.saw("answer", c.a.recvAll(5000))
	}
	got := c.asleep(func() any { return c.a.recv(10, 0) })
	c.b.send(10)
	c.saw("awaited answer", got())
	c.prove()
	c.saw("shutdown of the other", c.b.shutdown(unix.SHUT_WR))
	c.a.until(unix.POLLRDHUP)
	c.saw("the end of the other", c.a.recv(10, 0))
	c.saw("events in the end", c.a.now()+" "+c.b.now())
}

func shutDownBoth(c *conn) {
	c.a.send(100)
	c.prove()
	c.saw("shutdown", c.a.shutdown(unix.SHUT_RDWR))
	c.b.until(unix.POLLRDHUP)
	c.saw("own events", c.a.now())
	c.saw("own read", c.a.recv(10, unix.MSG_DONTWAIT))
	c.saw("own write", c.a.sendOnceNow(1))
	c.saw("read", c.b.recvAll(100))
	c.saw("the end", c.b.recv(10, 0))
	c.saw("SO_ERROR", c.b.get(unix.SOL_SOCKET, unix.SO_ERROR))
}

func shutDownAtOnce(c *conn) {
	c.a.send(100)
	c.b.send(200)
	c.prove()
	c.saw("shutdown", c.a.shutdown(unix.SHUT_WR)+" "+c.b.shutdown(unix.SHUT_WR))
	c.a.gone()
	c.b.gone()
	c.saw("events", c.a.now()+" "+c.b.now())
	c.saw("read", c.b.recv(300, 0))
	c.saw("other read", c.a.recv(300, 0))
	c.saw("the end", c.b.recv(10, 0)+" "+c.a.recv(10, 0))
}

func shutDownReading(c *conn) {
	c.saw("shutdown", c.b.shutdown(unix.SHUT_RD))
	c.saw("read with nothing there", c.b.recv(10, 0))
	c.saw("events", c.b.now())
	c.saw("send to it", c.a.sendOnce(50, 0))
	c.settle()
	c.saw("read what has come", c.b.recv(100, unix.MSG_DONTWAIT))
	c.saw("read again", c.b.recv(100, unix.MSG_DONTWAIT))
	c.b.send(10)
	c.saw("the other direction", c.a.recv(100, 0))
}

func shutDownReadingUnread(c *conn) {
	c.a.send(50)
	c.settle()
	c.saw("shutdown", c.b.shutdown(unix.SHUT_RD))
	c.saw("events", c.b.now())
	c.saw("read", c.b.recv(30, unix.MSG_DONTWAIT))
	c.saw("read the rest", c.b.recv(100, unix.MSG_DONTWAIT))
	c.saw("read again", c.b.recv(100, unix.MSG_DONTWAIT))
}

func closeAfterMessage(c *conn) {
	c.a.send(100)
	c.prove()
	c.a.close()
	c.b.until(unix.POLLRDHUP)
	c.saw("events", c.b.now())
	c.saw("read", c.b.recv(60, 0))
	c.saw("read the rest", c.b.recv(60, 0))
	c.saw("the end", c.b.recv(60, 0))
	c.saw("the end again", c.b.recv(60, 0))
}

func closeAfterLongMessage(c *conn) {
	c.a.send(fits)
	c.prove()
	c.a.close()
	c.saw("read", c.b.recvAll(fits))
	c.saw("the end", c.b.recv(60, 0))
}

func closeUnread(c *conn) {
	c.a.send(100)
	c.settle()
	c.saw("read a part", c.b.recv(10, 0))
	c.prove()
	c.b.close()
	c.a.until(unix.POLLRDHUP)
	c.saw("events", c.a.now())
	c.saw("read", c.a.recv(10, 0))
	c.saw("read again", c.a.recv(10, 0))
	c.saw("SO_ERROR", c.a.get(unix.SOL_SOCKET, unix.SO_ERROR))
}

func closeBothUnread(c *conn) {
	c.a.send(100)
	c.b.send(50)
	c.settle()
	c.prove()
	c.b.close()
	c.a.until(unix.POLLRDHUP)
	c.saw("read what had come", c.a.recv(100, 0))
	c.saw("read again", c.a.recv(10, 0))
}

func writeAfterClose(c *conn) {
	c.prove()
	c.b.close()
	c.a.until(unix.POLLRDHUP)
	c.saw("events", c.a.now())
	c.saw("first write", c.a.sendOnceNow(10))
	c.a.gone()
	c.saw("events after the reset", c.a.now())
	c.saw("second write", c.a.write(10))
	c.saw("its signal", signals(c))
	c.saw("third write", c.a.write(10))
	c.saw("its signal", signals(c))
	c.saw("without a signal", c.a.sendOnce(10, unix.MSG_NOSIGNAL))
	c.saw("its signal", signals(c))
	c.saw("read", c.a.recv(10, 0))
}

func writeAfterShutdown(c *conn) {
	c.saw("shutdown", c.a.shutdown(unix.SHUT_WR))
	c.saw("write", c.a.write(10))
	c.saw("its signal", signals(c))
	c.saw("without a signal", c.a.sendOnce(10, unix.MSG_NOSIGNAL))
	c.saw("its signal", signals(c))
	c.saw("reader", c.b.recv(10, 0))
	c.b.send(10)
	c.saw("the other direction", c.a.recv(10, 0))
}

// write is one call of write.
func (e *end) write(n int) string {
	p := e.next(n)
	n, err := e.call(unix.POLLOUT, func() (int, error) { return unix.Write(e.fd, p) })
	return e.accepted(p, n, err)
}

// signals takes SIGPIPE and ioSignal from this thread, if they are pending.
func signals(c *conn) string {
	set, now := sigset(unix.SIGPIPE, ioSignal), unix.Timespec{}
	n, _, no := unix.Syscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&set)), 0, uintptr(unsafe.Pointer(&now)), 8, 0, 0)
	if no == unix.EAGAIN {
		return "none"
	}
	if no != 0 {
		return errno(no)
	}
	if unix.Signal(n) == ioSignal {
		return "I/O"
	}
	return unix.SignalName(unix.Signal(n))
}

func reset(c *conn) {
	c.prove()
	c.a.reset()
	c.b.gone()
	c.saw("events", c.b.now())
	c.saw("read", c.b.recv(10, 0))
	c.saw("read again", c.b.recv(10, 0))
	c.saw("write", c.b.sendOnce(10, unix.MSG_NOSIGNAL))
	c.saw("SO_ERROR", c.b.get(unix.SOL_SOCKET, unix.SO_ERROR))
}

func resetUnread(c *conn) {
	c.a.send(100)
	c.settle()
	c.prove()
	c.a.reset()
	c.b.gone()
	c.saw("events", c.b.now())
	c.saw("first read", c.b.recv(60, 0))
	c.saw("second read", c.b.recv(60, 0))
	c.saw("third read", c.b.recv(60, 0))
	c.saw("fourth read", c.b.recv(60, 0))
}

func resetSleeping(c *conn) {
	c.prove()
	got := c.asleep(func() any { return c.b.recvOnce(10, 0) })
	c.a.reset()
	c.saw("read", got())
	c.b.gone()
	c.saw("next read", c.b.recv(10, 0))
	c.saw("third read", c.b.recv(10, 0))
}

func resetWriter(c *conn) {
	c.a.fill()
	c.prove()
	got := c.asleep(func() any {
		// What fits meanwhile may come first.
		for range 100 {
			if got := c.a.sendOnce(10<<20, unix.MSG_NOSIGNAL); !strings.Contains(got, "bytes") {
				return got
			}
		}
		return "no error"
	})
	c.b.reset()
	c.saw("write", got())
	c.saw("next write", c.a.sendOnce(100, unix.MSG_NOSIGNAL))
}

func closeSleeping(c *conn) {
	c.prove()
	got := c.asleep(func() any { return c.b.recv(10, 0) })
	c.a.close()
	c.saw("read", got())
	got = c.asleep(func() any { return c.b.wait(unix.POLLIN, deadline) })
	c.saw("poll", got())
}

// disconnect ends a connection by connect to no address, and connects the same socket to another listener.
func disconnect(c *conn) {
	c.a.send(100)
	c.b.send(100)
	c.settle()
	c.prove()
	c.saw("disconnect", done(disconnectSocket(c.a.fd)))
	c.b.gone()
	c.saw("other end", c.b.recv(200, 0)+" "+c.b.recv(10, 0))
	c.saw("own read", c.a.recv(10, unix.MSG_DONTWAIT))

	l, address := c.listen(c.b.pod, c.freePort(), nil)
	err := unix.Connect(c.a.fd, sockaddr(address))
	if err == unix.EINPROGRESS {
		c.a.until(unix.POLLOUT)
		err = nil
	}
	c.saw("connect", done(err))
	if err != nil {
		return
	}
	old := c.b
	c.b = &end{c: c, fd: c.accept(l, old.blocking), pod: old.pod, blocking: old.blocking}
	c.exchange(c.a, c.b, 5, 1000)
	c.a.send(100)
	c.a.close()
	c.saw("read", c.b.recvAll(200))
	c.saw("the end", c.b.recv(10, 0))
}

func disconnectSocket(fd int) error {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, no := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere))
	if no != 0 {
		return no
	}
	return nil
}

func closeDuplicate(c *conn) {
	fd, err := unix.Dup(c.a.fd)
	c.must(err)
	c.a.send(10)
	c.must(unix.Close(fd))
	time.Sleep(time.Millisecond)
	c.a.send(10)
	c.settle()
	c.saw("read", c.b.recv(100, 0))
	c.b.send(10)
	c.saw("other read", c.a.recv(100, 0))
}

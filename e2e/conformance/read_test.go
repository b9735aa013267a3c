// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"encoding/binary"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const waitsForAll = "a receiver seen to use MSG_WAITALL stays on TCP"

func readRows() []row {
	all := []row{
		{name: "partial reads", run: partialReads},
		{name: "peek", run: peek},
		{
			name: "peek with SO_PEEK_OFF", run: peekOffset,
			differs: differs(shortcut, "peek-off", "first peek", "second peek", "offset after peeks", "offset after the read", "peek after the read"),
		},
		{
			name: "MSG_TRUNC", run: truncate,
			differs: differs(shortcut, "trunc", "leaves the buffer alone", "without a buffer"),
		},
		{
			name: "MSG_WAITALL after other reads", run: waitAll, blocking: true, tcp: waitsForAll,
			differs: differs(shortcut, "waitall", "read", "left"),
		},
		{name: "MSG_WAITALL again", run: waitAllAgain, blocking: true, tcp: waitsForAll},
		{name: "MSG_WAITALL as the first read", run: waitAll, blocking: true, cold: true, tcp: "the receiver has not been seen to read"},
		{name: "MSG_WAITALL, non-blocking", run: waitAllNonblocking, nonblocking: true},
		{name: "MSG_DONTWAIT", run: dontWait},
		{name: "SO_RCVLOWAT", run: lowWater, tcp: "the receiver has SO_RCVLOWAT"},
		{name: "SO_RCVLOWAT with bytes queued", run: lowWaterLate, differs: differs(shortcut, "lowat", "poll below")},
		{name: "SO_RCVTIMEO", run: receiveTimeout, blocking: true},
		{name: "a sleeping read is woken", run: wokenRead},
		{name: "a sleeping read is interrupted", run: interruptedRead, blocking: true, differs: alike(sleepingRecv, "read")},
		{
			name: "FIONREAD", run: bytesWaiting,
			differs: append(differs(held, "fionread-tcp", "one message", "two messages", "after the read"),
				differs(shortcut, "fionread-redirected", "one message", "two messages", "after the read")...),
		},
		{name: "empty reads", run: emptyReads, differs: alike("empty-recv", "recv with nothing there")},
		{name: "SO_TIMESTAMP", run: timestamps, differs: differs(shortcut, "recv-control", "control messages")},
		{name: "TCP_INQ", run: inq, differs: differs(shortcut, "recv-control", "bytes left")},
		{name: "TCP_ZEROCOPY_RECEIVE", run: zerocopyReceive, differs: differs(shortcut, "zerocopy-receive", "to be read")},
		{name: "splice out", run: spliceOut, differs: differs(shortcut, "splice", "splice", "splice the rest", "left")},
		{name: "splice out after a read", run: spliceOutLater, differs: differs(shortcut, "splice", "splice", "left")},
		{name: "error queue", run: errorQueue},
	}
	for _, r := range []struct {
		name string
		read func(fd int, p []byte) (int, error)
	}{
		{"read", unix.Read},
		{"readv", func(fd int, p []byte) (int, error) { return unix.Readv(fd, split(p)) }},
		{"recv", func(fd int, p []byte) (int, error) {
			n, _, err := unix.Recvfrom(fd, p, 0)
			return n, err
		}},
		{"recvmsg", func(fd int, p []byte) (int, error) {
			n, _, _, _, err := unix.RecvmsgBuffers(fd, split(p), nil, 0)
			return n, err
		}},
		{"recvmmsg", recvmmsg},
	} {
		all = append(all, row{name: "reads by " + r.name, run: func(c *conn) { readBy(c, r.read) }})
	}
	return all
}

// split cuts p into buffers of unequal sizes.
func split(p []byte) [][]byte {
	third := len(p) / 3
	return [][]byte{p[:third], p[third : third+1], p[third+1:]}
}

// mmsghdr is struct mmsghdr of recvmmsg and sendmmsg.
type mmsghdr struct {
	header unix.Msghdr
	n      uint32
	_      [4]byte
}

// messages returns two messages with p as their buffers.
func messages(p []byte) (*[2]mmsghdr, [2]unix.Iovec) {
	half := len(p) / 2
	iov := [2]unix.Iovec{{Base: &p[0], Len: uint64(half)}, {Base: &p[half], Len: uint64(len(p) - half)}}
	all := &[2]mmsghdr{}
	for i := range all {
		all[i].header.Iov, all[i].header.Iovlen = &iov[i], 1
	}
	return all, iov
}

// recvmmsg reads into two messages, and waits for the first only.
func recvmmsg(fd int, p []byte) (int, error) {
	all, _ := messages(p)
	n, _, no := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(all)), 2, unix.MSG_WAITFORONE, 0, 0)
	if no != 0 {
		return 0, no
	}
	sum := int(all[0].n)
	if n == 2 {
		if sum != len(p)/2 {
			return 0, fmt.Errorf("a second message after %d bytes", sum)
		}
		sum += int(all[1].n)
	}
	return sum, nil
}

func readBy(c *conn, read func(int, []byte) (int, error)) {
	again := func(name string, n int) {
		p := make([]byte, n)
		n, err := c.b.call(unix.POLLIN, func() (int, error) { return read(c.b.fd, p) })
		c.saw(name, moved(p, n, err))
	}
	c.a.send(100)
	c.settle()
	again("less than there is", 30)
	again("more than there is", 200)
	c.a.send(50)
	c.a.send(50)
	c.settle()
	again("of two messages", 60)
	again("the rest", 60)
	c.a.send(fits)
	c.saw("of a long message", c.b.recvAll(fits))
	if !c.b.blocking {
		n, err := read(c.b.fd, make([]byte, 10))
		c.saw("nothing there", moved(nil, n, err))
	}
	c.a.shutdown(unix.SHUT_WR)
	again("at the end", 10)
}

// fits is a size that TCP's buffers take while nobody reads, on every kernel.
const fits = 30_000

func partialReads(c *conn) {
	c.a.send(100)
	c.settle()
	for i, n := range []int{1, 29, 30, 100} {
		c.saw(fmt.Sprintf("read %d", i), c.b.recv(n, 0))
	}
	for range 3 {
		c.a.send(10)
	}
	c.settle()
	c.saw("across two messages", c.b.recv(15, 0))
	c.saw("across the last", c.b.recv(100, 0))
	c.saw("poll", c.b.now())
}

func peek(c *conn) {
	for range 3 {
		c.a.send(10)
	}
	c.settle()
	c.saw("peek at a part", c.b.recv(5, unix.MSG_PEEK))
	c.saw("peek at more", c.b.recv(25, unix.MSG_PEEK))
	c.saw("peek at all", c.b.recv(100, unix.MSG_PEEK))
	c.saw("read", c.b.recv(15, 0))
	c.saw("peek at the rest", c.b.recv(100, unix.MSG_PEEK))
	c.saw("read the rest", c.b.recv(100, 0))
	c.a.send(fits)
	c.settle()
	c.saw("peek at a long message", c.b.recv(fits-100, unix.MSG_PEEK|unix.MSG_DONTWAIT))
	c.saw("read it", c.b.recvAll(fits))
}

func peekOffset(c *conn) {
	c.a.send(100)
	c.settle()
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_PEEK_OFF, 10))
	c.saw("first peek", c.b.recv(20, unix.MSG_PEEK))
	c.saw("second peek", c.b.recv(20, unix.MSG_PEEK))
	c.saw("offset after peeks", c.b.get(unix.SOL_SOCKET, unix.SO_PEEK_OFF))
	c.saw("read", c.b.recv(15, 0))
	c.saw("offset after the read", c.b.get(unix.SOL_SOCKET, unix.SO_PEEK_OFF))
	c.saw("peek after the read", c.b.recv(20, unix.MSG_PEEK))
}

func truncate(c *conn) {
	c.a.send(100)
	c.settle()
	p := make([]byte, 30)
	n, _, err := unix.Recvfrom(c.b.fd, p, unix.MSG_TRUNC)
	c.saw("discards", fmt.Sprint(n, err))
	c.saw("leaves the buffer alone", moved(p, len(p), nil))
	// Programs need not give a buffer.
	m, _, no := unix.Syscall6(unix.SYS_RECVFROM, uintptr(c.b.fd), 0, 30, unix.MSG_TRUNC, 0, 0)
	if no != 0 {
		m = 0
	}
	c.saw("without a buffer", fmt.Sprint(m, no))
	if m < 30 {
		c.b.recv(30-int(m), 0)
	}
	c.saw("read", c.b.recv(100, 0))
}

// waitAll receives what comes in two halves.
func waitAll(c *conn) {
	got := c.asleep(func() any { return c.b.recv(100, unix.MSG_WAITALL) })
	c.a.send(50)
	time.Sleep(quiet) // until the receiver sleeps again
	c.a.send(50)
	c.saw("read", got())
	c.saw("left", c.b.recv(100, unix.MSG_DONTWAIT))
}

func waitAllAgain(c *conn) {
	c.a.send(10)
	c.settle()
	c.saw("the first has all", c.b.recv(10, unix.MSG_WAITALL))
	for i := range 3 {
		got := c.asleep(func() any { return c.b.recv(100, unix.MSG_WAITALL) })
		c.a.send(50)
		time.Sleep(quiet)
		c.a.send(50)
		c.saw(fmt.Sprintf("read %d", i), got())
	}
}

func waitAllNonblocking(c *conn) {
	c.a.send(50)
	c.settle()
	c.saw("half is there", c.b.recv(100, unix.MSG_WAITALL))
	c.saw("nothing is there", c.b.recv(100, unix.MSG_WAITALL|unix.MSG_DONTWAIT))
}

func dontWait(c *conn) {
	c.saw("nothing there", c.b.recv(10, unix.MSG_DONTWAIT))
	c.a.send(20)
	c.settle()
	c.saw("read", c.b.recv(10, unix.MSG_DONTWAIT))
	c.saw("peek", c.b.recv(30, unix.MSG_DONTWAIT|unix.MSG_PEEK))
	c.saw("the rest", c.b.recv(30, unix.MSG_DONTWAIT))
	c.saw("nothing left", c.b.recv(10, unix.MSG_DONTWAIT|unix.MSG_PEEK))
}

func lowWater(c *conn) {
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 50))
	c.a.send(20)
	c.settle()
	c.saw("poll below", c.b.silent(unix.POLLIN))
	c.a.send(30)
	c.b.until(unix.POLLIN)
	c.saw("read", c.b.recv(100, 0))
	c.a.send(20)
	c.settle()
	c.saw("read below", c.b.recv(100, unix.MSG_DONTWAIT))
	c.saw("unset", c.b.set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1))
	c.a.send(1)
	c.saw("read of one", c.b.recv(100, 0))
}

// lowWaterLate sets the mark when bytes are there that are fewer.
func lowWaterLate(c *conn) {
	c.a.send(20)
	c.settle()
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 50))
	c.saw("poll below", c.b.silent(unix.POLLIN))
	c.saw("unset", c.b.set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1))
	c.saw("read", c.b.recv(100, 0))
}

func receiveTimeout(c *conn) {
	c.b.timeout(unix.SO_RCVTIMEO, quiet)
	start := time.Now()
	c.saw("nothing comes", c.b.recvOnce(10, 0))
	// The kernel rounds to ticks.
	c.saw("slept", time.Since(start) > quiet/2)
	c.a.send(10)
	c.settle()
	c.saw("something is there", c.b.recv(10, 0))
	c.b.timeout(unix.SO_RCVTIMEO, deadline)
	got := c.asleep(func() any { return c.b.recv(10, 0) })
	c.a.send(10)
	c.saw("in time", got())
}

func wokenRead(c *conn) {
	for i := range 3 {
		got := c.asleep(func() any { return c.b.recv(100, 0) })
		c.a.send(10)
		c.saw(fmt.Sprintf("read %d", i), got())
	}
	got := c.asleep(func() any { return c.b.recv(100, 0) })
	c.a.shutdown(unix.SHUT_WR)
	c.saw("at the end", got())
}

// interruptedRead sends a signal, which the Go runtime's handler takes with SA_RESTART.
func interruptedRead(c *conn) {
	c.b.timeout(unix.SO_RCVTIMEO, 0)
	tid := make(chan int, 1)
	got := c.asleep(func() any {
		tid <- unix.Gettid()
		urgent := sigset(unix.SIGURG)
		if err := unix.PthreadSigmask(unix.SIG_UNBLOCK, &urgent, nil); err != nil {
			return err
		}
		return c.b.recvOnce(100, 0)
	})
	c.must(unix.Tgkill(unix.Getpid(), <-tid, unix.SIGURG))
	time.Sleep(quiet)
	c.a.send(10)
	c.saw("read", got())
}

func bytesWaiting(c *conn) {
	c.saw("nothing there", c.b.ioctl(unix.TIOCINQ))
	c.a.send(10)
	c.settle()
	c.saw("one message", c.b.ioctl(unix.TIOCINQ))
	c.a.send(20)
	c.settle()
	c.saw("two messages", c.b.ioctl(unix.TIOCINQ))
	c.saw("read", c.b.recv(15, 0))
	c.saw("after the read", c.b.ioctl(unix.TIOCINQ))
	c.saw("read the rest", c.b.recv(15, 0))
	c.saw("nothing left", c.b.ioctl(unix.TIOCINQ))
}

func emptyReads(c *conn) {
	if !c.b.blocking {
		c.saw("recv with nothing there", c.b.recv(0, unix.MSG_DONTWAIT))
	}
	n, err := unix.Read(c.b.fd, nil)
	c.saw("read with nothing there", moved(nil, n, err))
	c.a.send(10)
	c.settle()
	c.saw("recv", c.b.recv(0, 0))
	n, err = unix.Read(c.b.fd, nil)
	c.saw("read", moved(nil, n, err))
	c.saw("the bytes are still there", c.b.recv(100, 0))
}

// recvControl is recvmsg with room for control messages, of which it lists the types.
func (e *end) recvControl(n, flags int) (got string, control []string, data []byte) {
	p, oob := make([]byte, n), make([]byte, 512)
	var oobn, received int
	n, err := e.call(unix.POLLIN, func() (n int, err error) {
		n, oobn, received, _, err = unix.Recvmsg(e.fd, p, oob, flags)
		return n, err
	})
	got = moved(p, n, err)
	if err != nil {
		return got, nil, nil
	}
	if received &^= unix.MSG_CMSG_CLOEXEC; received != 0 {
		got += fmt.Sprintf(", flags %#x", received)
	}
	all, err := unix.ParseSocketControlMessage(oob[:oobn])
	e.c.must(err)
	for _, m := range all {
		control = append(control, fmt.Sprintf("%d/%d", m.Header.Level, m.Header.Type))
		data = m.Data
	}
	return got, control, data
}

func timestamps(c *conn) {
	c.saw("set", c.b.set(unix.SOL_SOCKET, unix.SO_TIMESTAMP, 1))
	var control []string
	// The kernel begins to take time stamps a little later.
	patience := 1000
	if c.resembles() == shortcut {
		patience = 5
	}
	for try := 0; try < patience && control == nil; try++ {
		time.Sleep(quiet)
		c.a.send(10)
		c.settle()
		_, control, _ = c.b.recvControl(100, 0)
	}
	c.saw("control messages", fmt.Sprint(control))
}

func inq(c *conn) {
	c.saw("set", c.b.set(unix.IPPROTO_TCP, unix.TCP_INQ, 1))
	c.a.send(30)
	c.settle()
	got, control, data := c.b.recvControl(10, 0)
	c.saw("read", got)
	left := "none"
	if len(control) == 1 && len(data) == 4 {
		left = fmt.Sprint(binary.NativeEndian.Uint32(data))
	}
	c.saw("bytes left", left)
}

// zerocopyReceive asks for bytes that are too few to be mapped: programs read as many as they are told.
func zerocopyReceive(c *conn) {
	area, err := unix.Mmap(c.b.fd, 0, unix.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	c.saw("mmap", done(err))
	if err != nil {
		return
	}
	defer func() { c.must(unix.Munmap(area)) }()
	c.a.send(10)
	c.settle()
	// struct tcp_zerocopy_receive of include/uapi/linux/tcp.h, up to err.
	z := struct {
		address                   uint64
		length, skip, inq, failed uint32
	}{address: uint64(uintptr(unsafe.Pointer(&area[0]))), length: uint32(len(area))}
	size := uint32(unsafe.Sizeof(z))
	_, _, no := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(c.b.fd), unix.IPPROTO_TCP, unix.TCP_ZEROCOPY_RECEIVE,
		uintptr(unsafe.Pointer(&z)), uintptr(unsafe.Pointer(&size)), 0)
	if no != 0 {
		c.saw("call", errno(no))
	} else {
		c.saw("call", fmt.Sprintf("maps %d", z.length))
	}
	c.saw("to be read", z.skip)
	c.saw("read", c.b.recv(100, 0))
}

// splice moves up to n bytes and describes them.
func (c *conn) splice(from *end, n int) string {
	r, w := c.pipe()
	flags := 0
	if !from.blocking {
		flags = unix.SPLICE_F_NONBLOCK
	}
	// Where it is not served it may sleep as if there was nothing.
	from.timeout(unix.SO_RCVTIMEO, 10*quiet)
	moves, err := unix.Splice(from.fd, nil, w, nil, n, flags)
	from.timeout(unix.SO_RCVTIMEO, deadline)
	if err != nil || moves == 0 {
		return moved(nil, int(moves), err)
	}
	p := make([]byte, moves)
	n, err = unix.Read(r, p)
	return moved(p, n, err)
}

func spliceOut(c *conn) {
	c.a.send(100)
	c.settle()
	c.saw("splice", c.splice(c.b, 50))
	c.saw("splice the rest", c.splice(c.b, 200))
	c.saw("left", c.b.recv(200, unix.MSG_DONTWAIT))
}

// spliceOutLater is what a proxy does: it reads a header, and splices the body.
func spliceOutLater(c *conn) {
	c.a.send(100)
	c.settle()
	c.saw("read", c.b.recv(30, 0))
	c.saw("splice", c.splice(c.b, 200))
	c.saw("left", c.b.recv(200, unix.MSG_DONTWAIT))
	c.a.shutdown(unix.SHUT_WR)
	c.b.until(unix.POLLRDHUP)
	c.saw("splice at the end", c.splice(c.b, 200))
}

func errorQueue(c *conn) {
	c.a.send(10)
	c.settle()
	c.saw("nothing there", c.b.recv(100, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT))
	c.saw("read", c.b.recv(100, 0))
}

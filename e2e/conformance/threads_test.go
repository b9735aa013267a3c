// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// childEnv makes this program the other process of a row: it gets a socket as
// file 3, or a Unix socket that brings one, and sends back what it reads.
const childEnv = "PODSHUNT_CONFORMANCE_CHILD"

const (
	inherits = "inherits"
	receives = "receives"
	// sleeps: it receives once, and its status is what came of that.
	sleeps = "sleeps"
	// childReads is how many bytes it reads.
	childReads = 3000
)

const halfClosed = "a socket in blocking mode leaves when it shuts down writing"

const twoThreads = "a socket in blocking mode leaves if one thread reads and another writes it"

func threadRows() []row {
	return []row{
		{name: "several threads read", run: severalReaders, ends: true, tcp: spills},
		{name: "several threads write", run: severalWriters, listen: roomy, dial: roomy, tcp: spills, blockingTCP: twoThreads},
		{name: "one thread reads, one writes", run: readerAndWriter, tcp: spills, blockingTCP: twoThreads},
		{name: "a child process reads on", run: func(c *conn) { otherProcess(c, inherits) }, blockingTCP: twoThreads},
		{name: "a socket is passed to a process", run: func(c *conn) { otherProcess(c, receives) }, blockingTCP: twoThreads},
		{name: "io_uring", run: ioUring, blockingTCP: twoThreads},
	}
}

// severalReaders: each byte is read once, by whatever thread.
func severalReaders(c *conn) {
	const threads, messages, size = 4, 200, 100
	var mu sync.Mutex
	sum, count := 0, 0
	var ends []func() any
	for range threads {
		ends = append(ends, c.asleep(func() any {
			p := make([]byte, 300)
			for {
				n, err := c.b.call(unix.POLLIN, func() (int, error) { return unix.Read(c.b.fd, p) })
				if err != nil {
					return errno(err)
				}
				if n == 0 {
					return "the end"
				}
				mu.Lock()
				count += n
				for _, b := range p[:n] {
					sum += int(b)
				}
				mu.Unlock()
			}
		}))
	}
	for range messages {
		c.a.send(size)
	}
	c.prove()
	c.a.shutdown(unix.SHUT_WR)
	for i, end := range ends {
		c.saw(fmt.Sprintf("thread %d", i), end())
	}
	c.saw("read", fmt.Sprint(count, sum))
}

// roomy makes room for all that severalWriters send: TCP cuts what does not fit.
func roomy(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 200_000) }

// severalWriters: what one call sends stays together.
func severalWriters(c *conn) {
	const threads, messages, size = 4, 50, 100
	var ends []func() any
	for i := range threads {
		ends = append(ends, c.onThread(func() any {
			p := bytes.Repeat([]byte{byte('a' + i)}, size)
			for range messages {
				n, err := c.a.call(unix.POLLOUT, func() (int, error) { return unix.Write(c.a.fd, p) })
				c.a.sent.Add(int64(max(n, 0)))
				if n != size {
					return moved(p, n, err)
				}
			}
			return "done"
		}))
	}
	counts := map[byte]int{}
	p := make([]byte, size)
	for range threads * messages {
		for done := 0; done < size; {
			n, err := c.b.call(unix.POLLIN, func() (int, error) { return unix.Read(c.b.fd, p[done:]) })
			if err != nil || n == 0 {
				c.t.Fatalf("%s: read: %d, %v", c.way, n, err)
			}
			done += n
		}
		if !bytes.Equal(p, bytes.Repeat(p[:1], size)) {
			c.t.Fatalf("%s: two messages are mixed: %q", c.way, p)
		}
		counts[p[0]]++
	}
	for i, end := range ends {
		c.saw(fmt.Sprintf("thread %d", i), end())
	}
	c.saw("messages", fmt.Sprint(counts))
}

// readerAndWriter sends on one thread what another reads back.
func readerAndWriter(c *conn) {
	const messages, size = 100, 500
	reader := c.asleep(func() any { return c.a.recvAll(messages * size) })
	// whole moves all of p, or says what is in the way.
	whole := func(events int16, move func(fd int, p []byte) (int, error), p []byte) string {
		for done := 0; done < len(p); {
			n, err := c.b.call(events, func() (int, error) { return move(c.b.fd, p[done:]) })
			if err != nil || n == 0 {
				return moved(p, n, err)
			}
			done += n
		}
		return "done"
	}
	echo := c.asleep(func() any {
		p := make([]byte, size)
		for range messages {
			if got := whole(unix.POLLIN, unix.Read, p); got != "done" {
				return got
			}
			if got := whole(unix.POLLOUT, unix.Write, p); got != "done" {
				return got
			}
			c.b.sent.Add(size)
		}
		return "done"
	})
	start := c.a.sent.Load()
	for range messages {
		c.a.send(size)
	}
	c.saw("echo", echo())
	c.saw("read back", reader() == moved(c.content.piece(start, messages*size), messages*size, nil))
}

// startChild runs the other process with a descriptor as file 3.
func (c *conn) startChild(how string, fd int) (pid int) {
	c.t.Helper()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"child"}, &syscall.ProcAttr{
		Env:   append(os.Environ(), childEnv+"="+how),
		Files: []uintptr{0, 1, 2, uintptr(fd)},
	})
	c.must(err)
	return pid
}

// endChild waits for the end of the other process, and returns its status.
func (c *conn) endChild(pid int) int {
	c.t.Helper()
	var status unix.WaitStatus
	_, err := unix.Wait4(pid, &status, 0, nil)
	c.must(err)
	return status.ExitStatus()
}

// otherProcess passes b to a process.
func otherProcess(c *conn, how string) {
	fd := c.b.fd
	if how == receives {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		c.must(err)
		defer unix.Close(pair[0])
		defer unix.Close(pair[1])
		c.must(unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(c.b.fd), nil, 0))
		fd = pair[1]
	}
	pid := c.startChild(how, fd)
	sent := c.a.send(childReads)
	c.saw("read back", c.a.recvAll(childReads) == sent)
	c.b.sent.Add(childReads)
	c.saw("status of the process", c.endChild(pid))
	c.a.send(10)
	c.saw("read afterwards", c.b.recv(100, 0))
}

// child is the other process. It returns its exit status.
func child() int {
	fd := 3
	if os.Getenv(childEnv) == sleeps {
		return recvStatus(fd)
	}
	if os.Getenv(childEnv) == receives {
		oob := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 1), oob, 0)
		if err == nil {
			fd, err = receivedFile(oob[:n])
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "receive a socket:", err)
			return 2
		}
	}
	p := make([]byte, childReads)
	move := func(events int16, call func(p []byte) (int, error)) bool {
		for done := 0; done < len(p); {
			n, err := call(p[done:])
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.EAGAIN) {
				if ready, err := poll(fd, events, deadline); err == nil && ready != 0 {
					continue
				}
			}
			if err != nil || n == 0 {
				fmt.Fprintln(os.Stderr, "after", done, "bytes:", n, err)
				return false
			}
			done += n
		}
		return true
	}
	if !move(unix.POLLIN, func(p []byte) (int, error) { return unix.Read(fd, p) }) ||
		!move(unix.POLLOUT, func(p []byte) (int, error) { return unix.Write(fd, p) }) {
		return 3
	}
	return 0
}

func receivedFile(oob []byte) (int, error) {
	all, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, err
	}
	if len(all) != 1 {
		return 0, errors.New("no control message")
	}
	fds, err := unix.ParseUnixRights(&all[0])
	if err != nil || len(fds) != 1 {
		return 0, fmt.Errorf("got files %v: %w", fds, err)
	}
	return fds[0], nil
}

// ring is an io_uring with room for one request at a time.
type ring struct {
	c              *conn
	fd             int
	queue, entries []byte
	params         ringParams
}

// ringParams is struct io_uring_params of include/uapi/linux/io_uring.h.
type ringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	_                                                    [3]uint32
	sq                                                   struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

// request is struct io_uring_sqe.
type request struct {
	opcode, flags uint8
	priority      uint16
	fd            int32
	offset, addr  uint64
	length        uint32
	opFlags       uint32
	data          uint64
	_             [3]uint64
}

// Operations of io_uring, and where its parts are mapped.
const (
	opRead, opWrite, opPoll, opSend, opRecv = 22, 23, 6, 26, 27
	offQueue, offRequests                   = 0, 0x10000000
	waitForEvents                           = 1
)

// newRing returns nil and the error's name if the kernel refuses.
func (c *conn) newRing() (*ring, string) {
	r := &ring{c: c}
	fd, _, no := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&r.params)), 0)
	if no != 0 {
		return nil, errno(no)
	}
	r.fd = int(fd)
	c.closeAtEnd(r.fd)
	p := &r.params
	size := max(p.sq.array+4*p.sqEntries, p.cq.cqes+16*p.cqEntries)
	for _, m := range []struct {
		to     *[]byte
		offset int64
		size   uint32
	}{{&r.queue, offQueue, size}, {&r.entries, offRequests, uint32(unsafe.Sizeof(request{})) * p.sqEntries}} {
		area, err := unix.Mmap(r.fd, m.offset, int(m.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		c.must(err)
		*m.to = area
		c.atEnd(func() {
			if err := unix.Munmap(area); err != nil {
				c.t.Error(err)
			}
		})
	}
	return r, ""
}

func (r *ring) word(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.queue[offset])) }

// submit starts a request; its buffer must stay until wait.
func (r *ring) submit(op uint8, fd int, p []byte, opFlags uint32) {
	p0 := &r.params
	q := request{opcode: op, fd: int32(fd), length: uint32(len(p)), opFlags: opFlags}
	if len(p) > 0 {
		q.addr = uint64(uintptr(unsafe.Pointer(&p[0])))
	}
	if op == opRead || op == opWrite {
		q.offset = 1<<64 - 1 // the file's position: a socket has none
	}
	tail := r.word(p0.sq.tail)
	index := *tail & *r.word(p0.sq.mask)
	*(*request)(unsafe.Pointer(&r.entries[index*uint32(unsafe.Sizeof(q))])) = q
	*r.word(p0.sq.array + 4*index) = index
	*tail++
	// The system call orders the writes.
	if n, no := r.enter(1, 0); n != 1 {
		r.c.t.Fatalf("io_uring_enter: got %d requests accepted, %v", n, no)
	}
}

func (r *ring) enter(submit, wait uintptr) (int, error) {
	flags := uintptr(0)
	if wait > 0 {
		flags = waitForEvents
	}
	n, _, no := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), submit, wait, flags, 0, 0)
	if no != 0 {
		return int(n), no
	}
	return int(n), nil
}

// wait returns the result of the request.
func (r *ring) wait() (int, error) {
	p := &r.params
	head := r.word(p.cq.head)
	if events, err := poll(r.fd, unix.POLLIN, deadline); err != nil || events == 0 {
		return 0, unix.ETIMEDOUT
	}
	// struct io_uring_cqe: user data, result, flags.
	result := int32(*r.word(p.cq.cqes + 16*(*head&*r.word(p.cq.mask)) + 8))
	*head++
	if result < 0 {
		return 0, unix.Errno(-result)
	}
	return int(result), nil
}

func ioUring(c *conn) {
	// The end of a ring interrupts its thread later, which must not serve another
	// row: locked once more than it is unlocked, it ends with the goroutine.
	runtime.LockOSThread()
	r, refused := c.newRing()
	c.saw("refused", refused)
	if r == nil {
		c.t.Logf("io_uring is REFUSED here (%s): the row compares only that", refused)
		return
	}
	p := make([]byte, 200)
	read := func(name string, op uint8, flags uint32) {
		n, err := 0, error(unix.EAGAIN)
		for errors.Is(err, unix.EAGAIN) && c.b.wait(unix.POLLIN, deadline) {
			r.submit(op, c.b.fd, p, flags)
			n, err = r.wait()
		}
		c.saw(name, moved(p, n, err))
	}
	write := func(name string, op uint8) {
		q := c.a.next(100)
		r.submit(op, c.a.fd, q, 0)
		n, err := r.wait()
		c.saw(name, c.a.accepted(q, n, err))
		c.settle()
	}
	write("send", opSend)
	read("peek", opRecv, unix.MSG_PEEK)
	read("recv", opRecv, 0)
	write("write", opWrite)
	read("read", opRead, 0)
	for i := range 3 {
		// A request that waits: io_uring polls for it, unless the socket is in non-blocking mode.
		r.submit(opPoll, c.b.fd, nil, unix.POLLIN)
		c.a.send(50)
		n, err := r.wait()
		c.saw(fmt.Sprintf("poll %d", i), fmt.Sprint(eventNames(uint32(n)), err))
		read(fmt.Sprintf("read %d", i), opRecv, 0)
		if !c.b.blocking {
			continue
		}
		r.submit(opRecv, c.b.fd, p, 0)
		c.a.send(60)
		n, err = r.wait()
		c.saw(fmt.Sprintf("awaited read %d", i), moved(p, n, err))
	}
}

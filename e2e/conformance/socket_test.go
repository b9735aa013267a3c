// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// end is one end of a connection. Calls return texts that can be compared: the
// bytes that were moved, or the name of the error.
type end struct {
	c        *conn
	fd       int
	pod      *sandbox.Pod
	blocking bool
	// sent counts the bytes that the kernel has accepted.
	sent atomic.Int64
}

func (e *end) String() string {
	if e.pod == e.c.pods[e.c.way][0] {
		return "the client"
	}
	return "the server"
}

// content is what both ends send: a block of random bytes again and again, of a
// length that no buffer's is a multiple of.
type content []byte

func newContent() content {
	block := make([]byte, 1<<20+7)
	_, _ = rand.NewChaCha8([32]byte{}).Read(block) // never fails
	return block
}

// piece returns the n bytes from a position on.
func (b content) piece(position int64, n int) []byte {
	p := make([]byte, 0, n)
	for at := int(position % int64(len(b))); len(p) < n; at = 0 {
		p = append(p, b[at:min(len(b), at+n-len(p))]...)
	}
	return p
}

// errno names an error of a system call.
func errno(err error) string {
	var no unix.Errno
	if errors.As(err, &no) {
		return unix.ErrnoName(no)
	}
	return err.Error()
}

// moved describes what a read or write has moved.
func moved(p []byte, n int, err error) string {
	if err != nil {
		return errno(err)
	}
	if n == 0 {
		return "0 bytes"
	}
	return fmt.Sprintf("%d bytes %08x", n, crc32.ChecksumIEEE(p[:min(n, len(p))]))
}

// sleepingRecv is the entry of docs/limits.md about reads that sleep.
const sleepingRecv = "blocking-recv"

// call repeats f while it gives EAGAIN: in non-blocking mode after a wait, as
// programs do, and in blocking mode where that is the known difference of reads
// that sleep. Whether that shows is a matter of timing.
func (e *end) call(events int16, f func() (int, error)) (int, error) {
	for limit := time.Now().Add(deadline); ; {
		n, err := f()
		switch {
		case !errors.Is(err, unix.EAGAIN) || !time.Now().Before(limit):
			return n, err
		case !e.blocking:
			if !e.wait(events, time.Until(limit)) {
				return n, err
			}
		case events == unix.POLLIN && e.c.way != plain && e.c.blocking:
			e.c.note(e.c.row.name, e.c.way, sleepingRecv)
		default:
			return n, err
		}
	}
}

// wait waits for an event, no longer than d.
func (e *end) wait(events int16, d time.Duration) bool {
	n, err := poll(e.fd, events, d)
	return err == nil && n != 0
}

// poll returns the events of a descriptor, 0 if there are none after d.
func poll(fd int, events int16, d time.Duration) (int16, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for limit := time.Now().Add(d); ; {
		_, err := unix.Poll(fds, max(0, int(time.Until(limit).Milliseconds())))
		if err != unix.EINTR {
			return fds[0].Revents, err
		}
	}
}

// accepted counts what a call has sent.
func (e *end) accepted(p []byte, n int, err error) string {
	e.sent.Add(int64(max(n, 0)))
	return moved(p, n, err)
}

// next returns the bytes that e sends next.
func (e *end) next(n int) []byte { return e.c.content.piece(e.sent.Load(), n) }

// send sends all of the next n bytes.
func (e *end) send(n int) string {
	p := e.next(n)
	done := 0
	for done < n {
		m, err := e.call(unix.POLLOUT, func() (int, error) { return unix.Write(e.fd, p[done:]) })
		if err != nil {
			return errno(err)
		}
		done += m
		e.sent.Add(int64(m))
	}
	return moved(p, n, nil)
}

// sendOnce is one call of send with flags.
func (e *end) sendOnce(n, flags int) string {
	p := e.next(n)
	n, err := e.call(unix.POLLOUT, func() (int, error) { return unix.SendmsgN(e.fd, p, nil, nil, flags) })
	return e.accepted(p, n, err)
}

// recv is one recv with flags, by call unless they have MSG_DONTWAIT.
func (e *end) recv(n, flags int) string {
	if flags&unix.MSG_DONTWAIT != 0 {
		return e.recvOnce(n, flags)
	}
	p := make([]byte, n)
	n, err := e.call(unix.POLLIN, func() (int, error) {
		n, _, err := unix.Recvfrom(e.fd, p, flags)
		return n, err
	})
	return moved(p, n, err)
}

// recvOnce is a single recv, whatever comes of it.
func (e *end) recvOnce(n, flags int) string {
	p := make([]byte, n)
	n, _, err := unix.Recvfrom(e.fd, p, flags)
	return moved(p, n, err)
}

// recvAll receives until there are n bytes or an end.
func (e *end) recvAll(n int) string {
	p := make([]byte, n)
	done := 0
	for done < n {
		m, err := e.call(unix.POLLIN, func() (int, error) { return unix.Read(e.fd, p[done:]) })
		if err != nil {
			return fmt.Sprintf("%s, then %s", moved(p, done, nil), errno(err))
		}
		if m == 0 {
			break
		}
		done += m
	}
	return moved(p, done, nil)
}

// now returns the events that poll reports without waiting.
func (e *end) now() string {
	events, err := poll(e.fd, unix.POLLIN|unix.POLLOUT|unix.POLLPRI|unix.POLLRDHUP, 0)
	e.c.must(err)
	return eventNames(uint32(events))
}

// until waits for one of the events, which must come, and until the packet that
// brought it is done with.
func (e *end) until(events int16) {
	e.c.t.Helper()
	if !e.wait(events, deadline) {
		e.c.t.Errorf("%s: %s has not got %s", e.c.way, e, eventNames(uint32(events)))
	}
	e.info() // takes the socket's lock
}

// silent returns the events that come within quiet.
func (e *end) silent(events int16) string { return e.c.silent(e.fd, events) }

func (c *conn) silent(fd int, events int16) string {
	got, err := poll(fd, events, quiet)
	c.must(err)
	return eventNames(uint32(got))
}

// eventNames names those of poll, which are those of epoll.
func eventNames(events uint32) string {
	var names []string
	for _, e := range []struct {
		bit  uint32
		name string
	}{
		{unix.POLLIN, "IN"},
		{unix.POLLPRI, "PRI"},
		{unix.POLLOUT, "OUT"},
		{unix.POLLERR, "ERR"},
		{unix.POLLHUP, "HUP"},
		{unix.POLLRDHUP, "RDHUP"},
	} {
		if events&e.bit != 0 {
			names = append(names, e.name)
			events &^= e.bit
		}
	}
	if events != 0 {
		names = append(names, fmt.Sprintf("%#x", events))
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, "|")
}

// settle waits until all bytes that TCP has sent are in the receivers' queues.
// Redirected bytes are there when send returns.
func (c *conn) settle() {
	c.t.Helper()
	for limit := time.Now().Add(deadline); time.Now().Before(limit); time.Sleep(100 * time.Microsecond) {
		a, b := c.a.info(), c.b.info()
		if arrived(a, b) && arrived(b, a) {
			return
		}
	}
	c.t.Errorf("%s: sent bytes do not arrive", c.way)
}

func arrived(from, at *unix.TCPInfo) bool {
	return from.Notsent_bytes == 0 && at.Bytes_received >= from.Bytes_sent-from.Bytes_retrans
}

func (e *end) info() *unix.TCPInfo {
	info, err := unix.GetsockoptTCPInfo(e.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	e.c.must(err)
	return info
}

// close closes the socket; the number stays taken until the connection is given up.
func (e *end) close() {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	e.c.must(err)
	e.c.must(unix.Dup3(null, e.fd, unix.O_CLOEXEC))
	e.c.must(unix.Close(null))
}

// reset makes close send a reset.
func (e *end) reset() {
	e.c.must(unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	e.close()
}

func (e *end) shutdown(how int) string { return done(unix.Shutdown(e.fd, how)) }

// done describes a call that returns nothing but an error.
func done(err error) string {
	if err != nil {
		return errno(err)
	}
	return "done"
}

func (e *end) set(level, option, value int) string {
	return done(unix.SetsockoptInt(e.fd, level, option, value))
}

func (e *end) get(level, option int) string {
	value, err := unix.GetsockoptInt(e.fd, level, option)
	if err != nil {
		return errno(err)
	}
	return fmt.Sprint(value)
}

// timeout sets the limit of sleeping calls, none for 0.
func (e *end) timeout(option int, d time.Duration) {
	value := unix.NsecToTimeval(d.Nanoseconds())
	e.c.must(unix.SetsockoptTimeval(e.fd, unix.SOL_SOCKET, option, &value))
}

// ioctl returns a number that the socket reports.
func (e *end) ioctl(request uint) string {
	n, err := unix.IoctlGetInt(e.fd, request)
	if err != nil {
		return errno(err)
	}
	return fmt.Sprint(n)
}

// mustBecome waits until get returns want.
func (c *conn) mustBecome(what, want string, get func() string) {
	c.t.Helper()
	for limit := time.Now().Add(deadline); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		if get() == want {
			return
		}
	}
	c.t.Errorf("%s: %s: got %s, want %s", c.way, what, get(), want)
}

// pipe makes a pipe that is closed with the connection.
func (c *conn) pipe() (r, w int) {
	var p [2]int
	c.must(unix.Pipe2(p[:], unix.O_CLOEXEC))
	c.closeAtEnd(p[0])
	c.closeAtEnd(p[1])
	return p[0], p[1]
}

func (c *conn) closeAtEnd(fd int) {
	c.atEnd(func() {
		if err := unix.Close(fd); err != nil {
			c.t.Errorf("close: %v", err)
		}
	})
}

// socket makes a TCP socket in a pod, with time-outs.
func (c *conn) socket(pod *sandbox.Pod, blocking bool, protocol int) int {
	c.t.Helper()
	family, kind := unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC
	if c.ipv6 {
		family = unix.AF_INET6
	}
	if !blocking {
		kind |= unix.SOCK_NONBLOCK
	}
	var fd int
	c.must(pod.Do(func() (err error) {
		fd, err = unix.Socket(family, kind, protocol)
		return err
	}))
	c.closeAtEnd(fd)
	c.must(setTimeouts(fd))
	return fd
}

func setTimeouts(fd int) error {
	limit := unix.NsecToTimeval(deadline.Nanoseconds())
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
}

func (c *conn) podAddress(pod *sandbox.Pod, port uint16) netip.AddrPort {
	if c.ipv6 {
		return netip.AddrPortFrom(pod.IPv6, port)
	}
	return netip.AddrPortFrom(pod.IPv4, port)
}

func (s *suite) freePort() uint16 { return uint16(s.port.Add(1)) }

// listen listens on a port of a pod's address.
func (c *conn) listen(pod *sandbox.Pod, port uint16, option func(fd int) error) (fd int, address netip.AddrPort) {
	c.t.Helper()
	fd = c.socket(pod, false, 0)
	if option != nil {
		c.must(option(fd))
	}
	c.must(unix.Bind(fd, sockaddr(c.podAddress(pod, port))))
	c.must(unix.Listen(fd, 64))
	return fd, localAddress(c.t, fd)
}

// dial returns a socket that connects, and what connect returned. It waits for
// the end of the handshake unless that fails.
func (c *conn) dial(pod *sandbox.Pod, address netip.AddrPort, blocking bool, option func(fd int) error) (fd int, result string) {
	c.t.Helper()
	if c.way == late {
		c.joining.RLock()
		defer c.joining.RUnlock()
	}
	return c.dialNow(pod, address, blocking, option)
}

// dialNow is dial for the first connection of the way late, whose client takes no part yet.
func (c *conn) dialNow(pod *sandbox.Pod, address netip.AddrPort, blocking bool, option func(fd int) error) (fd int, result string) {
	c.t.Helper()
	fd = c.socket(pod, blocking, 0)
	if option != nil {
		c.must(option(fd))
	}
	err := unix.Connect(fd, sockaddr(address))
	if err == unix.EINPROGRESS {
		if events, err := poll(fd, unix.POLLOUT, deadline); err != nil || events&unix.POLLERR != 0 || events == 0 {
			c.t.Fatalf("%s: connect to %s: %v, %s", c.way, address, err, eventNames(uint32(events)))
		}
	} else {
		c.must(err)
	}
	return fd, done(err)
}

// accept takes the next connection of a listener.
func (c *conn) accept(l int, blocking bool) int {
	c.t.Helper()
	if _, err := poll(l, unix.POLLIN, deadline); err != nil {
		c.must(err)
	}
	flags := unix.SOCK_CLOEXEC
	if !blocking {
		flags |= unix.SOCK_NONBLOCK
	}
	fd, _, err := unix.Accept4(l, flags)
	c.must(err)
	c.closeAtEnd(fd)
	c.must(setTimeouts(fd))
	return fd
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func localAddress(t testing.TB, fd int) netip.AddrPort {
	t.Helper()
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	t.Fatalf("got address %v", name)
	return netip.AddrPort{}
}

// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socketTimeout ends a call that waits for the other end, so that a shortcut
// that loses data fails and does not hang.
const socketTimeout = 10 // seconds

// Congestion is the congestion control of all TCP sockets: the kernel's own default. A
// machine may have another, such as bbr, which paces what it sends, and slows TCP down
// between pods.
const Congestion = "cubic"

// socket is a stream socket.
type socket struct {
	fd int
	// nonBlocking sockets are waited for by poll(2).
	nonBlocking bool
}

// parseAddress reads an IPv4 address and port, or an absolute path.
func parseAddress(address string) (unix.Sockaddr, error) {
	if filepath.IsAbs(address) {
		return &unix.SockaddrUnix{Name: address}, nil
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	if !ap.Addr().Is4() {
		return nil, fmt.Errorf("address %s: accepted are IPv4 addresses and absolute paths", address)
	}
	return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}, nil
}

// open makes a socket of the address's family.
func open(to unix.Sockaddr, nonBlocking bool) (socket, error) {
	family, flags := unix.AF_INET, unix.SOCK_CLOEXEC
	if _, ok := to.(*unix.SockaddrUnix); ok {
		family = unix.AF_UNIX
	}
	if nonBlocking {
		flags |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|flags, 0)
	if err != nil {
		return socket{}, fmt.Errorf("socket: %w", err)
	}
	s := socket{fd, nonBlocking}
	if family == unix.AF_INET { // what is accepted inherits it
		if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, Congestion); err != nil {
			return socket{}, fmt.Errorf("set congestion control %s: %w", Congestion, err)
		}
	}
	return s, s.setTimeouts()
}

func listen(at unix.Sockaddr, nonBlocking bool) (socket, error) {
	s, err := open(at, nonBlocking)
	if err != nil {
		return socket{}, err
	}
	if u, ok := at.(*unix.SockaddrUnix); ok {
		if err := os.Remove(u.Name); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by the last server
			return socket{}, err
		}
	} else if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return socket{}, fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	if err := unix.Bind(s.fd, at); err != nil {
		return socket{}, fmt.Errorf("bind: %w", err)
	}
	return s, unix.Listen(s.fd, 128)
}

func connect(to unix.Sockaddr, nonBlocking bool) (socket, error) {
	s, err := open(to, nonBlocking)
	if err != nil {
		return socket{}, err
	}
	err = unix.Connect(s.fd, to)
	if errors.Is(err, unix.EINPROGRESS) {
		if err := s.poll(unix.POLLOUT); err != nil {
			return socket{}, err
		}
		code, e := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err = e; err == nil && code != 0 {
			err = unix.Errno(code)
		}
	}
	if err != nil {
		return socket{}, fmt.Errorf("connect: %w", err)
	}
	return s, nil
}

// accept returns a socket of the listener's mode.
func (s socket) accept() (socket, error) {
	flags := unix.SOCK_CLOEXEC
	if s.nonBlocking {
		flags |= unix.SOCK_NONBLOCK
	}
	fd, _, err := unix.Accept4(s.fd, flags)
	for errors.Is(err, unix.EAGAIN) && s.nonBlocking {
		if err := s.poll(unix.POLLIN); err != nil {
			return socket{}, err
		}
		fd, _, err = unix.Accept4(s.fd, flags)
	}
	if err != nil {
		return socket{}, fmt.Errorf("accept: %w", err)
	}
	conn := socket{fd, s.nonBlocking}
	return conn, conn.setTimeouts()
}

func (s socket) setTimeouts() error {
	timeout := unix.Timeval{Sec: socketTimeout}
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, option, &timeout); err != nil {
			return fmt.Errorf("set timeout: %w", err)
		}
	}
	return nil
}

// noDelay sets TCP_NODELAY, unless the address is a unix socket's.
func (s socket) noDelay(to unix.Sockaddr) error {
	if _, ok := to.(*unix.SockaddrUnix); ok {
		return nil
	}
	return unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

// transfer is read(2) or write(2) without Go's scheduler learning of it: it
// costs what it costs in C, and blocks the thread.
func (s socket) transfer(trap uintptr, b []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall(trap, uintptr(s.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// poll waits, in the same way, until the socket is ready.
func (s socket) poll(events int16) error {
	fd := unix.PollFd{Fd: int32(s.fd), Events: events}
	timeout := unix.Timespec{Sec: socketTimeout} // the kernel takes off what has passed
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fd)), 1, uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return fmt.Errorf("poll: %w", errno)
		case n == 0:
			return fmt.Errorf("poll: %w", unix.ETIMEDOUT)
		default:
			return nil
		}
	}
}

// read returns io.EOF where read(2) returns 0.
func (s socket) read(b []byte) (int, error) {
	n, errno := s.transfer(unix.SYS_READ, b)
	for errno == unix.EAGAIN && s.nonBlocking {
		if err := s.poll(unix.POLLIN); err != nil {
			return 0, err
		}
		n, errno = s.transfer(unix.SYS_READ, b)
	}
	if errno != 0 {
		return 0, fmt.Errorf("read: %w", errno)
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (s socket) readFull(b []byte) error {
	for len(b) > 0 {
		n, err := s.read(b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func (s socket) writeFull(b []byte) error {
	for len(b) > 0 {
		n, errno := s.transfer(unix.SYS_WRITE, b)
		if errno == unix.EAGAIN && s.nonBlocking {
			if err := s.poll(unix.POLLOUT); err != nil {
				return err
			}
			continue
		}
		if errno != 0 {
			return fmt.Errorf("write: %w", errno)
		}
		b = b[n:]
	}
	return nil
}

func (s socket) close() error { return unix.Close(s.fd) }

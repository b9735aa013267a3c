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
const socketTimeout = 3 // seconds

// socket is a blocking stream socket.
type socket int

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
func open(to unix.Sockaddr) (socket, error) {
	family := unix.AF_INET
	if _, ok := to.(*unix.SockaddrUnix); ok {
		family = unix.AF_UNIX
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	return socket(fd), socket(fd).setTimeouts()
}

func listen(at unix.Sockaddr) (socket, error) {
	s, err := open(at)
	if err != nil {
		return 0, err
	}
	if u, ok := at.(*unix.SockaddrUnix); ok {
		if err := os.Remove(u.Name); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by the last server
			return 0, err
		}
	} else if err := unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	if err := unix.Bind(int(s), at); err != nil {
		return 0, fmt.Errorf("bind: %w", err)
	}
	return s, unix.Listen(int(s), 128)
}

func connect(to unix.Sockaddr) (socket, error) {
	s, err := open(to)
	if err != nil {
		return 0, err
	}
	if err := unix.Connect(int(s), to); err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	return s, nil
}

func (s socket) accept() (socket, error) {
	fd, _, err := unix.Accept4(int(s), unix.SOCK_CLOEXEC)
	if err != nil {
		return 0, fmt.Errorf("accept: %w", err)
	}
	return socket(fd), socket(fd).setTimeouts()
}

func (s socket) setTimeouts() error {
	timeout := unix.Timeval{Sec: socketTimeout}
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(int(s), unix.SOL_SOCKET, option, &timeout); err != nil {
			return fmt.Errorf("set timeout: %w", err)
		}
	}
	return nil
}

// noDelay keeps TCP from holding back the end of a message until the rest is
// acknowledged. It is for messages that are answered.
func (s socket) noDelay(to unix.Sockaddr) error {
	if _, ok := to.(*unix.SockaddrUnix); ok {
		return nil
	}
	return unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

// transfer is read(2) or write(2) without Go's scheduler learning of it: it
// costs what it costs in C, and blocks the thread.
func (s socket) transfer(trap uintptr, b []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall(trap, uintptr(s), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// read returns io.EOF where read(2) returns 0.
func (s socket) read(b []byte) (int, error) {
	n, errno := s.transfer(unix.SYS_READ, b)
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
		if errno != 0 {
			return fmt.Errorf("write: %w", errno)
		}
		b = b[n:]
	}
	return nil
}

func (s socket) close() error { return unix.Close(int(s)) }

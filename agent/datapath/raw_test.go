// SPDX-License-Identifier: Apache-2.0

//go:build !unit

package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// rawSocket is a socket in non-blocking mode that the test has for itself: no
// runtime reads it, changes its options or closes it.
type rawSocket struct{ fd int }

func mustSocket(tb testing.TB, in *sandbox.Netns, domain, protocol int) *rawSocket {
	tb.Helper()
	r := &rawSocket{-1}
	if err := in.Do(func() (err error) {
		r.fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		return err
	}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { r.mustClose(tb) })
	return r
}

// mustClose closes the socket unless that has been done.
func (r *rawSocket) mustClose(tb testing.TB) {
	tb.Helper()
	if err := r.close(); err != nil {
		tb.Error(err)
	}
}

func (r *rawSocket) close() error {
	if r.fd < 0 {
		return nil
	}
	fd := r.fd
	r.fd = -1
	return unix.Close(fd)
}

// mustRawListen listens on a port that the kernel chooses.
func mustRawListen(tb testing.TB, in *sandbox.Netns, address netip.Addr) (*rawSocket, netip.AddrPort) {
	tb.Helper()
	l := mustSocket(tb, in, unix.AF_INET, 0)
	l.mustListenOn(tb, netip.AddrPortFrom(address, 0))
	return l, l.mustAddress(tb)
}

func (r *rawSocket) mustListenOn(tb testing.TB, address netip.AddrPort) {
	tb.Helper()
	if err := errors.Join(
		unix.SetsockoptInt(r.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(r.fd, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}),
		unix.Listen(r.fd, 100),
	); err != nil {
		tb.Fatal(err)
	}
}

func (r *rawSocket) mustAddress(tb testing.TB) netip.AddrPort {
	tb.Helper()
	own, err := unix.Getsockname(r.fd)
	if err != nil {
		tb.Fatal(err)
	}
	v4, ok := own.(*unix.SockaddrInet4)
	if !ok {
		tb.Fatalf("got own address %+v, want an IPv4 one", own)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), uint16(v4.Port))
}

func (r *rawSocket) mustConnect(tb testing.TB, to netip.AddrPort) {
	tb.Helper()
	err := unix.Connect(r.fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if errors.Is(err, unix.EINPROGRESS) {
		if err = r.wait(unix.POLLOUT); err == nil {
			var no int
			if no, err = unix.GetsockoptInt(r.fd, unix.SOL_SOCKET, unix.SO_ERROR); no != 0 {
				err = unix.Errno(no)
			}
		}
	}
	if err != nil {
		tb.Fatalf("connect to %s: %v", to, err)
	}
}

// disconnect ends the connection by a connect to no address.
func (r *rawSocket) disconnect() error {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, no := unix.Syscall(unix.SYS_CONNECT, uintptr(r.fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere))
	if no != 0 {
		return fmt.Errorf("disconnect: %w", no)
	}
	return nil
}

func (r *rawSocket) mustAccept(tb testing.TB) *rawSocket {
	tb.Helper()
	s, err := r.call(unix.POLLIN, func() (int, error) {
		s, _, err := unix.Accept4(r.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return s, err
	})
	if err != nil {
		tb.Fatalf("accept: %v", err)
	}
	accepted := &rawSocket{s}
	tb.Cleanup(func() { accepted.mustClose(tb) })
	return accepted
}

// wait polls for events, and returns an error if none comes.
func (r *rawSocket) wait(events int16) error {
	for end := time.Now().Add(deadline); time.Now().Before(end); {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(r.fd), Events: events}}, 1000)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
		if n > 0 {
			return nil
		}
	}
	return fmt.Errorf("poll for events %#x: none in %v", events, deadline)
}

// call repeats f, which may have to wait for an event.
func (r *rawSocket) call(events int16, f func() (int, error)) (int, error) {
	for {
		n, err := f()
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if err := r.wait(events); err != nil {
				return 0, err
			}
		default:
			return 0, err
		}
	}
}

func (r *rawSocket) Read(p []byte) (int, error) {
	n, err := r.call(unix.POLLIN, func() (int, error) { return unix.Read(r.fd, p) })
	if n == 0 && err == nil && len(p) > 0 {
		err = io.EOF
	}
	return n, err
}

func (r *rawSocket) Write(p []byte) (int, error) {
	for sent := 0; sent < len(p); {
		n, err := r.call(unix.POLLOUT, func() (int, error) {
			return unix.SendmsgN(r.fd, p[sent:], nil, nil, unix.MSG_NOSIGNAL)
		})
		if err != nil {
			return sent, err
		}
		sent += n
	}
	return len(p), nil
}

func (r *rawSocket) CloseWrite() error { return unix.Shutdown(r.fd, unix.SHUT_WR) }

func (r *rawSocket) state(tb testing.TB) uint8 {
	tb.Helper()
	info, err := unix.GetsockoptTCPInfo(r.fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		tb.Fatal(err)
	}
	return info.State
}

// segments returns how many segments with data the socket has sent and received.
func (r *rawSocket) segments(tb testing.TB) uint64 {
	tb.Helper()
	info, err := unix.GetsockoptTCPInfo(r.fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		tb.Fatal(err)
	}
	return uint64(info.Data_segs_in) + uint64(info.Data_segs_out)
}

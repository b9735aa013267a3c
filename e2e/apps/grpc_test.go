// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/podshunt/podshunt/e2e/apps/echo"
)

func grpcStreams(s *stage) {
	sizes := []int64{0, 4 << 20, 1, 8 << 20, 2}
	for i := range 300 {
		sizes = append(sizes, int64(i*i))
	}
	l, address := s.listen(s.server, 8080)
	s.grpcServe(l)
	conn := s.grpcDial(func(address string) (net.Conn, error) { return s.dial(s.client, address) }, address)
	for range 2 { // streams of one connection
		s.grpcEcho(conn, sizes)
	}
}

// countedListener counts the reads of all connections that a listener has accepted.
type countedListener struct {
	net.Listener
	reads *atomic.Int64
}

type countedConn struct {
	net.Conn
	reads *atomic.Int64
}

func (l countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countedConn{c, l.reads}, err
}

func (c countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.reads.Add(1)
	return n, err
}

// grpcKeepalive has both ends ping while there is nothing else to say, and a
// client that sets TCP_USER_TIMEOUT, as grpc-go does for keepalive.
func grpcKeepalive(s *stage) {
	const timeout = 20 * time.Second
	var reads atomic.Int64
	l, address := s.listen(s.server, 8080)
	s.grpcServe(countedListener{l, &reads},
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Second, Timeout: timeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
	var raw net.Conn
	conn := s.grpcDial(func(address string) (_ net.Conn, err error) {
		raw, err = s.dial(s.client, address)
		return raw, err
	}, address, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: timeout, PermitWithoutStream: true}))

	sizes := []int64{0, 1 << 20, 3, small, medium, 1}
	for range 3 {
		s.grpcEcho(conn, sizes)
		// The answers to the server's pings, and the client's own.
		for enough := reads.Load() + 5; reads.Load() < enough; time.Sleep(20 * time.Millisecond) {
			if s.ctx.Err() != nil {
				s.Fatalf("pings: %v", s.ctx.Err())
			}
		}
	}
	var option int
	control, err := raw.(*net.TCPConn).SyscallConn()
	s.must("look at the connection", err)
	s.must("look at the connection", control.Control(func(fd uintptr) {
		option, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
	}))
	s.must("read TCP_USER_TIMEOUT", err)
	s.answer("TCP_USER_TIMEOUT is %d", option)
	if want := int(timeout.Milliseconds()); option != want {
		s.Fatalf("TCP_USER_TIMEOUT: got %d, want %d", option, want)
	}
}

const grpcLimit = 16 << 20

// grpcServe serves the echo service.
func (s *stage) grpcServe(l net.Listener, options ...grpc.ServerOption) {
	s.Helper()
	server := grpc.NewServer(append(options, grpc.MaxRecvMsgSize(grpcLimit))...)
	server.RegisterService(&echo.Service, nil)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	s.Cleanup(func() {
		server.Stop()
		s.check("serve", <-ended)
	})
}

func (s *stage) grpcDial(dial func(string) (net.Conn, error), address netip.AddrPort, options ...grpc.DialOption) *grpc.ClientConn {
	s.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address.String(), append(options,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(grpcLimit)),
		grpc.WithContextDialer(func(_ context.Context, address string) (net.Conn, error) { return dial(address) }))...)
	s.must("make client", err)
	s.Cleanup(func() { s.check("close client", conn.Close()) })
	return conn
}

// grpcEcho sends messages of these sizes on a stream of its own and wants them back.
func (s *stage) grpcEcho(conn *grpc.ClientConn, sizes []int64) {
	s.Helper()
	stream, err := conn.NewStream(s.ctx, &echo.Service.Streams[0], echo.Stream)
	s.must("open stream", err)
	var sender errgroup.Group
	sender.Go(func() error {
		for i, size := range sizes {
			if err := stream.SendMsg(wrapperspb.Bytes(contentBytes(i, size))); err != nil {
				return err
			}
		}
		return stream.CloseSend()
	})
	for i, size := range sizes {
		var m wrapperspb.BytesValue
		s.must("receive", stream.RecvMsg(&m))
		s.want("message", bytes.NewReader(m.Value), content(i, size))
	}
	s.must("send", sender.Wait())
	if err := stream.RecvMsg(&wrapperspb.BytesValue{}); !errors.Is(err, io.EOF) {
		s.Fatalf("after the last message: got %v, want %v", err, io.EOF)
	}
}

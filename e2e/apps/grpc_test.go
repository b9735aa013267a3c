// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// echoService is what protoc would make of a service with one method:
// rpc Stream (stream google.protobuf.BytesValue) returns (stream google.protobuf.BytesValue).
var echoService = grpc.ServiceDesc{
	ServiceName: "podshunt.Echo",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName: "Stream", ServerStreams: true, ClientStreams: true,
		Handler: func(_ any, stream grpc.ServerStream) error {
			for {
				var m wrapperspb.BytesValue
				if err := stream.RecvMsg(&m); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
				if err := stream.SendMsg(&m); err != nil {
					return err
				}
			}
		},
	}},
}

func grpcStreams(s *stage) {
	const limit = 16 << 20
	l, address := s.listen(s.server, 8080)
	server := grpc.NewServer(grpc.MaxRecvMsgSize(limit))
	server.RegisterService(&echoService, nil)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	s.Cleanup(func() {
		server.Stop()
		s.check("serve", <-ended)
	})
	conn, err := grpc.NewClient("passthrough:///"+address.String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(limit)),
		grpc.WithContextDialer(func(_ context.Context, address string) (net.Conn, error) { return s.dial(s.client, address) }))
	s.must("make client", err)
	defer conn.Close()

	sizes := []int64{0, 4 << 20, 1, 8 << 20, 2}
	for i := range 300 {
		sizes = append(sizes, int64(i*i))
	}
	for range 2 { // streams of one connection
		stream, err := conn.NewStream(s.ctx, &echoService.Streams[0], "/podshunt.Echo/Stream")
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
}

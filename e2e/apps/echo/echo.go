// SPDX-License-Identifier: Apache-2.0

// Package echo is a service of gRPC that answers what it gets.
package echo

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Full names of the methods, for a client.
const (
	Unary  = "/podshunt.Echo/Unary"
	Stream = "/podshunt.Echo/Stream"
)

// Service is what protoc would make of a service with a unary method and a stream of
// google.protobuf.BytesValue, both of which answer what they get.
var Service = grpc.ServiceDesc{
	ServiceName: "podshunt.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Unary",
		Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			var m wrapperspb.BytesValue
			return &m, decode(&m)
		},
	}},
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

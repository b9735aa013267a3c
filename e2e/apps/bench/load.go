// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/podshunt/podshunt/e2e/apps/echo"
)

// self is this program, as a command.
const self = "/proc/self/exe"

// loadArg as the first argument makes a process a client or server of bench's own: of
// protocols whose load generators Debian 12 has not. The second is then a load as JSON.
const loadArg = "podshunt-bench-load"

// Kinds of load.
const (
	memcachedGets = "memcached gets"
	grpcServer    = "gRPC server"
	grpcUnary     = "gRPC unary"
	grpcStream    = "gRPC stream"
)

// load is what such a process does.
type load struct {
	Kind string
	// To is an address and port, or the absolute path of a Unix socket.
	To string
	// Size is that of values or messages.
	Size int
	// Connections is how many there are, or how many calls or streams of one connection.
	Connections int
	// Pipeline is how many requests a connection has on the way.
	Pipeline int
	Seconds  int
}

// tally is what a client of them prints.
type tally struct {
	Requests int
	Seconds  float64
	// P50, P99 and P999 are percentiles in microseconds.
	P50, P99, P999 float64
}

func (l load) command() []string {
	arg, _ := json.Marshal(l) // it has strings and numbers
	return []string{self, loadArg, string(arg)}
}

// loadMain calls body, and returns what it returns, except in processes that run a load.
func loadMain(body func() int) int {
	if len(os.Args) != 3 || os.Args[1] != loadArg {
		return body()
	}
	var l load
	err := json.Unmarshal([]byte(os.Args[2]), &l)
	if err == nil {
		err = l.run(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (l load) run(stdout io.Writer) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if l.Kind == grpcServer {
		return l.serveGRPC(ctx)
	}
	times, took, err := l.measure(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(newTally(times, took, max(1, l.Pipeline)))
}

// newTally sums up the times of batches of so many requests each.
func newTally(times []time.Duration, took time.Duration, batch int) tally {
	slices.Sort(times)
	at := func(part float64) float64 {
		if len(times) == 0 {
			return 0
		}
		return float64(times[min(len(times)-1, int(part*float64(len(times))))]) / 1e3
	}
	return tally{len(times) * batch, took.Seconds(), at(0.5), at(0.99), at(0.999)}
}

// network is that of To, for net.Dial and net.Listen.
func (l load) network() string {
	if filepath.IsAbs(l.To) {
		return "unix"
	}
	return "tcp"
}

func (l load) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, l.network(), l.To)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(l.duration() + grace/2))
}

func (l load) duration() time.Duration { return time.Duration(l.Seconds) * time.Second }

// measure runs as many loops as there are connections, each of which calls its step
// again and again, until the time is over, and returns how long each call took.
func (l load) measure(ctx context.Context) (all []time.Duration, took time.Duration, err error) {
	steps, end, err := l.steps(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, end()) }()
	var group errgroup.Group
	times := make([][]time.Duration, len(steps))
	begin := time.Now()
	for i, step := range steps {
		group.Go(func() error {
			own := make([]time.Duration, 0, 1<<16)
			last := begin
			for now := last; now.Sub(begin) < l.duration(); last = now {
				if err := step(); err != nil {
					return err
				}
				now = time.Now()
				own = append(own, now.Sub(last))
			}
			times[i] = own
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, 0, err
	}
	return slices.Concat(times...), time.Since(begin), nil
}

// steps are what the loops call.
func (l load) steps(ctx context.Context) (steps []func() error, end func() error, err error) {
	switch l.Kind {
	case memcachedGets:
		return l.memcachedSteps(ctx)
	case grpcUnary, grpcStream:
		return l.grpcSteps(ctx)
	}
	return nil, nil, fmt.Errorf("load %q: unknown", l.Kind)
}

// memcachedSteps get one value on each connection, as often as a pipeline is long.
func (l load) memcachedSteps(ctx context.Context) (steps []func() error, end func() error, err error) {
	var conns []net.Conn
	end = func() (err error) {
		for _, c := range conns {
			err = errors.Join(err, c.Close())
		}
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, end())
		}
	}()
	content := strings.Repeat("v", l.Size)
	for range l.Connections {
		c, err := l.dial(ctx)
		if err != nil {
			return nil, nil, err
		}
		conns = append(conns, c)
	}
	const stored = "STORED\r\n"
	if _, err := fmt.Fprintf(conns[0], "set key 0 0 %d\r\n%s\r\n", l.Size, content); err != nil {
		return nil, nil, err
	}
	if err := expect(conns[0], make([]byte, len(stored)), stored); err != nil {
		return nil, nil, err
	}
	request := []byte(strings.Repeat("get key\r\n", l.Pipeline))
	want := strings.Repeat(fmt.Sprintf("VALUE key 0 %d\r\n%s\r\nEND\r\n", l.Size, content), l.Pipeline)
	for _, c := range conns {
		r, got := bufio.NewReaderSize(c, 64<<10), make([]byte, len(want))
		steps = append(steps, func() error {
			if _, err := c.Write(request); err != nil {
				return err
			}
			return expect(r, got, want)
		})
	}
	return steps, end, nil
}

// expect reads into got, and wants it to be a text.
func expect(r io.Reader, got []byte, want string) error {
	if n, err := io.ReadFull(r, got); err != nil {
		return fmt.Errorf("after %d of %d bytes of a reply: %w", n, len(got), err)
	}
	if string(got) != want {
		return fmt.Errorf("got %.80q, want %.80q", got, want)
	}
	return nil
}

func (l load) serveGRPC(ctx context.Context) error {
	// The next round's server has the same path.
	if err := os.Remove(l.To); l.network() == "unix" && err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false) // Go's default, which podshunt leaves alone
	listener, err := config.Listen(ctx, l.network(), l.To)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	s.RegisterService(&echo.Service, nil)
	go func() {
		<-ctx.Done()
		s.Stop()
	}()
	return s.Serve(listener)
}

// grpcSteps are calls at once, or messages on streams, of one connection.
func (l load) grpcSteps(ctx context.Context) (steps []func() error, end func() error, err error) {
	conn, err := grpc.NewClient("passthrough:///podshunt",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.dial(ctx) }))
	if err != nil {
		return nil, nil, err
	}
	message := wrapperspb.Bytes(bytes.Repeat([]byte("m"), l.Size))
	for range l.Connections {
		if l.Kind == grpcUnary {
			steps = append(steps, func() error {
				var m wrapperspb.BytesValue
				return right(&m, message, conn.Invoke(ctx, echo.Unary, message, &m))
			})
			continue
		}
		stream, err := conn.NewStream(ctx, &echo.Service.Streams[0], echo.Stream)
		if err != nil {
			return nil, nil, errors.Join(err, conn.Close())
		}
		steps = append(steps, func() error {
			if err := stream.SendMsg(message); err != nil {
				return err
			}
			var m wrapperspb.BytesValue
			return right(&m, message, stream.RecvMsg(&m))
		})
	}
	return steps, conn.Close, nil
}

// right is an error unless the message came back.
func right(got, want *wrapperspb.BytesValue, err error) error {
	if err == nil && !bytes.Equal(got.Value, want.Value) {
		err = fmt.Errorf("got a message of %d bytes that is not the one of %d bytes that was sent", len(got.Value), len(want.Value))
	}
	return err
}

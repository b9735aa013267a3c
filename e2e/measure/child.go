// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// maxSamples bounds the memory for round trips: more than fit into a second.
const maxSamples = 1 << 20

// receiveBuffer is the size, in bytes, of the buffer that the receiver of a stream
// reads into.
const receiveBuffer = 256 << 10

// run runs one end of a measurement. A server prints a line when it listens, and
// each end one with its Result.
func (c child) run(stdout io.Writer) error {
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	var cpus unix.CPUSet
	cpus.Set(c.CPU)
	if err := unix.SchedSetaffinity(0, &cpus); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", c.CPU, err)
	}
	var (
		result Result
		err    error
	)
	out := json.NewEncoder(stdout)
	if c.Server {
		result, err = c.serve(func() error { return out.Encode(struct{}{}) })
	} else {
		result, err = c.dial()
	}
	if err != nil {
		return err
	}
	return out.Encode(result)
}

func (c child) serve(ready func() error) (Result, error) {
	at, err := parseAddress(c.Listen)
	if err != nil {
		return Result{}, err
	}
	listener, err := listen(at)
	if err != nil {
		return Result{}, err
	}
	if err := ready(); err != nil {
		return Result{}, err
	}
	conn, err := listener.accept(c.NonBlocking)
	if err != nil {
		return Result{}, err
	}
	switch c.Kind {
	case PingPong:
		return Result{}, errors.Join(conn.noDelay(at), c.echo(conn))
	case Stream:
		return c.receive(conn)
	case Connect:
		return Result{}, c.greet(listener, conn)
	}
	return Result{}, fmt.Errorf("measure %q: unknown", c.Kind)
}

func (c child) dial() (Result, error) {
	dial := c.Dial
	if dial == "" {
		dial = c.Listen
	}
	to, err := parseAddress(dial)
	if err != nil {
		return Result{}, err
	}
	if c.Kind == Connect {
		return c.connections(to)
	}
	conn, err := connect(to, c.NonBlocking)
	if err != nil {
		return Result{}, err
	}
	if c.Kind == Stream {
		return Result{}, c.send(conn)
	}
	if err := conn.noDelay(to); err != nil {
		return Result{}, err
	}
	return c.pingPong(conn)
}

// echo answers every message until the client closes.
func (c child) echo(conn socket) error {
	message := make([]byte, c.Size)
	for {
		if err := conn.readFull(message); err != nil {
			return unless(err, io.EOF)
		}
		if err := conn.writeFull(message); err != nil {
			return err
		}
	}
}

func (c child) pingPong(conn socket) (Result, error) {
	message := make([]byte, c.Size)
	times := make([]time.Duration, 0, maxSamples)
	last := time.Now()
	begin := last.Add(c.WarmUp)
	end := begin.Add(c.Duration)
	for len(times) == 0 || last.Before(end) && len(times) < maxSamples {
		if err := conn.writeFull(message); err != nil {
			return Result{}, err
		}
		if err := conn.readFull(message); err != nil {
			return Result{}, err
		}
		now := time.Now()
		if last.After(begin) {
			times = append(times, now.Sub(last))
		}
		last = now
	}
	slices.Sort(times)
	p50, p99 := times[len(times)/2], times[len(times)*99/100]
	return Result{Rate: float64(time.Second) / float64(p50), P50: p50, P99: p99, Count: len(times)}, conn.close()
}

// receive counts what arrives, and ends the stream by closing.
func (c child) receive(conn socket) (Result, error) {
	buffer := make([]byte, receiveBuffer)
	n := 0
	now := time.Now()
	for begin := now.Add(c.WarmUp); now.Before(begin); now = time.Now() {
		if _, err := conn.read(buffer); err != nil {
			return Result{}, err
		}
	}
	begin := now
	for end := begin.Add(c.Duration); now.Before(end); now = time.Now() {
		got, err := conn.read(buffer)
		if err != nil {
			return Result{}, err
		}
		n += got
	}
	return Result{Rate: float64(n) / now.Sub(begin).Seconds(), Count: n}, conn.close()
}

// send sends until the receiver closes. It does not look at the clock, which
// would cost as much as a tenth of a small message.
func (c child) send(conn socket) error {
	message := make([]byte, c.Size)
	for {
		if err := conn.writeFull(message); err != nil {
			return unless(err, unix.EPIPE, unix.ECONNRESET)
		}
	}
}

// greet serves one connection after the other. An empty one is the last.
func (c child) greet(listener, conn socket) error {
	letter := make([]byte, 1)
	for {
		if err := conn.readFull(letter); err != nil {
			return unless(err, io.EOF)
		}
		if err := conn.writeFull(letter); err != nil {
			return err
		}
		// The client closes first, always.
		if _, err := conn.read(letter); !errors.Is(err, io.EOF) {
			return fmt.Errorf("wait for the client to close: got %w, want EOF", err)
		}
		if err := conn.close(); err != nil {
			return err
		}
		var err error
		if conn, err = listener.accept(c.NonBlocking); err != nil {
			return err
		}
	}
}

func (c child) connections(to unix.Sockaddr) (Result, error) {
	letter := make([]byte, 1)
	once := func() error {
		conn, err := connect(to, c.NonBlocking)
		if err != nil {
			return err
		}
		if err := conn.writeFull(letter); err != nil {
			return err
		}
		if err := conn.readFull(letter); err != nil {
			return err
		}
		return conn.close()
	}
	now := time.Now()
	for begin := now.Add(c.WarmUp); now.Before(begin); now = time.Now() {
		if err := once(); err != nil {
			return Result{}, err
		}
	}
	begin, n := now, 0
	for end := begin.Add(c.Duration); now.Before(end); now = time.Now() {
		if err := once(); err != nil {
			return Result{}, err
		}
		n++
	}
	last, err := connect(to, c.NonBlocking)
	if err != nil {
		return Result{}, err
	}
	return Result{Rate: float64(n) / now.Sub(begin).Seconds(), Count: n}, last.close()
}

// unless returns err, or nil if it is one of ends, the errors that end a
// measurement.
func unless(err error, ends ...error) error {
	for _, end := range ends {
		if errors.Is(err, end) {
			return nil
		}
	}
	return err
}

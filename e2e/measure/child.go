// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// run runs one end of a measurement. A server prints a line when it listens, and
// each end one with its Result.
func (c child) run(stdout io.Writer) error {
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	if c.CPU >= 0 {
		var cpus unix.CPUSet
		cpus.Set(c.CPU)
		if err := unix.SchedSetaffinity(0, &cpus); err != nil {
			return fmt.Errorf("pin to CPU %d: %w", c.CPU, err)
		}
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
	listener, err := listen(at, c.NonBlocking)
	if err != nil {
		return Result{}, err
	}
	if err := ready(); err != nil {
		return Result{}, err
	}
	accept := func() (socket, error) {
		conn, err := listener.accept()
		if err == nil && c.NoDelay {
			err = conn.noDelay(at)
		}
		return conn, err
	}
	conn, err := accept()
	if err != nil {
		return Result{}, err
	}
	switch c.Kind {
	case PingPong, RandomSizes:
		return Result{}, c.echo(conn)
	case Stream, Replies, BothWays:
		return c.receive(conn)
	case Connect:
		return Result{}, greet(accept, conn)
	}
	return Result{}, fmt.Errorf("measure %q: unknown", c.Kind)
}

func (c child) dial() (Result, error) {
	address := c.Dial
	if address == "" {
		address = c.Listen
	}
	to, err := parseAddress(address)
	if err != nil {
		return Result{}, err
	}
	dial := func() (socket, error) {
		conn, err := connect(to, c.NonBlocking)
		if err == nil && c.NoDelay {
			err = conn.noDelay(to)
		}
		return conn, err
	}
	if c.Kind == Connect {
		return c.connections(dial)
	}
	conn, err := dial()
	if err != nil {
		return Result{}, err
	}
	if c.Kind.countsBytes() {
		return Result{}, c.send(conn)
	}
	return c.pingPong(conn)
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

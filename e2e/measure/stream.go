// SPDX-License-Identifier: Apache-2.0

// Kinds that send as fast as bytes are taken. The server counts, and closes.

package measure

import (
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// receiveBuffer is the size, in bytes, of the buffer that a stream is read into.
	receiveBuffer = 256 << 10
	// replySize is that of an answer of Replies.
	replySize = 64
)

// receive counts what arrives, and ends the stream by closing.
func (c child) receive(conn socket) (Result, error) {
	buffer := make([]byte, receiveBuffer)
	step := func() (int, error) { return conn.read(buffer) }
	switch c.Kind {
	case BothWays:
		d := c.newDuplex(conn)
		step = d.turn
	case Replies:
		reply, unanswered := make([]byte, replySize), 0
		step = func() (int, error) {
			got, err := conn.read(buffer)
			for unanswered += got; err == nil && unanswered >= c.Size; unanswered -= c.Size {
				err = conn.writeFull(reply)
			}
			return got, err
		}
	}
	now := time.Now()
	for begin := now.Add(c.WarmUp); now.Before(begin); now = time.Now() {
		if _, err := step(); err != nil {
			return Result{}, err
		}
	}
	begin, n := now, 0
	for end := begin.Add(c.Duration); now.Before(end); now = time.Now() {
		moved, err := step()
		if err != nil {
			return Result{}, err
		}
		n += moved
	}
	return Result{Rate: float64(n) / now.Sub(begin).Seconds(), Count: n}, conn.close()
}

// send sends until the receiver closes. It does not look at the clock, which
// would cost as much as a tenth of a small message.
func (c child) send(conn socket) error {
	message := make([]byte, c.Size)
	step := func() error { return conn.writeFull(message) }
	if c.Kind != Stream {
		d := c.newDuplex(conn)
		step = func() error {
			_, err := d.turn()
			return err
		}
	}
	for {
		if err := step(); err != nil {
			return unless(err, io.EOF, unix.EPIPE, unix.ECONNRESET)
		}
	}
}

// duplex writes messages to a non-blocking socket and reads whatever comes.
type duplex struct {
	conn                  socket
	message, rest, buffer []byte
}

func (c child) newDuplex(conn socket) *duplex {
	return &duplex{conn: conn, message: make([]byte, c.Size), buffer: make([]byte, receiveBuffer)}
}

// turn writes a message, or what is left of one, then reads once, and waits if neither
// was possible. It returns how many bytes were written and read.
func (d *duplex) turn() (int, error) {
	if len(d.rest) == 0 {
		d.rest = d.message
	}
	wrote, errno := d.conn.transfer(unix.SYS_WRITE, d.rest)
	if errno == unix.EAGAIN {
		wrote = 0
	} else if errno != 0 {
		return 0, fmt.Errorf("write: %w", errno)
	}
	d.rest = d.rest[wrote:]
	got, errno := d.conn.transfer(unix.SYS_READ, d.buffer)
	switch {
	case errno == unix.EAGAIN && wrote == 0:
		return 0, d.conn.poll(unix.POLLIN | unix.POLLOUT)
	case errno == unix.EAGAIN:
		return wrote, nil
	case errno != 0:
		return 0, fmt.Errorf("read: %w", errno)
	case got == 0:
		return 0, io.EOF
	}
	return wrote + got, nil
}

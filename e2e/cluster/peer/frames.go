// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

const (
	// headerLength is that of a request (sequence number, bytes that follow,
	// bytes wanted) and of an answer (sequence number, bytes received so far).
	headerLength = 16
	// maxFrame bounds what either side asks of the other.
	maxFrame = 1 << 20
	// window is how many requests a client sends before it waits for an answer.
	window = 4
)

// way is one direction of a connection: bytes that only the connection's seed decides.
type way struct {
	content *rand.ChaCha8
	want    []byte
}

func newWay(seed uint64, name byte) *way {
	key := [32]byte{8: name}
	binary.BigEndian.PutUint64(key[:], seed)
	return &way{content: rand.NewChaCha8(key)}
}

// next returns the next n bytes. They are good until the next call.
func (w *way) next(n int) []byte {
	if cap(w.want) < n {
		w.want = make([]byte, n)
	}
	w.want = w.want[:n]
	_, _ = w.content.Read(w.want) // never fails
	return w.want
}

// read reads n bytes, which must be the next ones.
func (w *way) read(c io.Reader, n int) error {
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, w.next(n)) {
		return errors.New("wrong bytes")
	}
	return nil
}

// serveFrames checks and answers one client. The end of its stream between two frames is no error.
func serveFrames(c net.Conn, r *recorder) error {
	var header [headerLength]byte
	if _, err := io.ReadFull(c, header[:8]); err != nil {
		return fmt.Errorf("read the seed: %w", err)
	}
	seed := binary.BigEndian.Uint64(header[:])
	in, out := newWay(seed, 'c'), newWay(seed, 's')
	received := uint64(0)
	for sequence := uint64(0); ; sequence++ {
		_, err := io.ReadFull(c, header[:])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read header %d: %w", sequence, err)
		}
		began := time.Now()
		if got := binary.BigEndian.Uint64(header[:]); got != sequence {
			return fmt.Errorf("got header %d, want %d", got, sequence)
		}
		n, wanted := binary.BigEndian.Uint32(header[8:]), binary.BigEndian.Uint32(header[12:])
		if n > maxFrame || wanted > maxFrame {
			return fmt.Errorf("header %d has lengths %d and %d", sequence, n, wanted)
		}
		if err := in.read(c, int(n)); err != nil {
			return fmt.Errorf("read request %d of %d bytes after %d: %w", sequence, n, received, err)
		}
		received += uint64(n)
		answer := binary.BigEndian.AppendUint64(nil, sequence)
		answer = binary.BigEndian.AppendUint64(answer, received)
		answer = append(answer, out.next(int(wanted))...)
		if _, err := c.Write(answer); err != nil {
			return fmt.Errorf("write answer %d: %w", sequence, err)
		}
		r.request(len(answer), headerLength+int(n), time.Since(began))
	}
}

// sentFrame is a request that waits for its answer.
type sentFrame struct {
	at             time.Time
	length, wanted int
	total          uint64 // bytes sent up to its end
}

func talkFrames(ctx context.Context, c net.Conn, p pace, r *recorder) error {
	seed := rand.Uint64()
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, seed)); err != nil {
		return err
	}
	r.wrote(8)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := make(chan sentFrame, window)
	answers := make(chan error, 1)
	go func() { answers <- readAnswers(c, seed, sent, p.gate, cancel, r) }()
	err := sendFrames(ctx, c, seed, p, sent)
	close(sent)
	if err == nil {
		err = c.(deadlined).CloseWrite()
	}
	return errors.Join(err, <-answers)
}

func sendFrames(ctx context.Context, c net.Conn, seed uint64, p pace, sent chan<- sentFrame) error {
	out := newWay(seed, 'c')
	total := uint64(0)
	for sequence := 0; p.requests == 0 || sequence < p.requests; sequence++ {
		f := sentFrame{at: time.Now(), length: 1 + rand.IntN(p.size), wanted: 1 + rand.IntN(p.size)}
		total += uint64(f.length)
		f.total = total
		request := binary.BigEndian.AppendUint64(nil, uint64(sequence))
		request = binary.BigEndian.AppendUint32(request, uint32(f.length))
		request = binary.BigEndian.AppendUint32(request, uint32(f.wanted))
		request = append(request, out.next(f.length)...)
		p.gate.requests.RLock()
		p.gate.waiting.Add(1)
		p.gate.requests.RUnlock()
		select {
		case sent <- f:
		case <-ctx.Done():
			p.gate.waiting.Add(-1)
			return nil
		}
		if _, err := c.Write(request); err != nil {
			return fmt.Errorf("write request %d: %w", sequence, err)
		}
		select {
		case <-time.After(p.interval):
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// readAnswers reads the answer to each request, and then the end of the stream. It calls stop at the first error.
func readAnswers(c net.Conn, seed uint64, sent <-chan sentFrame, g *gate, stop func(), r *recorder) error {
	in := newWay(seed, 's')
	var err error
	for sequence := uint64(0); ; sequence++ {
		f, more := <-sent
		if !more {
			break
		}
		if err == nil {
			if err = readAnswer(c, sequence, f, in); err == nil {
				r.request(headerLength+f.length, headerLength+f.wanted, time.Since(f.at))
			} else {
				stop()
			}
		}
		g.waiting.Add(-1)
	}
	if err != nil {
		return err
	}
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last answer: %d bytes, %w", n, err)
	}
	return nil
}

func readAnswer(c net.Conn, sequence uint64, f sentFrame, in *way) error {
	var header [headerLength]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return fmt.Errorf("read answer %d: %w", sequence, err)
	}
	if got := binary.BigEndian.Uint64(header[:]); got != sequence {
		return fmt.Errorf("got answer %d, want %d", got, sequence)
	}
	if got := binary.BigEndian.Uint64(header[8:]); got != f.total {
		return fmt.Errorf("answer %d: the server has %d bytes of %d", sequence, got, f.total)
	}
	if err := in.read(c, f.wanted); err != nil {
		return fmt.Errorf("read answer %d of %d bytes: %w", sequence, f.wanted, err)
	}
	return nil
}

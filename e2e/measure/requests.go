// SPDX-License-Identifier: Apache-2.0

// Kinds whose client waits for an answer, and takes the time.

package measure

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// maxSamples bounds the memory for round trips: more than fit into a second.
const maxSamples = 1 << 20

// exchange is the size of a request and that of its answer.
type exchange struct{ request, answer int }

// exchanges returns what client and server do over and over again.
func (c child) exchanges() []exchange {
	if c.Kind != RandomSizes {
		return []exchange{{c.Size, c.Size}}
	}
	random := rand.New(rand.NewPCG(1, 2)) // both ends have to draw the same
	size := func() int { return int(math.Pow(float64(c.Size), random.Float64())) }
	all := make([]exchange, 512)
	for i := range all {
		all[i] = exchange{size(), size()}
	}
	return all
}

// echo answers every message until the client closes.
func (c child) echo(conn socket) error {
	message := make([]byte, c.Size)
	for all := c.exchanges(); ; {
		for _, e := range all {
			if err := conn.readFull(message[:e.request]); err != nil {
				return unless(err, io.EOF)
			}
			if err := conn.writeFull(message[:e.answer]); err != nil {
				return err
			}
		}
	}
}

func (c child) pingPong(conn socket) (Result, error) {
	message := make([]byte, c.Size)
	all, i := c.exchanges(), 0
	times, err := c.repeat(func() error {
		e := all[i%len(all)]
		i++
		if err := conn.writeFull(message[:e.request]); err != nil {
			return err
		}
		return conn.readFull(message[:e.answer])
	})
	if err != nil {
		return Result{}, err
	}
	result := percentiles(times)
	result.Rate = float64(time.Second) / float64(result.P50)
	return result, conn.close()
}

// greet serves one connection after the other. An empty one is the last.
func greet(accept func() (socket, error), conn socket) error {
	letter := make([]byte, 1)
	for {
		requests := 0
		for ; ; requests++ {
			err := conn.readFull(letter)
			if errors.Is(err, io.EOF) { // the client closes first, always
				break
			}
			if err != nil {
				return err
			}
			if err := conn.writeFull(letter); err != nil {
				return err
			}
		}
		if err := conn.close(); err != nil || requests == 0 {
			return err
		}
		var err error
		if conn, err = accept(); err != nil {
			return fmt.Errorf("next connection: %w", err)
		}
	}
}

func (c child) connections(dial func() (socket, error)) (Result, error) {
	letter := make([]byte, 1)
	requests := 0
	times, err := c.repeat(func() error {
		conn, err := dial()
		if err != nil {
			return err
		}
		for range max(c.Requests, 1) {
			if err := conn.writeFull(letter); err != nil {
				return err
			}
			if err := conn.readFull(letter); err != nil {
				return err
			}
			requests++
		}
		return conn.close()
	})
	if err != nil {
		return Result{}, err
	}
	var total time.Duration
	for _, t := range times {
		total += t
	}
	result := percentiles(times)
	result.Rate = float64(result.Count) / total.Seconds()
	result.Requests = requests
	last, err := dial()
	if err != nil {
		return Result{}, err
	}
	return result, last.close()
}

// repeat calls once until the time is over, and returns how long each call took after
// the warm-up, of which there is at least one.
func (c child) repeat(once func() error) ([]time.Duration, error) {
	times := make([]time.Duration, 0, maxSamples)
	last := time.Now()
	begin := last.Add(c.WarmUp)
	end := begin.Add(c.Duration)
	for len(times) == 0 || last.Before(end) && len(times) < maxSamples {
		if err := once(); err != nil {
			return nil, err
		}
		now := time.Now()
		if last.After(begin) {
			times = append(times, now.Sub(last))
		}
		last = now
	}
	return times, nil
}

func percentiles(times []time.Duration) Result {
	slices.Sort(times)
	return Result{P50: times[len(times)/2], P99: times[len(times)*99/100], Count: len(times)}
}

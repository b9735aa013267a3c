// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

func bulkRows() []row {
	return []row{
		{name: "bulk one way", run: func(c *conn) { bulk(c, false) }, tcp: spills},
		{name: "bulk both ways", run: func(c *conn) { bulk(c, true) }, tcp: spills},
	}
}

func bulk(c *conn, both bool) {
	for i, result := range c.transfer(scaled(4<<20), both) {
		c.saw(fmt.Sprintf("thread %d", i), result())
	}
}

// transfer moves size bytes from a to b, or in both directions at once, with a
// thread for each reader and writer.
func (c *conn) transfer(size int, both bool) (results []func() any) {
	from, back := c.a.sent.Load(), c.b.sent.Load()
	parts := []func() any{
		func() any { return newChunks(1).read(c.b, from, size) },
		func() any { return newChunks(2).write(c.a, size) },
	}
	if both {
		parts = append(parts,
			func() any { return newChunks(3).read(c.a, back, size) },
			func() any { return newChunks(4).write(c.b, size) })
	}
	for _, part := range parts {
		results = append(results, c.onThread(part))
	}
	return results
}

// chunks are random sizes: mostly small, sometimes up to maxChunk.
type chunks struct{ *rand.Rand }

const maxChunk = 128 << 10

func newChunks(seed uint64) chunks { return chunks{rand.New(rand.NewPCG(seed, 1))} }

func (r chunks) next(left int) int { return min(left, 1+r.IntN(1<<(4+r.IntN(14)))) }

// write sends size bytes and returns "done", or what was in the way.
func (r chunks) write(e *end, size int) string {
	for done := 0; done < size; {
		p := e.next(r.next(size - done))
		n, err := e.call(unix.POLLOUT, func() (int, error) { return unix.Write(e.fd, p) })
		if err != nil {
			return fmt.Sprintf("write at %d: %s", done, errno(err))
		}
		e.sent.Add(int64(n))
		done += n
	}
	return "done"
}

// read receives what the other end sends from a position on, and returns "done" if it is that.
func (r chunks) read(e *end, position int64, size int) string {
	buffer := make([]byte, maxChunk)
	for done := 0; done < size; {
		p := buffer[:r.next(size-done)]
		n, err := e.call(unix.POLLIN, func() (int, error) { return unix.Read(e.fd, p) })
		if err != nil || n == 0 {
			return fmt.Sprintf("read at %d: %s", done, moved(p, n, err))
		}
		if want := e.c.content.piece(position+int64(done), n); !bytes.Equal(p[:n], want) {
			i := 0
			for p[i] == want[i] {
				i++
			}
			return fmt.Sprintf("byte %d differs", done+i)
		}
		done += n
	}
	return "done"
}

// scaled is a number of bytes, or a sixteenth of it with -short: for emulated machines.
func scaled(size int) int {
	if testing.Short() {
		return size / 16
	}
	return size
}

// TestGibibyte moves 1 GiB over shortcut connections, both directions at once.
func TestGibibyte(t *testing.T) {
	const rounds = 16
	size := scaled(1 << 30)
	s := mustSuite(t, true, false)
	for _, v := range []variant{{mode: mode{name: "non-blocking"}}, {mode: mode{name: "non-blocking"}, ipv6: true}} {
		t.Run(v.String(), func(t *testing.T) {
			s.observe(t, row{name: "1 GiB", tcp: spills, run: func(c *conn) {
				// A writer that stays ahead of its reader stays on TCP. All has been read
				// when the next round begins, which can take up to the budget by shortcut.
				for range rounds {
					for i, result := range c.transfer(size/4/rounds, true) {
						if got := result(); got != "done" {
							t.Fatalf("thread %d: %v", i, got)
						}
					}
				}
				now := c.sums()
				for _, e := range []*end{c.a, c.b} {
					sent, short := now[e].sent-c.base[e].sent, now[e].shortcut-c.base[e].shortcut
					t.Logf("%s: %d of %d bytes by shortcut", e, short, sent)
					// What is spilled depends on how threads are scheduled.
					if sent != size/4 || short < sent/8 {
						t.Errorf("%s: got %d of %d bytes by shortcut, want a good part of %d", e, short, sent, size/4)
					}
				}
			}}, v, shortcut)
		})
	}
	s.mustForget(t)
}

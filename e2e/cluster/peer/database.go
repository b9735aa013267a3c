// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// database is a server with state: SET KEY VALUE, GET KEY and INCR KEY, a line each, answered by a line.
type database struct {
	mu     sync.Mutex
	values map[string]string
}

func newDatabase() *database { return &database{values: map[string]string{}} }

func (d *database) serve(c net.Conn, r *recorder) error {
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) && line == "" {
			return nil
		}
		if err != nil {
			return err
		}
		began := time.Now()
		answer := d.answer(strings.Fields(line)) + "\n"
		if _, err := io.WriteString(c, answer); err != nil {
			return err
		}
		r.request(len(answer), len(line), time.Since(began))
	}
}

func (d *database) answer(words []string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case len(words) == 3 && words[0] == "SET":
		d.values[words[1]] = words[2]
		return "OK"
	case len(words) == 2 && words[0] == "GET":
		return d.values[words[1]]
	case len(words) == 2 && words[0] == "INCR":
		n, _ := strconv.Atoi(d.values[words[1]]) // what is not there counts as 0
		d.values[words[1]] = strconv.Itoa(n + 1)
		return d.values[words[1]]
	}
	return fmt.Sprintf("ERR %q", words)
}

// talkDatabase writes a value, reads it back, and counts its transactions in
// the database: a request that is lost or comes twice makes the count differ.
func talkDatabase(ctx context.Context, c net.Conn, p pace, r *recorder) error {
	in := bufio.NewReader(c)
	ask := func(format string, args ...any) (string, error) {
		began, request := time.Now(), fmt.Sprintf(format, args...)
		if _, err := io.WriteString(c, request+"\n"); err != nil {
			return "", err
		}
		answer, err := in.ReadString('\n')
		if err != nil {
			return "", err
		}
		r.request(len(request)+1, len(answer), time.Since(began))
		return strings.TrimSpace(answer), nil
	}
	key := strconv.FormatUint(rand.Uint64(), 36)
	transaction := func(n int) error {
		p.gate.requests.RLock()
		defer p.gate.requests.RUnlock()
		value := randomText(p.size)
		for _, step := range []struct{ request, want string }{
			{"SET " + key + " " + value, "OK"},
			{"INCR " + key + ".count", strconv.Itoa(n)},
			{"GET " + key, value},
		} {
			got, err := ask("%s", step.request)
			if err != nil {
				return fmt.Errorf("transaction %d: %w", n, err)
			}
			if got != step.want {
				return fmt.Errorf("transaction %d: %.20s: got %.40q, want %.40q", n, step.request, got, step.want)
			}
		}
		return nil
	}
	for n := 1; ctx.Err() == nil && (p.requests == 0 || n <= p.requests); n++ {
		if err := transaction(n); err != nil {
			return err
		}
		select {
		case <-time.After(p.interval):
		case <-ctx.Done():
		}
	}
	return nil
}

func randomText(size int) string {
	b := make([]byte, 1+rand.IntN(max(1, size/2)))
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return hex.EncodeToString(b)
}

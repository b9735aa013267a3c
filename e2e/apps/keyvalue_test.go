// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"
)

const (
	// clients is how many connections a client uses at once.
	clients = 4
	// rounds is how many keys each of them writes and reads.
	rounds = 200
)

func redis(s *stage) {
	address := s.serve(s.server, 6379, syscall.SIGTERM, "redis-server", "--port", "6379", "--bind", "0.0.0.0",
		"--protected-mode", "no", "--save", "", "--dir", s.dir)
	at := []string{"-h", address.Addr().String(), "-p", "6379"}
	for _, options := range [][]string{{"-d", "1024"}, {"-d", "16384"}, {"-d", "64", "-P", "16"}} {
		options = append(options, "-q", "-n", "2000", "-c", "10", "-t", "ping_mbulk,set,get,incr,lpush,rpop")
		out := s.run(s.client, nil, "redis-benchmark", append(options, at...)...)
		if got, want := strings.Count(out, "requests per second"), 6; got != want || strings.Contains(out, "rror") {
			s.Fatalf("redis-benchmark: got %d results, want %d: %s", got, want, tail([]byte(out)))
		}
	}
	s.keyValues(address, redisClient)
	// A client with a socket in blocking mode.
	s.answer("redis-cli: %s", s.run(s.client, nil, "redis-cli", append(at, "--raw", "get", "key-0-1")...))
}

func memcached(s *stage) {
	address := s.serve(s.server, 11211, syscall.SIGTERM, "memcached", "-l", "0.0.0.0", "-p", "11211", "-U", "0", "-t", "2", "-m", "64")
	s.keyValues(address, memcachedClient)
}

// keyValues runs a client on several connections at once.
func (s *stage) keyValues(address netip.AddrPort, client func(c *conversation, id int)) {
	s.Helper()
	var group errgroup.Group
	for id := range clients {
		group.Go(func() error {
			conn, err := s.dial(s.client, address.String())
			if err != nil {
				return err
			}
			defer conn.Close()
			c := &conversation{ReadWriter: bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))}
			client(c, id)
			return c.err
		})
	}
	s.must("client", group.Wait())
	s.answer("%d clients: every reply was right", clients)
}

// conversation writes requests and checks replies until the first is wrong.
type conversation struct {
	*bufio.ReadWriter
	err error
}

// say buffers a request.
func (c *conversation) say(format string, args ...any) {
	fmt.Fprintf(c, format, args...)
}

// hear sends what is buffered and reads the reply.
func (c *conversation) hear(want string) {
	if c.err == nil {
		c.err = c.Flush()
	}
	if c.err != nil {
		return
	}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil {
		c.err = fmt.Errorf("after %d of %d bytes of a reply: %w", n, len(want), err)
	} else if string(got) != want {
		c.err = fmt.Errorf("got %.80q, want %.80q", got, want)
	}
}

func key(client, round int) string { return fmt.Sprintf("key-%d-%d", client, round) }

// value is what belongs to a key: mostly short, sometimes more than a socket's buffer.
func value(client, round int) []byte {
	size := int64(1 + 7*round)
	if round%50 == 49 {
		size = 500 << 10
	}
	return contentBytes(rounds*client+round, size)
}

func redisClient(c *conversation, id int) {
	say := func(args ...string) {
		c.say("*%d\r\n", len(args))
		for _, a := range args {
			c.say("$%d\r\n%s\r\n", len(a), a)
		}
	}
	hearValue := func(round int) {
		v := value(id, round)
		c.hear(fmt.Sprintf("$%d\r\n%s\r\n", len(v), v))
	}
	for round := range rounds {
		say("SET", key(id, round), string(value(id, round)))
		c.hear("+OK\r\n")
		say("GET", key(id, round))
		hearValue(round)
		say("INCR", fmt.Sprint("counter-", id))
		say("RPUSH", fmt.Sprint("list-", id), key(id, round))
		c.hear(fmt.Sprintf(":%d\r\n:%[1]d\r\n", round+1))
	}
	for round := range rounds {
		say("GET", key(id, round))
	}
	for round := range rounds {
		hearValue(round)
	}
}

func memcachedClient(c *conversation, id int) {
	for round := range rounds {
		v := value(id, round)
		c.say("set %s %d 0 %d\r\n%s\r\n", key(id, round), round, len(v), v)
		c.hear("STORED\r\n")
		// An older value, and two in one request.
		want := ""
		for _, r := range []int{round / 2, round} {
			v := value(id, r)
			want += fmt.Sprintf("VALUE %s %d %d\r\n%s\r\n", key(id, r), r, len(v), v)
		}
		c.say("get %s %s\r\n", key(id, round/2), key(id, round))
		c.hear(want + "END\r\n")
		c.say("set counter-%d 0 0 %d\r\n%d\r\nincr counter-%[1]d 1\r\n", id, len(fmt.Sprint(round)), round)
		c.hear(fmt.Sprintf("STORED\r\n%d\r\n", round+1))
	}
	c.say("delete %s\r\nget %[1]s\r\n", key(id, 0))
	c.hear("DELETED\r\nEND\r\n")
}

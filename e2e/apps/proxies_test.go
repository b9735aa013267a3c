// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// posted is a web server in Go that answers POST /SEED/SIZE with content, and with
// the digest of the body in a header.
func (s *stage) posted() netip.AddrPort {
	s.Helper()
	return s.httpServer(s.server, func(w http.ResponseWriter, r *http.Request) {
		var (
			seed int
			size int64
		)
		if _, err := fmt.Sscanf(r.URL.Path, "/%d/%d", &seed, &size); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		got, err := digest(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Digest", got)
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = io.Copy(w, content(seed, size)) // the client sees where it ends
	})
}

// posts sends bodies of 0 to 300 KB by POST and wants others as the answers: on
// one connection that is kept, then on some at once.
func (s *stage) posts(address netip.AddrPort) {
	s.Helper()
	s.postsBy(address, func(address string) (net.Conn, error) { return s.dial(s.client, address) })
}

func (s *stage) postsBy(address netip.AddrPort, dial func(address string) (net.Conn, error)) {
	s.Helper()
	const limit = 300 << 10
	conversation := func(id, requests int) error {
		c := s.httpClientBy(dial)
		random := rand.New(rand.NewPCG(uint64(id), 1))
		for i := range requests {
			seed, size := 100*id+i, random.Int64N(limit)
			body := contentBytes(seed, random.Int64N(limit))
			if i%5 == 4 {
				body = nil
			}
			if err := s.post(c, fmt.Sprintf("http://%s/%d/%d", address, seed, size), body, seed, size); err != nil {
				return fmt.Errorf("connection %d, request %d of %d bytes: %w", id, i, len(body), err)
			}
		}
		return nil
	}
	s.must("POST", conversation(0, 30))
	var group errgroup.Group
	for id := range 3 {
		group.Go(func() error { return conversation(1+id, 10) })
	}
	s.must("POST at once", group.Wait())
	s.answer("every body and every answer was right")
}

func (s *stage) post(c *http.Client, url string, body []byte, seed int, size int64) error {
	r, err := http.NewRequestWithContext(s.ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	answer, err := c.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, small)) // it only explains
		return fmt.Errorf("%s: %s", answer.Status, text)
	}
	got, err := digest(answer.Body)
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	sent, err := digest(bytes.NewReader(body))
	if err != nil {
		return err
	}
	want, err := digest(content(seed, size))
	if err != nil {
		return err
	}
	if got != want || answer.Header.Get("Digest") != sent {
		return fmt.Errorf("sent %s, arrived %s; answer %s, want %s", sent, answer.Header.Get("Digest"), got, want)
	}
	return nil
}

// spliceAll is all that HAProxy can splice.
const spliceAll = "option splice-auto\n\toption splice-request\n\toption splice-response"

// haproxyPosts passes POST through HAProxy.
func haproxyPosts(options ...string) func(*stage) {
	return func(s *stage) { s.posts(s.haproxyBefore(s.posted(), options...)) }
}

// newerPosts is haproxyPosts by the newer HAProxy.
func newerPosts(options ...string) func(*stage) {
	return func(s *stage) { s.posts(s.haproxyBy(newerHAProxy(), s.posted(), options...)) }
}

// newerHAProxy is the command for what newer.sh has unpacked: in a guest below /,
// else where the other programs are.
func newerHAProxy() []string {
	root, err := filepath.Abs(cmp.Or(os.Getenv("PODSHUNT_APPS"), "../../.cache/apps") + "/opt/newer")
	if err == nil {
		_, err = os.Stat(root)
	}
	if err != nil {
		root = "/opt/newer"
	}
	// The loader has a name of its own on each architecture.
	loaders, _ := filepath.Glob(root + "/usr/lib*/*/ld-linux-*.so.*") // the pattern is right
	if len(loaders) == 0 {
		return []string{root + "/usr/sbin/haproxy"} // which then says why not
	}
	return []string{loaders[0], "--library-path", filepath.Dir(loaders[0]), root + "/usr/sbin/haproxy"}
}

// nginxPosts passes POST through nginx, which keeps its connections to the origin.
func nginxPosts(buffering string) func(*stage) {
	return func(s *stage) {
		const port = 8081
		s.nginx(s.proxy, "on", fmt.Sprintf(`
	upstream origin { server %s; keepalive 8; }
	server {
		listen %d;
		location / {
			proxy_pass http://origin;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_buffering %s;
		}
	}`, s.posted(), port, buffering))
		s.posts(s.listening(s.proxy, port))
	}
}

// nginxPut20 is one upload, which is read back.
func nginxPut20(s *stage) {
	const size = 20 << 20
	address, c := s.nginx(s.server, "on", ""), s.httpClient(s.client)
	for seed := range 2 {
		path := fmt.Sprint("/put-", seed)
		s.put(c, address, path, seed, size, "")
		s.get(c, address, path, seed, size)
	}
}

// goCopyProxy passes POST through a proxy that copies by io.Copy.
func goCopyProxy(s *stage) {
	s.posts(s.tcpProxy(s.posted(), func(net.Conn, net.Conn) error { return nil }))
}

// goSocksProxy passes POST through a SOCKS5 proxy, which copies after the handshake.
func goSocksProxy(s *stage) {
	l, proxy := s.listen(s.proxy, 1080)
	go func() {
		for {
			down, err := l.Accept()
			if err != nil {
				return // closed
			}
			deadline, _ := s.ctx.Deadline()
			down.SetDeadline(deadline)
			go func() {
				to, err := socksRequest(down)
				if err != nil {
					down.Close() // the client sees it
					return
				}
				s.pass(down, to, func(net.Conn, net.Conn) error { return nil })
			}()
		}
	}()
	origin := s.posted()
	s.postsBy(origin, func(string) (net.Conn, error) {
		c, err := s.dial(s.client, proxy.String())
		if err != nil {
			return nil, err
		}
		if err := socksConnect(c, origin); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return c, nil
	})
}

// The messages of RFC 1928, for a client that has no password and dials an IPv4 address.
var (
	socksMethods = []byte{5, 1, 0}
	socksMethod  = []byte{5, 0}
	socksDial    = []byte{5, 1, 0, 1}
	socksDone    = []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}
)

// expect reads what has to come.
func expect(r io.Reader, want []byte) error {
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("SOCKS: got %v, want %v", got, want)
	}
	return nil
}

// socksRequest is the proxy's side. It answers before it has dialled, as the
// client sees the same of a dial that fails.
func socksRequest(c net.Conn) (to netip.AddrPort, err error) {
	if err := expect(c, socksMethods); err != nil {
		return to, err
	}
	if _, err := c.Write(socksMethod); err != nil {
		return to, err
	}
	if err := expect(c, socksDial); err != nil {
		return to, err
	}
	var address [6]byte
	if _, err := io.ReadFull(c, address[:]); err != nil {
		return to, err
	}
	_, err = c.Write(socksDone)
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(address[:4])), binary.BigEndian.Uint16(address[4:])), err
}

// socksConnect is the client's side.
func socksConnect(c net.Conn, to netip.AddrPort) error {
	if _, err := c.Write(socksMethods); err != nil {
		return err
	}
	if err := expect(c, socksMethod); err != nil {
		return err
	}
	request := append(bytes.Clone(socksDial), to.Addr().AsSlice()...)
	if _, err := c.Write(binary.BigEndian.AppendUint16(request, to.Port())); err != nil {
		return err
	}
	return expect(c, socksDone)
}

// pythonServer is a server that blocks, with a client that does not.
func pythonServer(s *stage) {
	files := s.mkdir("files")
	s.file("files/medium", content(1, medium))
	s.file("files/large", content(2, 4<<20))
	address := s.serve(s.server, webPort, syscall.SIGTERM, "python3", "-m", "http.server", "--protocol", "HTTP/1.1",
		"--bind", s.server.IPv4.String(), "--directory", files, fmt.Sprint(webPort))
	for _, name := range []string{"medium", "large"} {
		want, err := os.ReadFile(filepath.Join(files, name))
		s.must("read", err)
		url := fmt.Sprintf("http://%s/%s", address, name)
		got := s.run(s.client, nil, "curl", "-sSf", url, url) // one connection
		s.want("curl "+name, strings.NewReader(got), bytes.NewReader(slices.Repeat(want, 2)))
	}
}

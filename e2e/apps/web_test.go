// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/coder/websocket"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// webPort is where web servers and proxies listen.
const webPort = 8080

// Sizes of bodies besides large.
const (
	small  = 1 << 10
	medium = 100 << 10
)

// httpClient connects from a pod.
func (s *stage) httpClient(p *sandbox.Pod) *http.Client {
	return s.httpClientBy(func(address string) (net.Conn, error) { return s.dial(p, address) })
}

func (s *stage) httpClientBy(dial func(address string) (net.Conn, error)) *http.Client {
	t := &http.Transport{
		DisableCompression: true,
		DialContext:        func(_ context.Context, _, address string) (net.Conn, error) { return dial(address) },
	}
	s.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

// httpServer serves in a pod.
func (s *stage) httpServer(p *sandbox.Pod, handler http.HandlerFunc) netip.AddrPort {
	s.Helper()
	l, address := s.listen(p, webPort)
	server := &http.Server{Handler: handler}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(l) // always http.ErrServerClosed
	}()
	s.Cleanup(func() {
		server.Close()
		<-ended
	})
	return address
}

// get wants content as the answer.
func (s *stage) get(c *http.Client, address netip.AddrPort, path string, seed int, size int64) {
	s.Helper()
	s.request(c, http.MethodGet, address, path, nil, content(seed, size))
}

// put sends content and wants a text as the answer.
func (s *stage) put(c *http.Client, address netip.AddrPort, path string, seed int, size int64, want string) {
	s.Helper()
	s.request(c, http.MethodPut, address, path, bytes.NewReader(contentBytes(seed, size)), strings.NewReader(want))
}

func (s *stage) request(c *http.Client, method string, address netip.AddrPort, path string, body, want io.Reader) {
	s.Helper()
	s.requestURL(c, method, "http://"+address.String(), path, body, want)
}

func (s *stage) requestURL(c *http.Client, method, server, path string, body, want io.Reader) {
	s.Helper()
	what := method + " " + path
	r, err := http.NewRequestWithContext(s.ctx, method, server+path, body)
	s.must(what, err)
	answer, err := c.Do(r)
	s.must(what, err)
	defer answer.Body.Close()
	if answer.StatusCode/100 != 2 {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, small)) // it only explains
		s.Fatalf("%s: %s: %s", what, answer.Status, text)
	}
	s.want(what, answer.Body, want)
}

// nginx serves on webPort of a pod: content of seed 1 as /small, /medium and /large, and
// whatever is PUT. Another server block may be added.
func (s *stage) nginx(p *sandbox.Pod, sendfile, another string) netip.AddrPort {
	s.Helper()
	s.mkdir(p.Name)
	s.mkdir(p.Name + "/files")
	s.file(p.Name+"/files/small", content(1, small))
	s.file(p.Name+"/files/medium", content(1, medium))
	s.file(p.Name+"/files/large", content(1, large))
	conf := fmt.Sprintf(`
daemon off;
worker_processes 2;
pid nginx.pid;
error_log stderr warn;
events { worker_connections 256; }
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxied;
	fastcgi_temp_path unused;
	uwsgi_temp_path unused;
	scgi_temp_path unused;
	client_max_body_size 0;
	# A connection that stalls has to be there when the flows are shown.
	client_header_timeout 1h;
	client_body_timeout 1h;
	send_timeout 1h;
	proxy_connect_timeout 1h;
	proxy_send_timeout 1h;
	proxy_read_timeout 1h;
	root files;
	sendfile %s;
	server { listen %d; location / { dav_methods PUT; } }
	%s
}
`, sendfile, webPort, another)
	return s.serve(p, webPort, syscall.SIGTERM, "nginx", "-e", "stderr", "-p", s.dir+"/"+p.Name,
		"-c", s.file(p.Name+".conf", strings.NewReader(conf)))
}

func nginxSendfile(s *stage) { s.nginxGet("on") }

func nginxNoSendfile(s *stage) { s.nginxGet("off") }

func (s *stage) nginxGet(sendfile string) {
	address, c := s.nginx(s.server, sendfile, ""), s.httpClient(s.client)
	for range 200 { // it joins after some 16, and has a trial of 32 reads
		s.get(c, address, "/small", 1, small)
	}
	for range 2 {
		s.get(c, address, "/large", 1, large)
	}
}

var wrkResult = regexp.MustCompile(`(?m)^ +[1-9][0-9]* requests in`)

func nginxWrk(s *stage) {
	address := s.nginx(s.server, "on", "")
	for _, path := range []string{"small", "medium"} {
		out := s.run(s.client, nil, "wrk", "-t1", "-c8", "-d1s", fmt.Sprintf("http://%s/%s", address, path))
		if !wrkResult.MatchString(out) || strings.Contains(out, "errors") || strings.Contains(out, "Non-2xx") {
			s.Fatalf("wrk: %s", out)
		}
	}
	s.answer("wrk saw no error")
}

func nginxPut(s *stage) { s.nginxPuts(s.nginx(s.server, "on", "")) }

func nginxProxy(s *stage) {
	origin := s.nginx(s.server, "on", "")
	s.nginx(s.proxy, "on", fmt.Sprintf("server { listen 8081; location / { proxy_pass http://%s; } }", origin))
	address := s.listening(s.proxy, 8081)
	s.get(s.httpClient(s.client), address, "/large", 1, large)
	s.nginxPuts(address)
}

func (s *stage) nginxPuts(address netip.AddrPort) {
	c := s.httpClient(s.client)
	for seed, size := range []int64{1, small, 20 << 10, 1 << 20, large} {
		path := fmt.Sprint("/put-", seed)
		s.put(c, address, path, seed, size, "")
		s.get(c, address, path, seed, size)
	}
}

// origin is a web server in Go that takes part in bodies.
func (s *stage) origin() netip.AddrPort {
	return s.httpServer(s.server, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			d, err := digest(r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			fmt.Fprint(w, d)
			return
		}
		var (
			seed int
			size int64
		)
		if _, err := fmt.Sscanf(r.URL.Path, "/%d/%d", &seed, &size); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		_, _ = io.Copy(w, content(seed, size)) // the client sees where it ends
	})
}

// bodies moves bodies of many sizes between a client and origin, in both
// directions. The address is origin's or that of a proxy.
func (s *stage) bodies(c *http.Client, address netip.AddrPort) {
	s.Helper()
	for seed, size := range []int64{0, 1, small, 5 << 10, medium, 1 << 20, large, 3} {
		want, err := digest(content(seed, size))
		s.must("digest", err)
		for range 2 {
			path := fmt.Sprintf("/%d/%d", seed, size)
			s.get(c, address, path, seed, size)
			s.put(c, address, path, seed, size, want)
		}
	}
}

func haproxyTCP(s *stage) { s.haproxy("mode tcp") }

func haproxyTCPSplice(s *stage) {
	s.haproxy("mode tcp", "option splice-request", "option splice-response")
}

func haproxyHTTPSplice(s *stage) {
	s.haproxy("mode http", "option splice-request", "option splice-response")
}

func (s *stage) haproxy(options ...string) {
	s.bodies(s.httpClient(s.client), s.haproxyBefore(s.origin(), options...))
}

// haproxyBefore passes connections or requests on to another address.
func (s *stage) haproxyBefore(origin netip.AddrPort, options ...string) netip.AddrPort {
	s.Helper()
	return s.haproxyBy([]string{"haproxy"}, origin, options...)
}

// haproxyBy is haproxyBefore with the command that starts it.
func (s *stage) haproxyBy(command []string, origin netip.AddrPort, options ...string) netip.AddrPort {
	s.Helper()
	conf := s.file("haproxy.cfg", strings.NewReader(fmt.Sprintf(`
global
	maxconn 100
	nbthread 2
defaults
	timeout connect 1h
	timeout client 1h
	timeout server 1h
	%s
listen front
	bind :%d
	server origin %s
`, strings.Join(options, "\n\t"), webPort, origin)))
	return s.serve(s.proxy, webPort, syscall.SIGTERM, command[0], append(slices.Clone(command[1:]), "-db", "-f", conf)...)
}

// reverseProxy passes requests on to another address.
func (s *stage) reverseProxy(to netip.AddrPort) netip.AddrPort {
	s.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: to.String()})
	proxy.Transport = s.httpClient(s.proxy).Transport
	return s.httpServer(s.proxy, proxy.ServeHTTP)
}

func goHTTPProxy(s *stage) { s.bodies(s.httpClient(s.client), s.reverseProxy(s.origin())) }

// goTCPProxy copies by io.Copy, which is splice(2) between two TCP connections.
func goTCPProxy(s *stage) {
	s.bodies(s.httpClient(s.client), s.tcpProxy(s.origin(), func(net.Conn, net.Conn) error { return nil }))
}

// goPeekingProxy looks at the first bytes of each direction before it copies, as
// proxies do that choose by a TLS server name.
func goPeekingProxy(s *stage) {
	s.bodies(s.httpClient(s.client), s.tcpProxy(s.origin(), func(to, from net.Conn) error {
		_, err := io.CopyN(struct{ io.Writer }{to}, struct{ io.Reader }{from}, 4)
		return err
	}))
}

// tcpProxy passes connections on to another address: in each direction what
// begin does, then a copy.
func (s *stage) tcpProxy(to netip.AddrPort, begin func(to, from net.Conn) error) netip.AddrPort {
	s.Helper()
	l, address := s.listen(s.proxy, webPort)
	go func() {
		for {
			down, err := l.Accept()
			if err != nil {
				return // closed
			}
			deadline, _ := s.ctx.Deadline()
			down.SetDeadline(deadline)
			go s.pass(down, to, begin)
		}
	}()
	return address
}

// pass connects on and copies both directions to their ends.
func (s *stage) pass(down net.Conn, to netip.AddrPort, begin func(to, from net.Conn) error) {
	defer down.Close()
	up, err := s.dial(s.proxy, to.String())
	if err != nil {
		return // the client sees it
	}
	defer up.Close()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{up, down}, {down, up}} {
		both.Go(func() {
			if begin(way[0], way[1]) == nil {
				_, _ = io.Copy(way[0], way[1]) // the ends see where it stops
			}
			_ = way[0].(*net.TCPConn).CloseWrite() // it may be closed already
		})
	}
	both.Wait()
}

// goConnectProxy serves CONNECT. It reads the request before there is anything
// else to read, and copies then.
func goConnectProxy(s *stage) {
	proxy := s.httpServer(s.proxy, func(w http.ResponseWriter, r *http.Request) {
		to, err := netip.ParseAddrPort(r.Host)
		if err != nil || r.Method != http.MethodConnect {
			http.Error(w, "CONNECT to an address and port", http.StatusBadRequest)
			return
		}
		down, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return // the client sees it
		}
		fmt.Fprint(down, connected)
		s.pass(down, to, func(net.Conn, net.Conn) error { return nil })
	})
	c := s.httpClientBy(func(address string) (net.Conn, error) {
		conn, err := s.dial(s.client, proxy.String())
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", address)
		answer := make([]byte, len(connected))
		if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != connected {
			return nil, errors.Join(fmt.Errorf("CONNECT: got %q, %v", answer, err), conn.Close())
		}
		return conn, nil
	})
	s.bodies(c, s.origin())
}

// connected is the answer to CONNECT.
const connected = "HTTP/1.1 200 OK\r\n\r\n"

func websockets(s *stage) {
	const limit = 1 << 20
	echo := s.httpServer(s.server, func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return // the client is told
		}
		defer func() { _ = c.CloseNow() }() // the other end sees it
		c.SetReadLimit(limit)
		for err == nil {
			var (
				kind websocket.MessageType
				m    []byte
			)
			if kind, m, err = c.Read(s.ctx); err == nil {
				err = c.Write(s.ctx, kind, m)
			}
		}
	})
	c, _, err := websocket.Dial(s.ctx, fmt.Sprintf("ws://%s", s.reverseProxy(echo)), &websocket.DialOptions{HTTPClient: s.httpClient(s.client)})
	s.must("dial", err)
	defer func() { _ = c.CloseNow() }() // it is closed, unless the test has failed
	c.SetReadLimit(limit)
	for i := range 300 {
		size := int64(i * i)
		s.must("write", c.Write(s.ctx, websocket.MessageBinary, contentBytes(i, size)))
		_, r, err := c.Reader(s.ctx)
		s.must("read", err)
		s.want("message", r, content(i, size))
	}
	s.must("close", c.Close(websocket.StatusNormalClosure, ""))
}

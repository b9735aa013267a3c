// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// halfClosing are programs that say by a half-close that they have sent all, and
// read on.
func halfClosing() []program {
	const short = "no connection is used for long"
	return []program{
		{name: "half-close, Go", version: runtime.Version(), run: halfCloseGo},
		{name: "half-close, Python", version: version(python, "--version"), run: halfClosePython, stays: short},
		{name: "netcat -N", version: version("nc.openbsd", "-h"), run: netcat, stays: short},
		{name: "ssh -W", version: version("ssh", "-V"), run: sshForward, stays: short},
		{name: "HTTP 1.0", version: version("curl", "--version"), run: http10, stays: short},
	}
}

// digestServer reads a connection to its end and then answers with its digest, as
// a Go program does.
func (s *stage) digestServer(p *sandbox.Pod, port uint16) netip.AddrPort {
	s.Helper()
	l, address := s.listen(p, port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			deadline, _ := s.ctx.Deadline()
			c.SetDeadline(deadline)
			go func() {
				defer c.Close()
				if d, err := digest(c); err == nil { // the client misses the answer
					fmt.Fprintln(c, d)
				}
			}()
		}
	}()
	return address
}

// halfClosed are the sizes of what is sent before the half-close.
func halfClosed() []int64 { return []int64{0, 1, small, 7, medium, 1, 1 << 20, 3, 4 << 20, 5} }

func wantDigest(i int, size int64) string {
	d, _ := digest(content(i, size)) // it never fails
	return d + "\n"
}

// halfCloseGo talks first: much of what comes then is unread when the half-close does.
func halfCloseGo(s *stage) {
	const calls = 60
	l, address := s.listen(s.server, webPort)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			deadline, _ := s.ctx.Deadline()
			c.SetDeadline(deadline)
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for range calls {
					line, err := r.ReadString('\n')
					if err != nil {
						return // the client misses the answer
					}
					fmt.Fprint(c, line)
				}
				if d, err := digest(r); err == nil {
					fmt.Fprintln(c, d)
				}
			}()
		}
	}()
	for i, size := range halfClosed() {
		c, err := s.dial(s.client, address.String())
		s.must("dial", err)
		talk := &conversation{ReadWriter: bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c))}
		for call := range calls {
			talk.say("call %d\n", call)
			talk.hear(fmt.Sprintf("call %d\n", call))
		}
		s.must("call", talk.err)
		_, err = c.Write(contentBytes(i, size))
		s.must("write", err)
		s.must("close for writing", c.(*net.TCPConn).CloseWrite())
		got, err := io.ReadAll(talk)
		s.must("read", err)
		s.must("close", c.Close())
		s.wantText("answer", string(got), wantDigest(i, size))
	}
}

// halfCloseScript is a server and a client whose sockets are in blocking mode and
// which sleep in recv, the client right after its half-close.
const halfCloseScript = `
import hashlib, socket, socketserver, sys

def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        body = read_all(self.request)
        self.request.sendall(b"%d bytes, sha256 %s\n" % (len(body), hashlib.sha256(body).hexdigest().encode()))

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

if sys.argv[1] == "server":
    Server(("0.0.0.0", int(sys.argv[2])), Handler).serve_forever()
body = sys.stdin.buffer.read()
with socket.create_connection((sys.argv[2], int(sys.argv[3]))) as connection:
    # The server is busy with the connection before, often enough.
    connection.sendall(body[:len(body) // 2])
    connection.sendall(body[len(body) // 2:])
    connection.shutdown(socket.SHUT_WR)
    sys.stdout.buffer.write(read_all(connection))
`

func halfClosePython(s *stage) {
	script := s.script("half-close.py", halfCloseScript)
	byPython := s.serve(s.server, webPort, syscall.SIGTERM, python, script, "server", fmt.Sprint(webPort))
	byGo := s.digestServer(s.server, 8081)
	for i, size := range halfClosed() {
		for _, address := range []netip.AddrPort{byPython, byGo} {
			got := s.run(s.client, content(i, size), python, script, "client", address.Addr().String(), fmt.Sprint(address.Port()))
			s.wantText("answer", got, wantDigest(i, size))
		}
	}
}

// netcat is client and server. Each end of -N closes for writing when it has sent
// its input, and ends when the other has done so as well.
func netcat(s *stage) {
	address := s.digestServer(s.server, webPort)
	for i, size := range halfClosed() {
		got := s.run(s.client, content(i, size), "nc.openbsd", "-N", address.Addr().String(), fmt.Sprint(address.Port()))
		s.wantText("answer", got, wantDigest(i, size))

		const port = 8081
		var server errgroup.Group
		var arrived string
		server.Go(func() (err error) {
			// A listener ends with what comes in, whatever it still has to send.
			arrived, err = s.try(s.server, nil, "nc.openbsd", "-N", "-l", "0.0.0.0", fmt.Sprint(port))
			return err
		})
		// It takes one connection only, so nobody can try before whether it listens.
		for {
			_, err := s.try(s.client, content(i, size), "nc.openbsd", "-N", s.server.IPv4.String(), fmt.Sprint(port))
			if err == nil {
				break
			}
			if s.ctx.Err() != nil {
				s.must("connect", err)
			}
		}
		s.must("serve", server.Wait())
		s.want("to the listener", strings.NewReader(arrived), content(i, size))
	}
}

// sshForward passes a connection on by way of another pod; the end of its input
// becomes a half-close.
func sshForward(s *stage) {
	destination, options := s.sshServer()
	address := s.digestServer(s.proxy, webPort)
	for i, size := range halfClosed()[:8] {
		got := s.run(s.client, content(i, size), "ssh", append(options, "-W", address.String(), destination)...)
		s.wantText("answer", got, wantDigest(i, size))
	}
}

// http10 has no lengths: the end of a connection is the end of an answer.
func http10(s *stage) {
	s.makeShelf()
	address := s.serve(s.server, webPort, syscall.SIGTERM, python, "-m", "http.server", "--bind", "0.0.0.0",
		"--directory", s.dir+"/shelf", fmt.Sprint(webPort))
	for _, name := range []string{"small", "empty", "medium", "big", "byte"} {
		got := s.run(s.client, nil, "curl", "-sSf", "--noproxy", "*", "--http1.0", fmt.Sprintf("http://%s/%s", address, name))
		s.want("curl "+name, strings.NewReader(got), onShelf(name))
		// By hand, with a half-close behind the request.
		got = s.run(s.client, strings.NewReader("GET /"+name+" HTTP/1.0\r\n\r\n"), "nc.openbsd", "-N", address.Addr().String(), fmt.Sprint(webPort))
		_, body, _ := strings.Cut(got, "\r\n\r\n")
		s.want("nc "+name, bytes.NewReader([]byte(body)), onShelf(name))
	}
}

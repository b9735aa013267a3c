// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"net/netip"
	"syscall"
)

// Debian's Python, not one that comes first in a developer's PATH.
const python = "/usr/bin/python3"

// requestsClient keeps its connection, whose socket is in blocking mode.
const requestsClient = `
import hashlib, sys, requests

def digest(body):
    return "%d bytes, sha256 %s" % (len(body), hashlib.sha256(body).hexdigest())

url, shelf = sys.argv[1:3]
with requests.Session() as session:
    session.trust_env = False
    for name in sys.argv[3:]:
        answer = session.get(url + "/" + name)
        answer.raise_for_status()
        print("GET %s: %s" % (name, digest(answer.content)))
        with open(shelf + "/" + name, "rb") as file:
            answer = session.put(url + "/" + name, data=file.read())
        answer.raise_for_status()
        print("PUT %s: %s" % (name, answer.text))
`

// aiohttpClient has several requests under way at once.
const aiohttpClient = `
import asyncio, hashlib, sys, aiohttp

def digest(body):
    return "%d bytes, sha256 %s" % (len(body), hashlib.sha256(body).hexdigest())

async def exchange(session, limit, url, shelf, name):
    async with limit:
        async with session.get(url + "/" + name) as answer:
            answer.raise_for_status()
            got = digest(await answer.read())
        with open(shelf + "/" + name, "rb") as file:
            async with session.put(url + "/" + name, data=file.read()) as answer:
                answer.raise_for_status()
                return "GET %s: %s\nPUT %s: %s" % (name, got, name, await answer.text())

async def main(url, shelf, names):
    limit = asyncio.Semaphore(4)
    async with aiohttp.ClientSession() as session:
        for lines in await asyncio.gather(*(exchange(session, limit, url, shelf, name) for name in names)):
            print(lines)

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
`

// wsgi is the exchange's server; gunicorn sends files by sendfile.
const wsgi = `
import hashlib, os

def application(environ, start_response):
    if environ["REQUEST_METHOD"] == "PUT":
        body = environ["wsgi.input"].read()
        answer = ("%d bytes, sha256 %s" % (len(body), hashlib.sha256(body).hexdigest())).encode()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]
    path = os.path.join("shelf", os.path.basename(environ["PATH_INFO"]))
    size = os.path.getsize(path)
    start_response("200 OK", [("Content-Length", str(size))])
    if not size: # gunicorn's threads fail to send an empty file
        return []
    return environ["wsgi.file_wrapper"](open(path, "rb"))
`

// pythonClients runs both clients; the shelf has to be there.
func (s *stage) pythonClients(address netip.AddrPort) {
	s.Helper()
	s.exchange(s.client, address, python, s.script("by-requests.py", requestsClient))
	s.exchange(s.client, address, python, s.script("by-aiohttp.py", aiohttpClient))
}

func pythonAndGo(s *stage) {
	s.makeShelf()
	s.pythonClients(s.exchangeServer(s.server))
}

// gunicornSync has workers that serve one connection after the other and close each.
func gunicornSync(s *stage) { s.gunicorn("sync") }

// gunicornThreads keeps connections.
func gunicornThreads(s *stage) { s.gunicorn("gthread", "--threads", "4", "--keep-alive", "60") }

func (s *stage) gunicorn(class string, options ...string) {
	s.makeShelf()
	s.script("wsgi.py", wsgi)
	// A worker that is stuck is not to be replaced before the clients see it.
	args := append([]string{
		"-B", "/usr/bin/gunicorn", "--bind", fmt.Sprintf("0.0.0.0:%d", webPort), "--worker-class", class, "--workers", "2",
		"--worker-tmp-dir", s.dir, "--timeout", "600", "--graceful-timeout", "1", "wsgi:application",
	}, options...)
	address := s.serve(s.server, webPort, syscall.SIGTERM, python, args...)
	s.pythonClients(address)
	s.exchangeByGo(s.client, address)
}

// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// An exchange is what the web servers and clients of several languages are tried
// with: the files of a shelf by GET, and the digest of whatever is PUT.

// blocking is why programs stay on TCP that read from sockets in blocking mode.
const (
	blocking = "blocking"
	// blockingClient is for clients that begin with such a connection, which their pod
	// and the port are then known for: accepted, their other connections are quick.
	blockingClient = "a blocking client"
)

// languages are programs that make such exchanges.
func languages() []program {
	interpreter, gunicorn, java := version(python, "--version"), version("gunicorn", "--version"), version("java", "-version")
	return []program{
		{name: "Python and Go", version: interpreter, run: pythonAndGo},
		{name: "gunicorn, sync", version: gunicorn, run: gunicornSync, stays: blocking},
		{name: "gunicorn, threads", version: gunicorn, run: gunicornThreads, stays: blocking},
		{name: "PHP-FPM and MariaDB", version: version("php-fpm8.2", "--version"), run: phpAndMariaDB, hazards: asksBeforeReading(), pod: "proxy", annotations: optedOut, reason: notOptedIn, stays: blocking},
		{name: "Puma", version: version("puma", "--version"), run: puma},
		{name: "Java, HTTP", version: java, run: javaHTTP, stays: blocking},
		{name: "Java, records", version: java, run: javaRecords, hazards: asksBeforeReading(), pod: "server", annotations: exclude(recordsPort), reason: excluded, stays: blocking},
		{name: "Node.js", version: version("/usr/bin/node", "--version"), run: nodeJS},
	}
}

// shelf is what is exchanged: the files' sizes, which are their seeds as well.
func shelf() map[string]int64 {
	return map[string]int64{"empty": 0, "byte": 1, "small": small, "medium": medium, "big": 1 << 20}
}

// exchanged are the files in the order in which clients get and put them: enough
// for a connection to earn the shortcut.
func exchanged() []string {
	return strings.Fields(strings.Repeat("small byte small empty small medium small small big small small medium empty byte small ", 2))
}

func onShelf(name string) io.Reader {
	size := shelf()[name]
	return content(int(size%1000), size)
}

// makeShelf makes the files in a directory of the account's, and returns its path.
func (s *stage) makeShelf() string {
	s.Helper()
	dir := s.mkdir("shelf")
	for name := range shelf() {
		s.file("shelf/"+name, onShelf(name))
	}
	return dir
}

// exchange runs a client whose last arguments are to be the server's URL, the
// shelf and the files to exchange. It has to print what it got, a line for each
// GET and each PUT.
func (s *stage) exchange(p *sandbox.Pod, address netip.AddrPort, name string, args ...string) {
	s.Helper()
	args = append(args, fmt.Sprintf("http://%s", address), filepath.Join(s.dir, "shelf"))
	got := s.run(p, nil, name, append(args, exchanged()...)...)
	var want strings.Builder
	for _, file := range exchanged() {
		d, err := digest(onShelf(file))
		s.must("digest", err)
		fmt.Fprintf(&want, "GET %s: %s\nPUT %[1]s: %[2]s\n", file, d)
	}
	s.wantText("exchange by "+name, got, want.String())
}

// exchangeByGo is exchange with Go's own client.
func (s *stage) exchangeByGo(p *sandbox.Pod, address netip.AddrPort) {
	s.Helper()
	c := s.httpClient(p)
	for _, file := range exchanged() {
		d, err := digest(onShelf(file))
		s.must("digest", err)
		s.request(c, http.MethodGet, address, "/"+file, nil, onShelf(file))
		s.request(c, http.MethodPut, address, "/"+file, onShelf(file), strings.NewReader(d))
	}
}

// exchangeServer is the exchange's server in Go.
func (s *stage) exchangeServer(p *sandbox.Pod) netip.AddrPort {
	s.Helper()
	return s.httpServer(p, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			d, err := digest(r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			fmt.Fprint(w, d)
			return
		}
		f, err := os.Open(filepath.Join(s.dir, "shelf", path.Base(r.URL.Path)))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		defer f.Close()
		_, _ = io.Copy(w, f) // the client sees where it ends
	})
}

// wantText compares a text that a program prints, says where the two part, and
// counts it as an answer.
func (s *stage) wantText(what, got, want string) {
	s.Helper()
	if got != want {
		same := 0
		for same < min(len(got), len(want)) && got[same] == want[same] {
			same++
		}
		s.Fatalf("%s: got %d bytes, want %d; after %.200q\ngot  %.400q\nwant %.400q", what, len(got), len(want),
			tail([]byte(got[:same])), got[same:], want[same:])
	}
	s.answer("%s: %s", what, got)
}

// script is a file that an interpreter runs.
func (s *stage) script(name, text string) string {
	s.Helper()
	return s.file(name, strings.NewReader(strings.TrimLeft(text, "\n")))
}

// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
)

// frontends are further programs that stand in front of web servers, or send
// requests to them.
func frontends() []program {
	return []program{
		{name: "Varnish and nginx", version: version("varnishd", "-V"), run: varnish, hazards: asksBeforeReading(), pod: "proxy", annotations: optedOut, reason: notOptedIn, stays: blocking},
		{name: "curl", version: version("curl", "--version"), run: curl},
	}
}

func varnish(s *stage) {
	const port = 8081
	origin := s.nginx(s.server, "on", "")
	// It compiles its configuration, for which a small compiler is enough.
	address := s.serve(s.proxy, port, syscall.SIGTERM, "varnishd", "-F", "-j", "none", "-n", filepath.Join(s.dir, "varnish"), "-T", "none",
		"-a", fmt.Sprintf("0.0.0.0:%d", port), "-b", origin.String(), "-s", "malloc,64m", "-p", "cc_command=exec tcc -shared -o %o %s")
	c := s.httpClient(s.client)
	for range 2 { // the second time from its memory
		s.get(c, address, "/small", 1, small)
		s.get(c, address, "/large", 1, large)
		s.get(c, address, "/medium", 1, medium)
	}
	s.nginxPuts(address)
}

// curl keeps a connection for all the URLs of a run.
func curl(s *stage) {
	s.makeShelf()
	address := s.exchangeServer(s.server)
	url := func(name string) string { return fmt.Sprintf("http://%s/%s", address, name) }
	run := func(args ...string) string {
		return s.run(s.client, nil, "curl", append([]string{"-sSf", "--noproxy", "*"}, args...)...)
	}
	for range 2 {
		var urls, want []string
		for _, name := range exchanged() {
			d, err := digest(onShelf(name))
			s.must("digest", err)
			urls, want = append(urls, "-T", filepath.Join(s.dir, "shelf", name), url(name)), append(want, d)
		}
		s.wantText("curl -T", run(urls...), strings.Join(want, ""))
	}
	for _, options := range [][]string{{}, {"--http1.0"}, {"--http1.0", "--limit-rate", "4M"}, {"--no-keepalive"}, {"--tcp-fastopen"}} {
		for _, name := range []string{"small", "big", "empty", "byte", "medium"} {
			s.want("curl "+strings.Join(options, " ")+" "+name, strings.NewReader(run(append(options, url(name))...)), onShelf(name))
		}
	}
	// It waits for leave to send.
	d, err := digest(onShelf("big"))
	s.must("digest", err)
	s.wantText("curl, Expect", run("-H", "Expect: 100-continue", "--expect100-timeout", "100", "-X", http.MethodPut,
		"--data-binary", "@"+filepath.Join(s.dir, "shelf", "big"), url("big")), d)
}

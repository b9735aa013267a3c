// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

// encrypted are programs whose TLS may be the kernel's.
func encrypted() []program {
	openssl := version("openssl", "version")
	return []program{
		{name: "nginx, TLS", version: version("nginx", "-v"), run: func(s *stage) { s.nginxTLS("") }},
		{name: "nginx, kTLS", version: version("nginx", "-v"), run: func(s *stage) { s.nginxTLS("ssl_conf_command Options KTLS;") }, stays: "kTLS"},
		{name: "openssl, kTLS", version: openssl, run: opensslKTLS, stays: blocking},
	}
}

// certificate makes one for the server's pod, which is its own authority.
func (s *stage) certificate() (certificate, key string) {
	s.Helper()
	certificate, key = filepath.Join(s.dir, "certificate.pem"), filepath.Join(s.dir, "key.pem")
	conf := s.script("request.conf", `
[req]
distinguished_name = name
[name]
`)
	s.run(s.server, nil, "openssl", "req", "-x509", "-config", conf, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
		"-subj", "/CN=server", "-addext", "subjectAltName=IP:"+s.server.IPv4.String(), "-days", "3650", "-keyout", key, "-out", certificate)
	return certificate, key
}

// kernelTLS counts the connections of a pod that have been set up for kTLS, which is
// none where the kernel has it not.
func (s *stage) kernelTLS(p *sandbox.Pod) (count int) {
	s.Helper()
	var text []byte
	s.must("read TLS counters", p.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/tls_stat")
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}))
	for line := range strings.Lines(string(text)) {
		var n int
		for _, name := range []string{"TlsTxSw", "TlsRxSw"} {
			if _, err := fmt.Sscanf(line, name+" %d", &n); err == nil {
				count += n
			}
		}
	}
	return count
}

// tlsClient trusts the server's certificate.
func (s *stage) tlsClient(certificate string) *http.Client {
	s.Helper()
	pem, err := os.ReadFile(certificate)
	s.must("read certificate", err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	c := s.httpClient(s.client)
	c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: pool}
	return c
}

// nginxTLS sends files, which with kTLS it does by sendfile, and receives them.
func (s *stage) nginxTLS(options string) {
	const port = 8443
	certificate, key := s.certificate()
	s.nginx(s.server, "on", fmt.Sprintf(`
	server {
		listen %d ssl;
		ssl_certificate %s;
		ssl_certificate_key %s;
		%s
		location / { dav_methods PUT; }
	}
`, port, certificate, key, options))
	address := s.listening(s.server, port)
	url := "https://" + address.String()

	for range 3 { // each has connections of its own
		c := s.tlsClient(certificate)
		for i, name := range []string{"small", "large", "medium", "small"} {
			size := map[string]int64{"small": small, "medium": medium, "large": large}[name]
			s.requestURL(c, http.MethodGet, url, "/"+name, nil, content(1, size))
			path := fmt.Sprint("/put-", i)
			s.requestURL(c, http.MethodPut, url, path, bytes.NewReader(contentBytes(i, size)), strings.NewReader(""))
			s.requestURL(c, http.MethodGet, url, path, nil, content(i, size))
		}
		c.CloseIdleConnections()
	}
	for _, name := range []string{"small", "medium", "large"} {
		size := map[string]int64{"small": small, "medium": medium, "large": large}[name]
		got := s.run(s.client, nil, "curl", "-sSf", "--noproxy", "*", "--cacert", certificate, url+"/"+name, url+"/"+name)
		s.want("curl "+name, strings.NewReader(got), io.MultiReader(content(1, size), content(1, size)))
	}
	s.Logf("set up for kTLS in the server's pod: %d", s.kernelTLS(s.server))
}

// opensslKTLS has kTLS at both ends, whose sockets are in blocking mode.
func opensslKTLS(s *stage) {
	const port = 4433
	certificate, key := s.certificate()
	s.script("page", "podshunt\n")
	conf := s.script("openssl.conf", `
openssl_conf = all
[all]
ssl_conf = ssl
[ssl]
system_default = defaults
[defaults]
Options = KTLS
`)
	address := s.serve(s.server, port, syscall.SIGTERM, "env", "OPENSSL_CONF="+conf, "openssl", "s_server", "-quiet", "-WWW",
		"-accept", fmt.Sprintf("0.0.0.0:%d", port), "-cert", certificate, "-key", key)
	s.file("body", content(3, 1<<20))
	for _, name := range []string{"page", "body", "page", "body"} {
		// -ign_eof: it reads to the end of the answer, though its input has ended.
		got := s.run(s.client, strings.NewReader("GET /"+name+" HTTP/1.0\r\n\r\n"), "env", "OPENSSL_CONF="+conf, "openssl", "s_client",
			"-quiet", "-ign_eof", "-CAfile", certificate, "-verify_return_error", "-connect", address.String())
		_, body, _ := strings.Cut(got, "\r\n\r\n")
		want := io.Reader(strings.NewReader("podshunt\n"))
		if name == "body" {
			want = content(3, 1<<20)
		}
		s.want("s_client "+name, strings.NewReader(body), want)
	}
	s.Logf("set up for kTLS in the server's pod: %d, in the client's: %d", s.kernelTLS(s.server), s.kernelTLS(s.client))
}

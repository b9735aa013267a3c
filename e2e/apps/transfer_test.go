// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

func iperf3(s *stage) {
	address := s.serve(s.server, 5201, syscall.SIGTERM, "iperf3", "-s")
	for _, options := range []string{"-n 64M", "-n 64M -R", "-n 64M -P 4", "-n 4M -l 1k", "-n 4M -l 1k -R", "-t 1 --bidir"} {
		out := s.run(s.client, nil, "iperf3", append(strings.Fields(options), "-J", "-c", address.Addr().String())...)
		var report struct {
			Error string
			End   struct {
				Sent     struct{ Bytes int64 } `json:"sum_sent"`
				Received struct{ Bytes int64 } `json:"sum_received"`
			}
		}
		s.must("read the report of iperf3", json.Unmarshal([]byte(out), &report))
		if report.Error != "" || report.End.Sent.Bytes == 0 || report.End.Received.Bytes == 0 {
			s.Fatalf("iperf3 %s: %+v", options, report)
		}
		s.answer("iperf3 %s: no error", options)
	}
}

// sshServer starts one, and returns the options for a client's user@host.
func (s *stage) sshServer() (destination string, options []string) {
	s.Helper()
	const port = 2222
	for _, key := range []string{"host", "user"} {
		s.run(s.client, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(s.dir, key))
	}
	hostKey, err := os.ReadFile(filepath.Join(s.dir, "host.pub"))
	s.must("read key", err)
	known := s.file("known_hosts", strings.NewReader(fmt.Sprintf("[%s]:%d %s", s.server.IPv4, port, hostKey)))
	// It wants its own absolute path, to start itself anew for each connection.
	sshd, err := exec.LookPath("sshd")
	s.must("find sshd", err)
	conf := s.file("sshd_config", strings.NewReader(fmt.Sprintf(`
Port %d
HostKey %s/host
AuthorizedKeysFile %[2]s/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp
SetEnv PATH=%s
`, port, s.dir, os.Getenv("PATH"))))
	s.serve(s.server, port, syscall.SIGTERM, sshd, "-D", "-e", "-f", conf)
	return accountName + "@" + s.server.IPv4.String(), []string{
		"-F", "none", "-i", filepath.Join(s.dir, "user"), "-o", fmt.Sprint("Port=", port), "-o", "IdentitiesOnly=yes",
		"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=" + known,
	}
}

func openssh(s *stage) {
	const size = 2 << 20 // it is all encrypted
	destination, options := s.sshServer()
	ssh := func(stdin io.Reader, command string) string {
		return s.run(s.client, stdin, "ssh", append(options, destination, command)...)
	}
	for i := range 2 {
		s.answer("%s", ssh(nil, fmt.Sprint("echo echo ", i)))
	}
	s.answer("%s", ssh(content(1, size), "sha256sum"))
	s.want("tee", strings.NewReader(ssh(content(2, size), "tee /dev/null")), content(2, size))

	from := s.file("from", content(3, size))
	there, to := filepath.Join(s.dir, "there"), filepath.Join(s.dir, "to")
	s.run(s.client, nil, "scp", append(options, from, destination+":"+there)...)
	s.run(s.client, nil, "scp", append(options, destination+":"+there, to)...)
	s.wantFile(to, content(3, size))
}

func rsync(s *stage) {
	tree := s.mkdir("tree")
	size := func(i int) int64 { return int64(i * i * i * 4) }
	for i := range 60 {
		s.file(fmt.Sprint("tree/", i), content(i, size(i)))
	}
	destination, options := s.sshServer()
	conf := s.file("rsyncd.conf", bytes.NewReader(fmt.Appendf(nil, `
port = 8730
use chroot = no
reverse lookup = no
pid file = %s/rsyncd.pid
log file = /dev/stderr
[data]
	path = %[1]s
	read only = no
`, s.dir)))
	s.serve(s.server, 8730, syscall.SIGTERM, "rsync", "--daemon", "--no-detach", "--config="+conf)

	for i, there := range [][]string{
		{"-e", "ssh " + strings.Join(options, " "), destination + ":" + s.dir},
		{fmt.Sprintf("rsync://%s:8730/data", s.server.IPv4)},
	} {
		pulled := fmt.Sprint("pulled-", i)
		how, pushed := there[:len(there)-1], fmt.Sprintf("%s/pushed-%d/", there[len(there)-1], i)
		s.run(s.client, nil, "rsync", append([]string{"-a", tree + "/", pushed}, how...)...)
		s.run(s.client, nil, "rsync", append([]string{"-a", pushed, filepath.Join(s.dir, pulled)}, how...)...)
		for i := range 60 {
			s.wantFile(filepath.Join(s.dir, pulled, fmt.Sprint(i)), content(i, size(i)))
		}
	}
}

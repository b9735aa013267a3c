// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// restrictKey matches what pg_dump makes up for each dump.
var restrictKey = regexp.MustCompile(`(?m)^\\(un)?restrict .*\n`)

func postgres(s *stage) {
	data := s.mkdir("data")
	s.run(s.server, nil, "initdb", "-D", data, "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
	hba := s.file("hba.conf", strings.NewReader("host all all all trust\n"))
	address := s.serve(s.server, 5432, syscall.SIGINT, "postgres", "-D", data, "-F", "-k", s.dir,
		"-c", "listen_addresses=*", "-c", "hba_file="+hba)
	at := []string{"-h", address.Addr().String(), "-U", accountName}
	// The port is open before the server has recovered.
	for ready := false; !ready; {
		_, err := s.try(s.client, nil, "pg_isready", at...)
		if ready = err == nil; !ready && s.ctx.Err() != nil {
			s.must("wait for the server", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	psql := func(database, sql string, stdin string) string {
		args := append([]string{"-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database}, at...)
		if sql != "" {
			args = append(args, "-c", sql)
		}
		return s.run(s.client, strings.NewReader(stdin), "psql", args...)
	}
	for _, database := range []string{"bench", "restored"} {
		psql("postgres", "create database "+database, "")
	}
	s.run(s.client, nil, "pgbench", append(at, "-i", "-q", "bench")...)
	for _, mode := range []string{"simple", "extended", "prepared"} {
		s.run(s.client, nil, "pgbench", append(at, "-c", "4", "-j", "2", "-t", "25", "-M", mode, "bench")...)
	}
	s.answer("pgbench: transactions|sums agree: %s", psql("bench", `
		select (select count(*) from pgbench_history),
			(select sum(delta) from pgbench_history) = all (array[
				(select sum(abalance) from pgbench_accounts),
				(select sum(tbalance) from pgbench_tellers),
				(select sum(bbalance) from pgbench_branches)])`, ""))

	dump := func(database string) string {
		return restrictKey.ReplaceAllString(s.run(s.client, nil, "pg_dump", append(at, database)...), "")
	}
	bench := dump("bench")
	psql("restored", "", bench)
	if restored := dump("restored"); restored != bench || !strings.Contains(bench, "COPY public.pgbench_accounts") {
		s.Fatalf("dump of %d bytes; that of the restored database has %d and differs: %v", len(bench), len(restored), restored != bench)
	}

	var series strings.Builder
	for i := range 100000 {
		fmt.Fprintln(&series, i+1)
	}
	s.want("query", strings.NewReader(psql("bench", "select generate_series(1, 100000)", "")), strings.NewReader(series.String()))
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/podshunt/podshunt/e2e/apps/overlay"
)

func databases() []program { return []program{postgres(), mariadb()} }

func postgres() program {
	at := func(in instance) []string {
		host := in.host()
		if in.variant == unixSocket {
			host = in.dir
		}
		return []string{"-h", host, "-p", strconv.Itoa(int(in.ports[0])), "-U", overlay.AccountName}
	}
	selects := func(clients int, quick bool) workload {
		return workload{
			name: fmt.Sprintf("PostgreSQL pgbench, select, %s", plural(clients, "client")), quick: quick,
			client: func(in instance, a amount) []string {
				return append(append([]string{"pgbench"}, at(in)...), "-n", "-S", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", "1",
					"-T", strconv.Itoa(a.seconds), "-l", "--log-prefix="+filepath.Join(in.dir, "pgbench"), "bench")
			},
			read: func(in instance, out string) (reading, error) {
				logs, err := filepath.Glob(filepath.Join(in.dir, "pgbench.*"))
				if err != nil || len(logs) != 1 {
					return reading{}, fmt.Errorf("pgbench has left logs %q, want one: %w", logs, err)
				}
				log, err := os.ReadFile(logs[0])
				if err != nil {
					return reading{}, err
				}
				if err := os.Remove(logs[0]); err != nil { // the next run has another
					return reading{}, err
				}
				return parsePgbench(out, string(log))
			},
		}
	}
	return program{
		name: "PostgreSQL", version: []string{"postgres", "--version"}, needs: []string{"postgres", "initdb", "pgbench", "pg_isready", "psql"}, hasSocket: true,
		fill: func(in *instance) error {
			if err := in.file("hba.conf", []byte("local all all trust\nhost all all all trust\n")); err != nil {
				return err
			}
			_, err := in.run(server, nil, "initdb", "-D", filepath.Join(in.dir, "data"), "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
			return err
		},
		servers: func(in instance) []process {
			return []process{{
				side: server, port: in.ports[0], end: syscall.SIGINT, socket: filepath.Join(in.dir, fmt.Sprintf(".s.PGSQL.%d", in.ports[0])),
				command: []string{
					"postgres", "-D", filepath.Join(in.dir, "data"), "-F", "-k", in.dir, "-p", strconv.Itoa(int(in.ports[0])),
					"-c", "listen_addresses=*", "-c", "hba_file=" + filepath.Join(in.dir, "hba.conf"),
				},
				ready: func(ctx context.Context, in instance) error {
					// The port is open before the server has recovered.
					for {
						_, err := in.run(client, nil, append([]string{"pg_isready", "-q"}, at(in)...)...)
						if err == nil || ctx.Err() != nil {
							return err
						}
						time.Sleep(20 * time.Millisecond)
					}
				},
			}}
		},
		begin: func(in *instance) error {
			if _, err := in.run(client, nil, append(append([]string{"psql"}, at(*in)...), "-q", "-d", "postgres", "-c", "create database bench")...); err != nil {
				return err
			}
			_, err := in.run(client, nil, append(append([]string{"pgbench"}, at(*in)...), "-i", "-q", "bench")...)
			return err
		},
		workloads: []workload{selects(1, false), selects(16, true)},
	}
}

func mariadb() program {
	options := func(in instance) []string {
		return []string{"--no-defaults", "--datadir=" + filepath.Join(in.dir, "data"), "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=4M"}
	}
	sysbench := func(in instance, more ...string) []string {
		command := []string{"sysbench", "--db-driver=mysql", "--mysql-user=podshunt", "--mysql-password=podshunt", "--mysql-db=bench", "--tables=1", "--table-size=10000"}
		if in.variant == unixSocket {
			command = append(command, "--mysql-socket="+in.socket)
		} else {
			command = append(command, "--mysql-host="+in.host(), "--mysql-port="+in.port())
		}
		return append(command, more...)
	}
	selects := func(threads int, quick bool) workload {
		return workload{
			name: fmt.Sprintf("MariaDB sysbench, point select, %s", plural(threads, "thread")), quick: quick,
			client: func(in instance, a amount) []string {
				return sysbench(in, "--threads="+strconv.Itoa(threads), "--time="+strconv.Itoa(a.seconds), "--histogram=on", "--rand-seed=1", "oltp_point_select", "run")
			},
			read: func(_ instance, out string) (reading, error) { return parseSysbench(out) },
		}
	}
	return program{
		name: "MariaDB", version: []string{"mariadbd", "--version"}, needs: []string{"mariadbd", "sysbench"}, hasSocket: true,
		fill: func(in *instance) error {
			if err := in.file("data/.keep", nil); err != nil {
				return err
			}
			users := "create database bench;\ncreate user podshunt@'%' identified by 'podshunt';\ncreate user podshunt@localhost identified by 'podshunt';\n" +
				"grant all on *.* to podshunt@'%';\ngrant all on *.* to podshunt@localhost;\n"
			// What mariadb-install-db does, less its time zones and help texts.
			tables := "create database mysql;\nuse mysql;\nset @auth_root_socket=NULL;\n"
			for _, name := range []string{"mysql_system_tables.sql", "mysql_system_tables_data.sql"} {
				text, err := os.ReadFile("/usr/share/mysql/" + name)
				if err != nil {
					return err
				}
				tables += string(text)
			}
			if err := in.file("users.sql", []byte(users)); err != nil {
				return err
			}
			_, err := in.run(server, strings.NewReader(tables), append([]string{"mariadbd"}, append(options(*in), "--bootstrap")...)...)
			return err
		},
		servers: func(in instance) []process {
			command := append([]string{"mariadbd"}, options(in)...)
			command = append(command, "--bind-address=0.0.0.0", "--port="+strconv.Itoa(int(in.ports[0])), "--socket="+in.socket,
				"--pid-file="+filepath.Join(in.dir, "server.pid"), "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0")
			users := filepath.Join(in.dir, "users.sql")
			if _, err := os.Stat(users); err == nil { // begin removes it
				command = append(command, "--init-file="+users)
			}
			return []process{{side: server, port: in.ports[0], socket: in.socket, command: command}}
		},
		begin: func(in *instance) error {
			if _, err := in.run(client, nil, sysbench(*in, "oltp_point_select", "prepare")...); err != nil {
				return err
			}
			return os.Remove(filepath.Join(in.dir, "users.sql"))
		},
		workloads: []workload{selects(1, false), selects(4, true)},
	}
}

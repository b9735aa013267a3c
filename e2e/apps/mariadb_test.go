// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"github.com/podshunt/podshunt/e2e/sandbox"
)

func databases() []program {
	return []program{{name: "MariaDB", version: version("mariadbd", "--version"), run: mariadb, stays: blocking}}
}

// mariadbServer has the databases bench and restored, of the user podshunt with
// the same password. At is how a client of MariaDB's gets there.
func (s *stage) mariadbServer(p *sandbox.Pod) (address netip.AddrPort, at []string) {
	s.Helper()
	data := s.mkdir("mariadb")
	// What mariadb-install-db does, less its time zones and help texts.
	tables := "create database mysql;\nuse mysql;\nset @auth_root_socket=NULL;\n"
	for _, name := range []string{"mysql_system_tables.sql", "mysql_system_tables_data.sql"} {
		text, err := os.ReadFile("/usr/share/mysql/" + name)
		s.must("read the system's tables", err)
		tables += string(text)
	}
	options := []string{"--no-defaults", "--datadir=" + data, "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=4M"}
	s.run(p, strings.NewReader(tables), "mariadbd", append(options, "--bootstrap")...)
	users := s.script("users.sql", `
create database bench;
create database restored;
create user podshunt@'%' identified by 'podshunt';
grant all on *.* to podshunt@'%';
`)
	address = s.serve(p, 3306, syscall.SIGTERM, "mariadbd", append(options, "--init-file="+users, "--bind-address=0.0.0.0", "--port=3306",
		"--socket=server.sock", "--pid-file=server.pid", "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0")...)
	return address, []string{"--no-defaults", "--host=" + address.Addr().String(), "--user=podshunt", "--password=podshunt"}
}

// mysqlScript is for both of Python's modules: one is Python alone and reads from
// a socket in blocking mode, one is libmariadb.
const mysqlScript = `
import hashlib, importlib, sys

module, host = sys.argv[1:3]
driver = importlib.import_module(module)
connection = driver.connect(host=host, port=3306, user="podshunt", password="podshunt", database="bench", charset="utf8mb4")
cursor = connection.cursor()
table = "blobs_" + module.lower()
cursor.execute("create table " + table + " (id int primary key, body longblob, sum char(64))")

def body(i):
    size = i * i * 37 if i % 20 else 400000 + i
    return hashlib.sha256(b"%d" % i).digest() * (size // 32 + 1)

for i in range(60):
    cursor.execute("insert into " + table + " values (%s, %s, %s)", (i, body(i), hashlib.sha256(body(i)).hexdigest()))
    connection.commit()
    cursor.execute("select body, sum from " + table + " where id = %s", (i,))
    got, sum = cursor.fetchone()
    if got != body(i) or hashlib.sha256(got).hexdigest() != sum:
        sys.exit("row %d: got %d bytes that differ" % (i, len(got)))
cursor.execute("select count(*), sum(length(body)), bit_xor(crc32(body)) from " + table)
print("%s: %s" % (module, cursor.fetchone()))
cursor.execute("select id, body from " + table + " order by id")
print("all: %s" % hashlib.sha256(b"".join(b"%d %s" % row for row in cursor.fetchall())).hexdigest())
try:
    cursor.execute("select nothing")
except driver.Error as error:
    print("error: %s" % error.args[0])
connection.close()
`

func mariadb(s *stage) {
	address, at := s.mariadbServer(s.server)
	mysql := func(database, sql string, stdin string) string {
		args := append(append([]string{}, at...), "--batch", "--skip-column-names", database)
		if sql != "" {
			args = append(args, "--execute="+sql)
		}
		return s.run(s.client, strings.NewReader(stdin), "mariadb", args...)
	}
	s.wantText("mariadb", mysql("bench", "select 6 * 7; select upper('podshunt')", ""), "42\nPODSHUNT\n")

	sysbench := func(test, command string) string {
		return s.run(s.client, nil, "sysbench", "--db-driver=mysql", "--mysql-host="+address.Addr().String(), "--mysql-user=podshunt",
			"--mysql-password=podshunt", "--mysql-db=bench", "--tables=2", "--table-size=300", "--threads=4", "--time=0", "--events=100",
			"--rand-seed=1", test, command)
	}
	sysbench("oltp_read_write", "prepare")
	for _, test := range []string{"oltp_point_select", "oltp_read_only", "oltp_read_write"} {
		out := sysbench(test, "run")
		if !strings.Contains(out, "total number of events:              100") || !strings.Contains(out, "reconnects:                          0 ") {
			s.Fatalf("sysbench %s: %s", test, out)
		}
		s.answer("sysbench %s: 100 events", test)
	}

	script := s.script("mysql.py", mysqlScript)
	for _, module := range []string{"pymysql", "MySQLdb"} {
		s.answer("%s", s.run(s.client, nil, python, script, module, address.Addr().String()))
	}

	dump := func(database string) string {
		return s.run(s.client, nil, "mariadb-dump", append(append([]string{}, at...), "--skip-comments", "--skip-dump-date", database)...)
	}
	bench := dump("bench")
	mysql("restored", "", bench)
	if restored := dump("restored"); restored != bench || !strings.Contains(bench, "INSERT INTO `sbtest2`") {
		s.Fatalf("dump of %d bytes; that of the restored database has %d and differs: %v", len(bench), len(restored), restored != bench)
	}
	var series strings.Builder
	for i := range 20000 {
		fmt.Fprintln(&series, i+1)
	}
	s.want("query", strings.NewReader(mysql("bench", "select seq from seq_1_to_20000", "")), strings.NewReader(series.String()))
}

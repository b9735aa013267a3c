// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"syscall"
)

// phpScript is the exchange's server, which also keeps what is PUT in a database,
// where it takes what it hashes from. PHP's streams poll before they read from
// their sockets, which are in blocking mode.
const phpScript = `<?php
mysqli_report(MYSQLI_REPORT_ERROR | MYSQLI_REPORT_STRICT);
function digest($body) { return strlen($body) . " bytes, sha256 " . hash("sha256", $body); }
$name = basename($_SERVER["DOCUMENT_URI"]);
if ($_SERVER["REQUEST_METHOD"] !== "PUT") {
	echo file_get_contents($_SERVER["SHELF"] . "/" . $name);
	exit;
}
$database = new mysqli($_SERVER["DATABASE"], "podshunt", "podshunt", "bench", 3306);
$database->query("create table if not exists bodies (id int auto_increment primary key, name char(20), body longblob)");
$body = file_get_contents("php://input");
$insert = $database->prepare("insert into bodies (name, body) values (?, ?)");
$insert->bind_param("ss", $name, $body);
$insert->execute();
$id = $database->insert_id;
$select = $database->prepare("select name, body from bodies where id = ?");
$select->bind_param("i", $id);
$select->execute();
[$stored, $body] = $select->get_result()->fetch_row();
for ($i = 0; $i < 5; $i++) {
	$row = $database->query("select $i, length(body) from bodies where id = $id")->fetch_row();
	if ($stored !== $name || $row != [$i, strlen($body)]) {
		http_response_code(500);
		die("got $stored and " . json_encode($row));
	}
}
echo digest($body);
`

// phpAndMariaDB has nginx and the database in one pod and PHP in another, so that
// FastCGI and MySQL's protocol are both between pods.
func phpAndMariaDB(s *stage) {
	shelf := s.makeShelf()
	database, _ := s.mariadbServer(s.proxy)
	script := s.script("index.php", phpScript)
	conf := s.script("fpm.conf", fmt.Sprintf(`
[global]
error_log = %s/fpm.log
daemonize = no
[www]
listen = 0.0.0.0:9000
pm = static
pm.max_children = 3
catch_workers_output = yes
`, s.dir))
	fpm := s.serve(s.server, 9000, syscall.SIGTERM, "php-fpm8.2", "-n", "-F", "-y", conf,
		"-d", "extension=mysqlnd", "-d", "extension=mysqli", "-d", "post_max_size=0", "-d", "display_errors=stderr")
	s.nginx(s.proxy, "on", fmt.Sprintf(`
	server {
		listen 8081;
		location / {
			fastcgi_pass %s;
			fastcgi_param SCRIPT_FILENAME %s;
			fastcgi_param DOCUMENT_URI $document_uri;
			fastcgi_param REQUEST_METHOD $request_method;
			fastcgi_param CONTENT_LENGTH $content_length;
			fastcgi_param CONTENT_TYPE $content_type;
			fastcgi_param SHELF %s;
			fastcgi_param DATABASE %s;
		}
	}
`, fpm, script, shelf, database.Addr()))
	address := s.listening(s.proxy, 8081)
	s.exchangeByGo(s.client, address)
}

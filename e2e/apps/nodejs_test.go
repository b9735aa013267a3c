// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"syscall"
)

const nodeServer = `
const crypto = require("crypto"), fs = require("fs"), http = require("http"), path = require("path");

http.createServer((request, response) => {
	if (request.method !== "PUT") {
		fs.createReadStream(path.join("shelf", path.basename(request.url))).on("error", error => response.destroy(error)).pipe(response);
		return;
	}
	const hash = crypto.createHash("sha256");
	let size = 0;
	request.on("data", part => { size += part.length; hash.update(part); });
	request.on("end", () => response.end(size + " bytes, sha256 " + hash.digest("hex")));
}).listen(Number(process.argv[2]), "0.0.0.0");
`

const nodeClient = `
const crypto = require("crypto"), fs = require("fs"), http = require("http"), path = require("path");

const agent = new http.Agent({ keepAlive: true, maxSockets: 2 });

function request(method, url, body) {
	return new Promise((resolve, reject) => {
		const r = http.request(url, { agent, method }, response => {
			const parts = [];
			response.on("data", part => parts.push(part));
			response.on("error", reject);
			response.on("end", () => response.statusCode === 200 ? resolve(Buffer.concat(parts)) : reject(new Error(response.statusCode)));
		});
		r.on("error", reject);
		r.end(body);
	});
}

async function main(url, shelf, ...names) {
	// Two requests are under way at once.
	const lines = await Promise.all(names.map(async name => {
		const got = await request("GET", url + "/" + name);
		const put = await request("PUT", url + "/" + name, fs.readFileSync(path.join(shelf, name)));
		return "GET " + name + ": " + got.length + " bytes, sha256 " + crypto.createHash("sha256").update(got).digest("hex") +
			"\nPUT " + name + ": " + put;
	}));
	console.log(lines.join("\n"));
	agent.destroy();
}

main(...process.argv.slice(2)).catch(error => { console.error(error); process.exitCode = 1; });
`

func nodeJS(s *stage) {
	s.makeShelf()
	address := s.serve(s.server, webPort, syscall.SIGTERM, "/usr/bin/node", s.script("server.js", nodeServer), fmt.Sprint(webPort))
	s.exchange(s.client, address, "/usr/bin/node", s.script("client.js", nodeClient))
	s.exchangeByGo(s.client, address)
}

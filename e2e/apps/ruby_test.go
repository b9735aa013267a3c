// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"syscall"
)

const rackApp = `
require "digest"

run(lambda do |env|
  if env["REQUEST_METHOD"] == "PUT"
    body = env["rack.input"].read
    [200, {}, ["#{body.bytesize} bytes, sha256 #{Digest::SHA256.hexdigest(body)}"]]
  else
    [200, {}, [File.binread(File.join("shelf", File.basename(env["PATH_INFO"])))]]
  end
end)
`

// rubyClient keeps its connection. Ruby's sockets are in non-blocking mode, its
// reads wait by poll.
const rubyClient = `
require "digest"
require "net/http"

def digest(body)
  "#{body.bytesize} bytes, sha256 #{Digest::SHA256.hexdigest(body)}"
end

url, shelf, *names = ARGV
uri = URI(url)
Net::HTTP.start(uri.host, uri.port, nil) do |http|
  names.each do |name|
    answer = http.get("/" + name)
    answer.value
    puts "GET #{name}: #{digest(answer.body || "")}"
    answer = http.send_request("PUT", "/" + name, File.binread(File.join(shelf, name)))
    answer.value
    puts "PUT #{name}: #{answer.body}"
  end
end
`

func puma(s *stage) {
	s.makeShelf()
	address := s.serve(s.server, webPort, syscall.SIGTERM, "/usr/bin/ruby", "/usr/bin/puma", "--bind",
		fmt.Sprintf("tcp://0.0.0.0:%d", webPort), "--threads", "4:4", "--environment", "production", s.script("config.ru", rackApp))
	s.exchange(s.client, address, "/usr/bin/ruby", s.script("client.rb", rubyClient))
	s.exchangeByGo(s.client, address)
}

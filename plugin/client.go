// SPDX-License-Identifier: Apache-2.0

// The plugin's side of the agent's socket.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"time"

	"github.com/podshunt/podshunt/api"
)

// maxAnswer bounds an answer in bytes, far above what the agent sends.
const maxAnswer = 64 << 10

// tell sends message to the agent. One deadline covers everything, from the
// connect to the last byte of the answer. It returns nil only if the agent took
// the message; answer is filled in unless it is nil.
//
// It does without net/http: pods wait for every start of this program, and to
// initialise net/http with its cryptography would make it a third slower. The
// request is HTTP/1.0, whose answer is the plain bytes until the connection ends.
func tell(conf api.PluginConf, method, path string, message, answer any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(conf.AgentTimeout)
	conn, err := (&net.Dialer{Deadline: deadline}).Dial("unix", conf.AgentSocket)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, path, len(body), body); err != nil {
		return err
	}
	reader := textproto.NewReader(bufio.NewReader(io.LimitReader(conn, maxAnswer)))
	status, err := reader.ReadLine()
	if err != nil {
		return err
	}
	var minor, code int
	if _, err := fmt.Sscanf(status, "HTTP/1.%d %d", &minor, &code); err != nil || code < 200 || code > 299 {
		return fmt.Errorf("agent answered %q", status)
	}
	if _, err := reader.ReadMIMEHeader(); err != nil {
		return err
	}
	if answer == nil {
		return nil
	}
	return json.NewDecoder(reader.R).Decode(answer)
}

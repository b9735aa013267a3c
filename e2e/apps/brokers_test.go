// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
)

// brokers pass on messages, or keep what several clients agree on.
func brokers() []program {
	return []program{
		{name: "RabbitMQ", version: version("sh", "-c", "ls -d /usr/lib/rabbitmq/lib/rabbitmq_server-*"), run: rabbitMQ},
		{name: "mosquitto", version: version("mosquitto", "-h"), run: mosquitto, stays: blockingClient},
		{name: "NATS", version: version("nats-server", "--version"), run: natsServer},
		{name: "etcd", version: version("etcd", "--version"), run: etcd},
	}
}

// pikaScript publishes on one connection and consumes on another.
const pikaScript = `
import hashlib, sys, pika

def connect():
    return pika.BlockingConnection(pika.ConnectionParameters(host=sys.argv[1]))

def body(i):
    size = i * i * 11 if i % 15 else 300000 + i
    return hashlib.sha256(b"%d" % i).digest() * (size // 32 + 1)

publisher, consumer = connect(), connect()
to, there = publisher.channel(), consumer.channel()
to.confirm_delivery()
to.queue_declare("work", durable=True)
there.basic_qos(prefetch_count=5)
messages = there.consume("work", inactivity_timeout=100)
for i in range(60):
    # It returns when the broker has confirmed.
    to.basic_publish("", "work", body(i), mandatory=True)
    method, _, got = next(messages)
    if got != body(i):
        sys.exit("message %d: got %d bytes that differ" % (i, len(got or "")))
    there.basic_ack(method.delivery_tag)
# Many at once, unconfirmed, and all of them in order.
burst = publisher.channel()
for i in range(300):
    burst.basic_publish("", "work", b"%d" % i)
all = hashlib.sha256()
for i in range(300):
    method, _, got = next(messages)
    all.update(got)
    there.basic_ack(method.delivery_tag)
there.cancel()
print("burst: %s" % all.hexdigest())
print("left: %d" % to.queue_declare("work", passive=True).method.message_count)
consumer.close()
publisher.close()
`

func rabbitMQ(s *stage) {
	const port = 5672
	conf := s.script("rabbitmq.conf", fmt.Sprintf("listeners.tcp.default = %d\nloopback_users = none\n", port))
	for _, dir := range []string{"mnesia", "config"} {
		s.mkdir(dir)
	}
	// Erlang's port mapper would stay in the pod, if the broker started it.
	s.serve(s.server, 4369, syscall.SIGTERM, "epmd")
	address := s.serve(s.server, port, syscall.SIGTERM, "env", "RABBITMQ_NODENAME=rabbit@localhost", "RABBITMQ_CONFIG_FILE="+conf,
		"RABBITMQ_MNESIA_BASE="+filepath.Join(s.dir, "mnesia"), "RABBITMQ_GENERATED_CONFIG_DIR="+filepath.Join(s.dir, "config"),
		"RABBITMQ_LOG_BASE="+s.dir, "RABBITMQ_LOGS=-", "RABBITMQ_ENABLED_PLUGINS_FILE="+filepath.Join(s.dir, "plugins"),
		"RABBITMQ_PID_FILE="+filepath.Join(s.dir, "pid"),
		// It is started without a shell around it, which would not pass signals on.
		"RUNNING_UNDER_SYSTEMD=1", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
		"/usr/lib/rabbitmq/bin/rabbitmq-server")
	s.answer("%s", s.run(s.client, nil, python, s.script("by-pika.py", pikaScript), address.Addr().String()))
}

func mosquitto(s *stage) {
	const port, messages = 1883, 200
	conf := s.script("mosquitto.conf", fmt.Sprintf("listener %d 0.0.0.0\nallow_anonymous true\npersistence false\n", port))
	address := s.serve(s.server, port, syscall.SIGTERM, "mosquitto", "-c", conf)
	at := func(options ...string) []string {
		return append([]string{"-h", address.Addr().String(), "-p", fmt.Sprint(port), "-q", "1"}, options...)
	}
	// The broker keeps what a session that is known has not got yet.
	session := at("-c", "-i", "reader", "-t", "lines")
	s.run(s.proxy, nil, "mosquitto_sub", append(session, "-E")...)
	var lines strings.Builder
	for i := range messages {
		fmt.Fprintf(&lines, "%d %x\n", i, contentBytes(i, int64(i*i/4)))
	}
	var got string
	var reader errgroup.Group
	reader.Go(func() (err error) {
		got, err = s.try(s.proxy, nil, "mosquitto_sub", append(session, "-C", fmt.Sprint(messages))...)
		return err
	})
	_, err := s.try(s.client, strings.NewReader(lines.String()), "mosquitto_pub", at("-l", "-t", "lines")...)
	s.must("publish", errors.Join(err, reader.Wait()))
	s.wantText("lines", got, lines.String())

	s.run(s.client, nil, "mosquitto_pub", at("-r", "-t", "large", "-f", s.file("large", content(1, 1<<20)))...)
	s.want("retained", strings.NewReader(s.run(s.proxy, nil, "mosquitto_sub", at("-C", "1", "-N", "-t", "large")...)), content(1, 1<<20))
}

// podDialer connects NATS's client from a pod.
type podDialer func(address string) (net.Conn, error)

func (d podDialer) Dial(_, address string) (net.Conn, error) { return d(address) }

func natsServer(s *stage) {
	const port, messages = 4222, 2000
	address := s.serve(s.server, port, syscall.SIGTERM, "nats-server", "--addr", "0.0.0.0", "--port", fmt.Sprint(port))
	connect := func(dial func(string) (net.Conn, error)) *nats.Conn {
		c, err := nats.Connect("nats://"+address.String(), nats.SetCustomDialer(podDialer(dial)), nats.NoReconnect(), nats.Timeout(*programTimeout))
		s.must("connect", err)
		s.Cleanup(c.Close)
		return c
	}
	client := connect(func(a string) (net.Conn, error) { return s.dial(s.client, a) })
	service := connect(func(a string) (net.Conn, error) { return s.dial(s.proxy, a) })

	_, err := service.Subscribe("echo", func(m *nats.Msg) { _ = m.Respond(m.Data) }) // the other end misses it
	s.must("subscribe", err)
	s.must("subscribe", service.FlushWithContext(s.ctx))
	for i := range 150 {
		size := int64(i * i)
		if i%50 == 49 {
			size = 900 << 10
		}
		answer, err := client.RequestWithContext(s.ctx, "echo", contentBytes(i, size))
		s.must("request", err)
		s.want("echo", bytes.NewReader(answer.Data), content(i, size))
	}

	burst, err := service.SubscribeSync("burst")
	s.must("subscribe", err)
	s.must("subscribe", service.FlushWithContext(s.ctx))
	var sent, got strings.Builder
	for i := range messages {
		fmt.Fprintln(&sent, i)
		s.must("publish", client.Publish("burst", fmt.Appendln(nil, i)))
	}
	for range messages {
		m, err := burst.NextMsgWithContext(s.ctx)
		s.must("receive", err)
		got.Write(m.Data)
	}
	s.want("burst", strings.NewReader(got.String()), strings.NewReader(sent.String()))
}

func etcd(s *stage) {
	const port = 2379
	const peers = "http://127.0.0.1:2380"
	address := s.serve(s.server, port, syscall.SIGTERM, "etcd", "--data-dir", s.mkdir("etcd"), "--name", "one",
		"--listen-client-urls", fmt.Sprintf("http://0.0.0.0:%d", port),
		"--advertise-client-urls", fmt.Sprintf("http://%s:%d", s.server.IPv4, port),
		"--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", "one="+peers,
		// A machine that is busy elects none by the default.
		"--heartbeat-interval", "1000", "--election-timeout", "10000", "--initial-election-tick-advance=true")
	ctl := func(stdin string, args ...string) string {
		return s.run(s.client, strings.NewReader(stdin), "env", append([]string{
			"ETCDCTL_API=3", "etcdctl", "--endpoints=" + address.String(), "--dial-timeout=100s", "--command-timeout=100s",
		}, args...)...)
	}
	big := fmt.Sprintf("%x", contentBytes(1, 400<<10))
	s.wantText("put", ctl(big, "put", "big"), "OK\n")
	s.wantText("get", ctl("", "get", "big", "--print-value-only"), big+"\n")

	// By JSON over HTTP/1.1.
	c := s.httpClient(s.client)
	call := func(method string, request map[string]any) (answer struct {
		Kvs []struct {
			Key, Value []byte
			Version    string
		}
	},
	) {
		body, err := json.Marshal(request)
		s.must("make request", err)
		r, err := http.NewRequestWithContext(s.ctx, http.MethodPost, fmt.Sprintf("http://%s/v3/kv/%s", address, method), bytes.NewReader(body))
		s.must("make request", err)
		response, err := c.Do(r)
		s.must(method, err)
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		s.must(method, err)
		if response.StatusCode != http.StatusOK {
			s.Fatalf("%s: %s: %s", method, response.Status, text)
		}
		s.must("read answer", json.Unmarshal(text, &answer))
		return answer
	}
	encode := base64.StdEncoding.EncodeToString
	for i := range 40 {
		k, size := fmt.Sprint("key-", i), int64(i*i*50)
		call("put", map[string]any{"key": encode([]byte(k)), "value": encode(contentBytes(i, size))})
		got := call("range", map[string]any{"key": encode([]byte(k))})
		if len(got.Kvs) != 1 || string(got.Kvs[0].Key) != k {
			s.Fatalf("range %s: got %+v", k, got)
		}
		s.want(k, bytes.NewReader(got.Kvs[0].Value), content(i, size))
	}
	s.wantText("delete", ctl("", "del", "--prefix", "key-"), "40\n")
	s.wantText("transaction", ctl("mod(\"big\") > \"0\"\n\nput after 1\n\nput after 2\n\n", "txn"), "SUCCESS\n\nOK\n")
	s.wantText("get", ctl("", "get", "after"), "after\n1\n")
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"google.golang.org/grpc"

	"github.com/podshunt/podshunt/e2e/apps/overlay"
)

// program is a server, or one with a proxy before it.
type program struct {
	name string
	// version has a program say its own.
	version []string
	// needs are the executables.
	needs []string
	// hasSocket is true of a program that has a Unix socket, and a client for it.
	hasSocket bool
	// fill makes the server's files, once, in the directory of an instance.
	fill func(*instance) error
	// servers are started in this order. The last is the one that clients use.
	servers func(instance) []process
	// begin is called when the servers of an instance run for the first time.
	begin     func(*instance) error
	workloads []workload
}

// workload is what a client does: a line of the tables.
type workload struct {
	name string
	// quick workloads are those of -quick.
	quick bool
	// gbits is true when the rate is in Gbit/s.
	gbits bool
	// counted workloads end after a number of requests, not after a time.
	counted bool
	// before are commands of the client to run before.
	before func(instance) [][]string
	client func(instance, amount) []string
	// read makes figures of what the client has printed.
	read func(in instance, out string) (reading, error)
}

// amount is how much a client has to do.
type amount struct {
	seconds int
	// requests is for those who count.
	requests int
}

// reading is what a client says.
type reading struct {
	// requests is how many there were, rate how many in a second.
	requests, rate float64
	latency        latency
}

// latency has percentiles in microseconds; 0 is what the client does not say.
type latency struct{ p50, p99, p999 float64 }

// instance is a program that runs for a variant.
type instance struct {
	variant variant
	// dir is a directory of the account's.
	dir string
	// ports are for the first server and the second.
	ports [2]uint16
	// address is where clients connect to; the variant unixSocket has socket.
	address netip.AddrPort
	socket  string
	node    *node
	// run runs a command of the client's, or of the server's pod.
	run func(at side, stdin io.Reader, command ...string) (string, error)
}

// to is where clients connect to, as an argument.
func (in instance) to() string {
	if in.variant == unixSocket {
		return in.socket
	}
	return in.address.String()
}

func (in instance) host() string { return in.address.Addr().String() }

func (in instance) port() string { return strconv.Itoa(int(in.address.Port())) }

// file makes a file of the account's.
func (in instance) file(name string, content []byte) error {
	path := filepath.Join(in.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	for ; len(path) > len(in.dir); path = filepath.Dir(path) {
		if err := os.Chown(path, overlay.AccountID, overlay.AccountID); err != nil {
			return err
		}
	}
	return nil
}

// programs are all of them, in the order of the tables.
func programs() []program {
	return slices.Concat([]program{redis(), memcached()}, web(), databases(), []program{grpcProgram(), iperf3(), sockperf()})
}

var versionPattern = regexp.MustCompile(`[0-9]+(\.[0-9]+)+`)

// named is the name with the version.
func (p program) named() string {
	if p.version == nil {
		return p.name
	}
	// Some end with an error after they have said it.
	out, _ := exec.Command(p.version[0], p.version[1:]...).CombinedOutput()
	return strings.TrimSpace(p.name + " " + string(versionPattern.Find(out)))
}

// small and value are sizes of values.
const (
	small = 64
	value = 4 << 10
)

// sizeName is how tables write a size.
func sizeName(bytes int) string {
	switch {
	case bytes >= 1<<20:
		return fmt.Sprintf("%d MiB", bytes>>20)
	case bytes >= 1<<10:
		return fmt.Sprintf("%d KiB", bytes>>10)
	}
	return fmt.Sprintf("%d B", bytes)
}

// plural is for numbers of connections and the like.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// shapes are the ways in which key-value stores are asked.
func shapes(make func(size, connections, pipeline int) workload) (all []workload) {
	for _, size := range []int{small, value} {
		for _, connections := range []int{1, 50} {
			for _, pipeline := range []int{1, 16} {
				w := make(size, connections, pipeline)
				w.name = fmt.Sprintf("%s %s, %s", w.name, sizeName(size), plural(connections, "connection"))
				if pipeline > 1 {
					w.name += fmt.Sprintf(", pipeline %d", pipeline)
				}
				w.quick = connections == 50 && (size == small) == (pipeline == 1)
				all = append(all, w)
			}
		}
	}
	return all
}

func redis() program {
	at := func(in instance) []string {
		if in.variant == unixSocket {
			return []string{"redis-benchmark", "-s", in.socket}
		}
		return []string{"redis-benchmark", "-h", in.host(), "-p", in.port()}
	}
	ask := func(command string) func(size, connections, pipeline int) workload {
		return func(size, connections, pipeline int) workload {
			return workload{
				name: "redis " + strings.ToUpper(command), counted: true,
				before: func(in instance) [][]string { // the value that GET gets
					return [][]string{append(at(in), "-q", "-t", "set", "-n", "1", "-c", "1", "-d", strconv.Itoa(size))}
				},
				client: func(in instance, a amount) []string {
					return append(at(in), "-t", command, "-n", strconv.Itoa(a.requests), "-d", strconv.Itoa(size),
						"-c", strconv.Itoa(connections), "-P", strconv.Itoa(pipeline))
				},
				read: func(_ instance, out string) (reading, error) { return parseRedis(out) },
			}
		}
	}
	sets := slices.DeleteFunc(shapes(ask("set")), func(w workload) bool {
		return !strings.HasSuffix(w.name, "50 connections")
	})
	for i := range sets {
		sets[i].quick = false
	}
	return program{
		name: "redis", version: []string{"redis-server", "--version"}, needs: []string{"redis-server", "redis-benchmark"}, hasSocket: true,
		servers: func(in instance) []process {
			return []process{{
				side: server, port: in.ports[0], socket: in.socket,
				command: []string{
					"redis-server", "--port", strconv.Itoa(int(in.ports[0])), "--bind", "0.0.0.0", "--protected-mode", "no",
					"--save", "", "--dir", in.dir, "--unixsocket", in.socket,
				},
			}}
		},
		workloads: append(shapes(ask("get")), sets...),
	}
}

func memcached() program {
	get := func(size, connections, pipeline int) workload {
		return workload{
			name: "memcached get",
			client: func(in instance, a amount) []string {
				return load{Kind: memcachedGets, To: in.to(), Size: size, Connections: connections, Pipeline: pipeline, Seconds: a.seconds}.command()
			},
			read: func(_ instance, out string) (reading, error) { return parseLoad(out) },
		}
	}
	return program{
		name: "memcached", version: []string{"memcached", "--version"}, needs: []string{"memcached"}, hasSocket: true,
		servers: func(in instance) []process {
			p := process{side: server, command: []string{"memcached", "-t", "1", "-m", "64", "-U", "0"}}
			if in.variant == unixSocket { // it has one or the other
				p.socket = in.socket
				p.command = append(p.command, "-s", in.socket, "-a", "0777")
			} else {
				p.port = in.ports[0]
				p.command = append(p.command, "-l", "0.0.0.0", "-p", strconv.Itoa(int(p.port)))
			}
			return []process{p}
		},
		workloads: shapes(get),
	}
}

func grpcProgram() program {
	calls := func(kind string, size, at int, quick bool) workload {
		name := fmt.Sprintf("gRPC unary %s, %s at once", sizeName(size), plural(at, "call"))
		if kind == grpcStream {
			name = fmt.Sprintf("gRPC message on a stream %s, %s", sizeName(size), plural(at, "stream"))
		}
		return workload{
			name: name, quick: quick,
			client: func(in instance, a amount) []string {
				return load{Kind: kind, To: in.to(), Size: size, Connections: at, Seconds: a.seconds}.command()
			},
			read: func(_ instance, out string) (reading, error) { return parseLoad(out) },
		}
	}
	return program{
		name: "gRPC for Go " + grpc.Version, hasSocket: true,
		servers: func(in instance) []process {
			p := process{side: server}
			if in.variant == unixSocket {
				p.socket, p.command = in.socket, load{Kind: grpcServer, To: in.socket}.command()
			} else {
				p.port, p.command = in.ports[0], load{Kind: grpcServer, To: in.address.String()}.command()
			}
			return []process{p}
		},
		workloads: []workload{
			calls(grpcUnary, small, 1, false), calls(grpcUnary, small, 50, true), calls(grpcUnary, value, 50, false),
			calls(grpcStream, small, 1, false), calls(grpcStream, small, 50, true), calls(grpcStream, value, 50, false),
		},
	}
}

func iperf3() program {
	stream := func(name string, quick bool, options ...string) workload {
		return workload{
			name: "iperf3 " + name, quick: quick, gbits: true,
			client: func(in instance, a amount) []string {
				return append([]string{"iperf3", "-J", "-c", in.host(), "-p", in.port(), "-t", strconv.Itoa(a.seconds)}, options...)
			},
			read: func(_ instance, out string) (reading, error) { return parseIperf3(out) },
		}
	}
	return program{
		name: "iperf3", version: []string{"iperf3", "--version"}, needs: []string{"iperf3"},
		servers: func(in instance) []process {
			return []process{{side: server, port: in.ports[0], command: []string{"iperf3", "-s", "-p", strconv.Itoa(int(in.ports[0]))}}}
		},
		workloads: []workload{
			stream("1 stream", true), stream("4 streams", false, "-P", "4"), stream("1 stream each way", false, "--bidir"),
		},
	}
}

func sockperf() program {
	pingPong := func(size int, quick bool) workload {
		return workload{
			name: "sockperf ping-pong " + sizeName(size), quick: quick,
			client: func(in instance, a amount) []string {
				return []string{"sockperf", "ping-pong", "--tcp", "--full-rtt", "-i", in.host(), "-p", in.port(), "-m", strconv.Itoa(size), "-t", strconv.Itoa(a.seconds)}
			},
			read: func(_ instance, out string) (reading, error) { return parseSockperf(out) },
		}
	}
	return program{
		name: "sockperf", version: []string{"sockperf", "--version"}, needs: []string{"sockperf"},
		servers: func(in instance) []process {
			return []process{{side: server, port: in.ports[0], command: []string{"sockperf", "server", "--tcp", "-i", in.host(), "-p", strconv.Itoa(int(in.ports[0]))}, end: syscall.SIGINT}}
		},
		workloads: []workload{pingPong(small, true), pingPong(value, false)},
	}
}

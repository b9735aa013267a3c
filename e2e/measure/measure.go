// SPDX-License-Identifier: Apache-2.0

// Package measure times one connection between two processes: round trips,
// streams and mixtures of both, or how fast connections come and go. It measures the kernel: the two
// ends are processes of their own, each pinned to a CPU, whose loops are system
// calls on one thread with Go's scheduler and garbage collector kept out.
//
// It knows nothing of pods. Where a process runs is for its caller to say.
package measure

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Kind selects what to measure.
type Kind string

const (
	// PingPong sends a message there and back, over and over.
	PingPong Kind = "ping-pong"
	// Stream sends messages one way as fast as they are taken. They are counted
	// by the receiver, whose buffer is larger than most of them.
	Stream Kind = "stream"
	// BothWays sends such messages in both directions of one connection at once. Each
	// end writes a message and reads what has come, in turn. The server counts both.
	BothWays Kind = "both ways"
	// Replies is a Stream whose receiver answers each message with one of 64 bytes.
	Replies Kind = "replies"
	// RandomSizes is a PingPong of requests and answers of 1 byte to Size. Small ones
	// are as many as large ones, and every run has the same.
	RandomSizes Kind = "random sizes"
	// Connect connects, sends a byte each way, as often as Requests says, and closes,
	// the client first.
	Connect Kind = "connect"
)

// countsBytes says whether the server counts bytes, rather than the client times.
func (k Kind) countsBytes() bool { return k == Stream || k == BothWays || k == Replies }

// Spec is one measurement.
type Spec struct {
	Kind Kind
	// Size is that of a message. Connect has none.
	Size int
	// Requests is how often a connection of Connect sends a byte each way; 0 means once.
	Requests int
	// Duration is how long it counts, after a warm-up of WarmUp.
	Duration, WarmUp time.Duration
	// Listen is an IPv4 address and port, or the absolute path of a unix socket.
	Listen string
	// NonBlocking has the ends wait by poll(2) when there is nothing to read or no
	// room to write; otherwise read and write themselves wait. BothWays and Replies
	// need it.
	NonBlocking bool
	// NoDelay sets TCP_NODELAY: TCP then does not hold back the end of a message until
	// the rest is acknowledged.
	NoDelay bool
	// Dial is where the client connects to, if not to Listen.
	Dial string
}

// End is one of the two processes.
type End struct {
	// Start starts the process, such as in the network namespace of a pod.
	Start func(*exec.Cmd) error
	// CPU is the one that it is pinned to; below 0, it is pinned to none.
	CPU int
}

// Result holds the figures of a measurement.
type Result struct {
	// Rate is per second: bytes, connections, or round trips that take P50.
	Rate float64
	// P50 and P99 are percentiles: of round trips, or of the time from connect to
	// close. The kinds that count bytes have none.
	P50, P99 time.Duration
	// Count is how many round trips, bytes or connections Rate is made from.
	Count int
	// Requests is how often Connect has sent a byte each way, in the warm-up, too.
	Requests int
}

// grace bounds what a measurement takes besides its own time.
const grace = 30 * time.Second

// childArg as the first argument makes a process one end of a measurement; the
// second is then a child as JSON.
const childArg = "podshunt-measure-end"

// child has the settings that one end gets.
type child struct {
	Spec
	Server bool
	CPU    int
}

// Main calls body, and returns what it returns, except in the processes that
// Run starts from the same program. Every program that calls Run must call Main
// before anything else.
func Main(body func() int) int {
	if len(os.Args) != 3 || os.Args[1] != childArg {
		return body()
	}
	var c child
	err := json.Unmarshal([]byte(os.Args[2]), &c)
	if err == nil {
		err = c.run(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Run measures once. Its processes have ended when it returns; they are killed
// if they do not end by themselves in time, or when ctx ends.
func Run(ctx context.Context, spec Spec, server, client End) (Result, error) {
	result, err := run(ctx, spec, server, client)
	if err != nil {
		return Result{}, fmt.Errorf("measure %s of %d bytes at %s: %w", spec.Kind, spec.Size, spec.Listen, err)
	}
	return result, nil
}

func run(ctx context.Context, spec Spec, server, client End) (Result, error) {
	if (spec.Kind == BothWays || spec.Kind == Replies) && !spec.NonBlocking {
		return Result{}, errors.New("sockets in blocking mode: this kind needs non-blocking ones")
	}
	ctx, cancel := context.WithTimeout(ctx, spec.WarmUp+spec.Duration+grace)
	defer cancel()
	s, err := start(ctx, "server", child{spec, true, server.CPU}, server)
	if err != nil {
		return Result{}, err
	}
	if err := s.read(new(struct{})); err != nil { // it listens
		cancel()
		return Result{}, errors.Join(err, s.wait())
	}
	c, err := start(ctx, "client", child{spec, false, client.CPU}, client)
	if err != nil {
		cancel()
		return Result{}, errors.Join(err, s.wait())
	}
	var results [2]Result
	err = c.read(&results[0])
	if err != nil {
		cancel() // the server would wait for a client that is gone
	}
	err = errors.Join(err, s.read(&results[1]), c.wait(), s.wait())
	if err != nil {
		return Result{}, err
	}
	if spec.Kind.countsBytes() {
		return results[1], nil
	}
	return results[0], nil
}

// process is an end that runs.
type process struct {
	name   string
	cmd    *exec.Cmd
	stdout *bufio.Reader
	stderr strings.Builder
}

func start(ctx context.Context, name string, c child, end End) (*process, error) {
	arg, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{name: name, cmd: exec.CommandContext(ctx, exe, childArg, string(arg))}
	// The signals that make goroutines yield would interrupt system calls.
	p.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	p.cmd.WaitDelay = time.Minute
	p.cmd.Stderr = &p.stderr
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdout = bufio.NewReader(stdout)
	if err := end.Start(p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

// read reads the next line that the process prints.
func (p *process) read(to any) error {
	line, err := p.stdout.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, to)
	}
	if err != nil {
		return fmt.Errorf("read from %s: %w", p.name, err)
	}
	return nil
}

func (p *process) wait() error {
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w: %s", p.name, err, strings.TrimSpace(p.stderr.String()))
	}
	return nil
}

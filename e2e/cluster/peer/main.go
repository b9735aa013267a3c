// SPDX-License-Identifier: Apache-2.0

// Peer is what runs in the pods of the cluster suite: servers and clients that
// check every byte of the other, and the image's own pause. What a process has
// seen so far is a Report at http://:9090/report; a POST of /finish ends a
// client's connections in good order and answers with its last Report, one of
// /pause answers when every request is answered and no other will follow, until
// one of /resume.
//
// Its sockets are non-blocking ones as Go makes them, each with a deadline.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const usage = "usage: peer server|client|pause|get [flags]"

// opTimeout is how long one read or write may take: a connection that hangs ends with an error in the Report.
var opTimeout = 30 * time.Second

// Report is what a server or a client has seen so far.
type Report struct {
	// Connections counts those made, Open those that are left.
	Connections, Open int
	// Requests counts those answered, Sent and Received the bytes of the conversation.
	Requests, Sent, Received int64
	// Longest is the longest time that a request took.
	Longest time.Duration
	// Failed counts connections that ended by an error; Errors is the first few of these.
	Failed int
	Errors []string
}

// recorder keeps a Report.
type recorder struct {
	mu     sync.Mutex
	report Report
}

// gate holds a client's requests back.
type gate struct {
	// requests is held for reading while one is sent.
	requests sync.RWMutex
	waiting  atomic.Int64 // for an answer
	closed   atomic.Bool
}

// close returns when every request is answered.
func (g *gate) close() {
	if g.closed.Swap(true) {
		return
	}
	g.requests.Lock()
	for g.waiting.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
}

func (g *gate) open() {
	if g.closed.Swap(false) {
		g.requests.Unlock()
	}
}

func (r *recorder) get() Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.report
}

func (r *recorder) opened() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Connections++
	r.report.Open++
}

func (r *recorder) closed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Open--
}

// request counts what was written and read for one, its answer included.
func (r *recorder) request(sent, received int, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Requests++
	r.report.Sent += int64(sent)
	r.report.Received += int64(received)
	r.report.Longest = max(r.report.Longest, took)
}

// wrote counts what belongs to no request.
func (r *recorder) wrote(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Sent += int64(n)
}

func (r *recorder) failed(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Failed++
	if len(r.report.Errors) < 10 {
		r.report.Errors = append(r.report.Errors, time.Now().UTC().Format("15:04:05.000 ")+err.Error())
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	switch role, args := args[0], args[1:]; role {
	case "server":
		return serverRole(ctx, args)
	case "client":
		return clientRole(ctx, args)
	case "pause":
		<-ctx.Done()
		return nil
	case "get", "post":
		if len(args) != 1 {
			return fmt.Errorf("usage: peer %s URL", role)
		}
		return fetch(role, args[0])
	}
	return errors.New(usage)
}

// fetch prints what a URL answers.
func fetch(role, url string) error {
	method := http.MethodGet
	if role == "post" {
		method = http.MethodPost
	}
	request, err := http.NewRequest(method, url, nil)
	if err != nil {
		return err
	}
	client := http.Client{Timeout: 2 * opTimeout}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, answer.Status)
	}
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}

// listen makes a plain TCP listener, or one as Go makes it by default, which is an MPTCP one.
func listen(ctx context.Context, address string, multipath bool) (net.Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(multipath)
	return config.Listen(ctx, "tcp", address)
}

// serveReport answers /report and the other paths on address until ctx ends.
func serveReport(ctx context.Context, address string, r *recorder, actions map[string]func()) error {
	listener, err := listen(ctx, address, false)
	if err != nil {
		return err
	}
	answer := func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(r.get()) }
	mux := http.NewServeMux()
	mux.HandleFunc("GET /report", answer)
	for path, action := range actions {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, request *http.Request) {
			action()
			answer(w, request)
		})
	}
	server := http.Server{Handler: mux, ReadTimeout: opTimeout, WriteTimeout: 2 * opTimeout}
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func serverRole(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("peer server", flag.ContinueOnError)
	frames := flags.String("frames", ":8080", "address of the server that checks and sends frames")
	multipath := flags.String("mptcp", ":8081", "address of the same on a listener as Go makes it by default")
	database := flags.String("database", ":8082", "address of the server of keys and values")
	report := flags.String("report", ":9090", "address of the report")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var r recorder
	errs := make(chan error, 4)
	serve := func(address string, multipath bool, conversation func(net.Conn, *recorder) error) {
		listener, err := listen(ctx, address, multipath)
		if err != nil {
			errs <- err
			return
		}
		for {
			c, err := listener.Accept()
			if err != nil {
				errs <- err
				return
			}
			go func() {
				r.opened()
				defer r.closed()
				defer c.Close()
				if err := conversation(deadlined{c}, &r); err != nil {
					r.failed(fmt.Errorf("%v: %w", c.RemoteAddr(), err))
				}
			}()
		}
	}
	db := newDatabase()
	go serve(*frames, false, serveFrames)
	go serve(*multipath, true, serveFrames)
	go serve(*database, false, db.serve)
	go func() { errs <- serveReport(ctx, *report, &r, nil) }()
	select {
	case <-ctx.Done():
		return nil
	case err := <-errs:
		return err
	}
}

func clientRole(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("peer client", flag.ContinueOnError)
	target := flags.String("target", "", "address of the server")
	protocol := flags.String("protocol", "frames", "frames or database")
	connections := flags.Int("connections", 4, "connections at a time")
	report := flags.String("report", ":9090", "address of the report")
	p := pace{gate: &gate{}}
	flags.DurationVar(&p.interval, "interval", 50*time.Millisecond, "pause of a connection between two requests")
	flags.IntVar(&p.size, "size", 16<<10, "bytes of a request or an answer, at most")
	flags.DurationVar(&opTimeout, "timeout", opTimeout, "how long one read or write may take")
	flags.IntVar(&p.requests, "requests", 0, "requests before a connection ends and another takes its place; 0: it goes on")
	if err := flags.Parse(args); err != nil {
		return err
	}
	talk := talkFrames
	if *protocol == "database" {
		talk = talkDatabase
	}

	var r recorder
	var group sync.WaitGroup
	talking, stopTalking := context.WithCancel(ctx)
	defer stopTalking()
	for range *connections {
		group.Go(func() {
			for talking.Err() == nil {
				if err := connect(talking, *target, p, talk, &r); err != nil {
					// A Service takes a moment to be known on the node.
					if r.get().Connections > 0 {
						r.failed(err)
					}
					time.Sleep(200 * time.Millisecond) // the server may be gone for a while
				}
			}
		})
	}
	return serveReport(ctx, *report, &r, map[string]func(){
		"/pause":  p.gate.close,
		"/resume": p.gate.open,
		"/finish": func() {
			stopTalking()
			p.gate.open()
			group.Wait()
		},
	})
}

// pace is how a client talks.
type pace struct {
	interval       time.Duration
	size, requests int
	gate           *gate
}

// conversation talks until ctx ends or the requests are done. What was sent must be answered then.
type conversation func(ctx context.Context, c net.Conn, p pace, r *recorder) error

func connect(ctx context.Context, target string, p pace, talk conversation, r *recorder) error {
	dialer := net.Dialer{Timeout: opTimeout}
	dialer.SetMultipathTCP(false)
	c, err := dialer.Dial("tcp", target)
	if err != nil {
		return err
	}
	defer c.Close()
	r.opened()
	defer r.closed()
	if err := talk(ctx, deadlined{c}, p, r); err != nil {
		return fmt.Errorf("%v to %v: %w", c.LocalAddr(), c.RemoteAddr(), err)
	}
	return nil
}

// deadlined gives each read and write a deadline.
type deadlined struct{ net.Conn }

func (c deadlined) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(opTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c deadlined) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(opTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c deadlined) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }

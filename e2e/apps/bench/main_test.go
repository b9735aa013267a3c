// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSettings(t *testing.T) {
	for _, tc := range []struct {
		args            string
		rounds, seconds int
		placements      []string
		partial         bool
	}{
		{"", 5, 2, []string{"unpinned", "one-core", "two-cores"}, false},
		{"-quick", 2, 1, []string{"unpinned"}, true},
		{"-rounds 3 -placements unpinned", 3, 2, []string{"unpinned"}, true},
		{"-quick -rounds 7 -placements one-core,two-cores", 7, 1, []string{"one-core", "two-cores"}, true},
		{"-rounds 9 -seconds 3 -programs ^redis", 9, 3, []string{"unpinned", "one-core", "two-cores"}, true},
	} {
		s, err := parse(strings.Fields(tc.args), io.Discard)
		if err != nil || s.rounds != tc.rounds || s.seconds != tc.seconds || !cmp.Equal(s.placements, tc.placements) || s.partial() != tc.partial {
			t.Errorf("%q: got %+v and error %v, want %d rounds of %d s, %v, partial: %v", tc.args, s, err, tc.rounds, tc.seconds, tc.placements, tc.partial)
		}
	}
	for _, args := range []string{"-rounds 0", "-seconds 0", "-placements moon", "-programs (", "more"} {
		if _, err := parse(strings.Fields(args), io.Discard); err == nil {
			t.Errorf("%q: got no error", args)
		}
	}
}

func TestPlacements(t *testing.T) {
	want := []placement{
		{"Not pinned", nil},
		{"All on one core", map[side]int{server: 2, proxy: 2, client: 2}},
		{"Client on another core", map[side]int{server: 2, proxy: 2, client: 5}},
	}
	for _, cpus := range [][]int{{2, 5}, {2}} {
		got := placements(placementNames(), cpus)
		if diff := cmp.Diff(want[:len(cpus)+1], got, cmp.AllowUnexported(placement{})); diff != "" {
			t.Errorf("CPUs %v (-want +got):\n%s", cpus, diff)
		}
	}
}

// TestLines: names are what users choose by, and the tables' rows.
func TestLines(t *testing.T) {
	seen := map[string]bool{}
	quick := map[string]bool{}
	for _, p := range programs() {
		for _, w := range p.workloads {
			if seen[w.name] {
				t.Errorf("%q is there twice", w.name)
			}
			seen[w.name] = true
			quick[p.name] = quick[p.name] || w.quick
		}
		if !quick[p.name] {
			t.Errorf("%s has no quick line", p.name)
		}
	}
	for _, name := range []string{
		"redis GET 64 B, 1 connection", "redis GET 4 KiB, 50 connections, pipeline 16", "redis SET 4 KiB, 50 connections",
		"memcached get 4 KiB, 50 connections, pipeline 16", "nginx 10 MiB, 4 connections", "iperf3 1 stream",
	} {
		if !seen[name] {
			t.Errorf("got no line %q", name)
		}
	}
}

// mustStep takes each step of a load twice.
func mustStep(t *testing.T, l load) {
	t.Helper()
	steps, end, err := l.steps(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(steps) != l.Connections {
		t.Errorf("got %d steps, want %d", len(steps), l.Connections)
	}
	for range 2 {
		for _, step := range steps {
			if err := step(); err != nil {
				t.Error(err)
			}
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func TestGRPC(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "grpc.sock")
	ended := make(chan error, 1)
	go func() { ended <- load{Kind: grpcServer, To: socket}.serveGRPC(t.Context()) }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	for _, kind := range []string{grpcUnary, grpcStream} {
		mustStep(t, load{Kind: kind, To: socket, Size: 4096, Connections: 3, Seconds: 20})
	}
	t.Cleanup(func() {
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
}

// memcachedFake answers with what was set, or something else.
func memcachedFake(t *testing.T, wrong string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	value := make(chan string, 1)
	serve := func(c net.Conn) {
		defer c.Close()
		for lines := bufio.NewScanner(c); lines.Scan(); {
			words := strings.Fields(lines.Text())
			switch words[0] {
			case "set":
				lines.Scan()
				value <- lines.Text()
				fmt.Fprint(c, "STORED\r\n")
			case "get":
				v := <-value
				value <- v
				if wrong != "" {
					v = wrong
				}
				fmt.Fprintf(c, "VALUE %s 0 %d\r\n%s\r\nEND\r\n", words[1], len(v), v)
			}
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go serve(c)
		}
	}()
	return l.Addr().String()
}

func TestMemcached(t *testing.T) {
	mustStep(t, load{Kind: memcachedGets, To: memcachedFake(t, ""), Size: 64, Connections: 2, Pipeline: 16, Seconds: 20})
	steps, end, err := load{Kind: memcachedGets, To: memcachedFake(t, "wrong"), Size: 5, Connections: 1, Pipeline: 1, Seconds: 20}.steps(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := steps[0](); err == nil {
		t.Error("got no error for another value")
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

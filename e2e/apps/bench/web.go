// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strconv"
)

// bodies are the files that web servers have, by name.
func bodies() map[string]int {
	return map[string]int{"1k": 1 << 10, "100k": 100 << 10, "10m": 10 << 20}
}

// wrkScript has wrk print what it does not by itself, in microseconds.
const wrkScript = `
function done(summary, latency, requests)
	local e = summary.errors
	print(string.format("podshunt: requests %d us %d p50 %d p99 %d p999 %d errors %d", summary.requests, summary.duration,
		latency:percentile(50), latency:percentile(99), latency:percentile(99.9), e.connect + e.read + e.write + e.status + e.timeout))
end
`

// get is wrk, which reuses its connections unless there are headers that say otherwise.
func get(name, body string, connections int, quick bool, headers ...string) workload {
	return workload{
		name: name, quick: quick,
		client: func(in instance, a amount) []string {
			command := []string{"wrk", "-t1", "-c" + strconv.Itoa(connections), fmt.Sprintf("-d%ds", a.seconds), "-s", filepath.Join(in.dir, "wrk.lua")}
			for _, h := range headers {
				command = append(command, "-H", h)
			}
			return append(command, fmt.Sprintf("http://%s/%s", in.address, body))
		},
		read: func(_ instance, out string) (reading, error) { return parseWrk(out) },
	}
}

// nginxConf is a whole configuration around server blocks and the like.
func nginxConf(blocks string) []byte {
	return fmt.Appendf(nil, `
daemon off;
pid nginx.pid;
worker_processes 1;
error_log stderr;
events { worker_connections 1024; }
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxied;
	fastcgi_temp_path unused;
	uwsgi_temp_path unused;
	scgi_temp_path unused;
	sendfile on;
	keepalive_requests 1000000000;
	%s
}
`, blocks)
}

// fillOrigin makes what nginx serves, and wrk's script.
func fillOrigin(in *instance) error {
	for name, size := range bodies() {
		if err := in.file("origin/files/"+name, bytes.Repeat([]byte("podshunt"), size/8)); err != nil {
			return err
		}
	}
	if err := in.file("wrk.lua", []byte(wrkScript)); err != nil {
		return err
	}
	return in.file("origin/nginx.conf", nginxConf(fmt.Sprintf("server { listen %d backlog=4096; root files; }", in.ports[0])))
}

// nginx is a server whose configuration is in a directory below the instance's.
func nginx(in instance, at side, port uint16, dir string) process {
	dir = filepath.Join(in.dir, dir)
	return process{side: at, port: port, command: []string{"nginx", "-e", "stderr", "-p", dir, "-c", filepath.Join(dir, "nginx.conf")}}
}

func web() []program {
	origin := func(in instance) process { return nginx(in, server, in.ports[0], "origin") }
	return []program{
		{
			name: "nginx", version: []string{"nginx", "-v"}, needs: []string{"nginx", "wrk"}, fill: fillOrigin,
			servers: func(in instance) []process { return []process{origin(in)} },
			workloads: []workload{
				get("nginx 1 KiB, 16 connections", "1k", 16, true),
				get("nginx 100 KiB, 16 connections", "100k", 16, true),
				get("nginx 10 MiB, 4 connections", "10m", 4, false),
				get("nginx 1 KiB, a connection per request", "1k", 16, true, "Connection: close"),
			},
		},
		{
			name: "HAProxy", version: []string{"haproxy", "-v"}, needs: []string{"haproxy", "nginx", "wrk"},
			fill: func(in *instance) error {
				if err := fillOrigin(in); err != nil {
					return err
				}
				return in.file("haproxy.cfg", fmt.Appendf(nil, `
global
	maxconn 1000
	nbthread 1
defaults
	mode http
	http-reuse always
	timeout connect 1m
	timeout client 1m
	timeout server 1m
listen front
	bind :%d
	server origin %s:%d
`, in.ports[1], in.node.pods[server].IPv4, in.ports[0]))
			},
			servers: func(in instance) []process {
				return []process{origin(in), {side: proxy, port: in.ports[1], command: []string{"haproxy", "-db", "-f", filepath.Join(in.dir, "haproxy.cfg")}}}
			},
			workloads: []workload{
				get("HAProxy before nginx 1 KiB, 16 connections", "1k", 16, true),
				get("HAProxy before nginx 100 KiB, 16 connections", "100k", 16, false),
			},
		},
		{
			name: "nginx as proxy", needs: []string{"nginx", "wrk"},
			fill: func(in *instance) error {
				if err := fillOrigin(in); err != nil {
					return err
				}
				return in.file("proxy/nginx.conf", nginxConf(fmt.Sprintf(`
	upstream origin { server %s:%d; keepalive 64; keepalive_requests 1000000000; }
	server {
		listen %d backlog=4096;
		location / { proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; }
	}`, in.node.pods[server].IPv4, in.ports[0], in.ports[1])))
			},
			servers: func(in instance) []process {
				return []process{origin(in), nginx(in, proxy, in.ports[1], "proxy")}
			},
			// Nothing larger: nginx asks FIONREAD how much of a long answer has come, and
			// stalls on kernels with that hazard, which is accepted here
			// (docs/limits.md#fionread-tcp).
			workloads: []workload{get("nginx before nginx 1 KiB, 16 connections", "1k", 16, true)},
		},
	}
}

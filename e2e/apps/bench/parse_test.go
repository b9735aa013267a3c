// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// What the programs of Debian 12 have printed, shortened.
const (
	redisOutput = "GET: rps=0.0 (overall: 0.0) avg_msec=-nan (overall: -nan)\r                    \rGET: rps=96812.5 (overall: 96435.8) avg_msec=6.647 (overall: 6.647)\r      \r" + `====== GET ======
  103104 requests completed in 0.98 seconds
  50 parallel clients
  4096 bytes payload
  keep alive: 1
  multi-thread: no

Latency by percentile distribution:
0.000% <= 0.903 milliseconds (cumulative count 16)
50.000% <= 5.583 milliseconds (cumulative count 51696)
99.219% <= 40.703 milliseconds (cumulative count 102292)
99.902% <= 41.343 milliseconds (cumulative count 102996)
100.000% <= 42.815 milliseconds (cumulative count 103092)

Cumulative distribution of latencies:
98.619% <= 16.103 milliseconds (cumulative count 101668)
99.953% <= 42.111 milliseconds (cumulative count 103044)

Summary:
  throughput summary: 104780.48 requests per second
  latency summary (msec):
          avg       min       p50       p95       p99       max
        5.916     0.896     5.583     8.983    37.439    42.815
`
	wrkOutput = `Running 1s test @ http://10.244.0.2:7000/1k
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   664.21us  202.24us   3.87ms   90.01%
    Req/Sec    24.32k     1.73k   26.20k    80.00%
  24132 requests in 1.00s, 29.09MB read
Requests/sec:  24103.15
Transfer/sec:     29.06MB
podshunt: requests 24132 us 1001197 p50 636 p99 1384 p999 3090 errors 0
`
	pgbenchOutput = `pgbench (15.18 (Debian 15.18-0+deb12u1))
transaction type: <builtin: select only>
scaling factor: 1
query mode: prepared
number of clients: 1
number of threads: 1
maximum number of tries: 1
duration: 1 s
number of transactions actually processed: 11352
number of failed transactions: 0 (0.000%)
latency average = 0.088 ms
initial connection time = 7.693 ms
tps = 11374.441774 (without initial connection time)
`
	pgbenchLog = `0 1 17437 0 1795751089 835397
1 1 97 0 1795751089 835424
2 1 66 0 1795751089 835432
0 2 71 0 1795751089 835440
`
	sysbenchOutput = `sysbench 1.0.20 (using system LuaJIT 2.1.0-beta3)

Latency histogram (values are in milliseconds)
       value  ------------- distribution ------------- count
       0.057 |*                                        5
       0.129 |**************************************** 968
       0.141 |***************************              24
       2.032 |                                         2
       5.090 |                                         1
 
SQL statistics:
    queries:                             21031  (20966.63 per sec.)
    ignored errors:                      0      (0.00 per sec.)
    reconnects:                          0      (0.00 per sec.)

General statistics:
    total time:                          1.0026s
    total number of events:              21031
`
	iperf3Output = `{"start": {"version": "iperf 3.12"}, "end": {
		"sum_sent": {"start": 0, "end": 1.028812, "seconds": 1.028812, "bytes": 493879296, "bits_per_second": 3840385189.90836, "retransmits": 2, "sender": true},
		"sum_received": {"start": 0, "end": 1.032149, "seconds": 1.032149, "bytes": 493355008, "bits_per_second": 3823905331.497681, "sender": true},
		"sum_received_bidir_reverse": {"start": 0, "end": 1.032149, "seconds": 1.032149, "bytes": 496238592, "bits_per_second": 3846255468.929389, "sender": false}}}`
	sockperfOutput = `sockperf: Test ended
sockperf: [Total Run] RunTime=1.000 sec; Warm up time=400 msec; SentMessages=22892; ReceivedMessages=22891
sockperf: ========= Printing statistics for Server No: 0
sockperf: [Valid Duration] RunTime=0.550 sec; SentMessages=11635; ReceivedMessages=11635
sockperf: Summary: Round trip is 47.260 usec
sockperf: ---> percentile 99.999 = 1830.158
sockperf: ---> percentile 99.990 = 1674.307
sockperf: ---> percentile 99.900 =  647.565
sockperf: ---> percentile 99.000 =  133.057
sockperf: ---> percentile 50.000 =   47.688
sockperf: ---> percentile 25.000 =   21.760
`
)

func TestParse(t *testing.T) {
	pgbench := func(out string) (reading, error) { return parsePgbench(out, pgbenchLog) }
	for _, tc := range []struct {
		name, out string
		parse     func(string) (reading, error)
		want      reading
	}{
		{"redis-benchmark", redisOutput, parseRedis, reading{103104, 104780.48, latency{5583, 37439, 41343}}},
		{"wrk", wrkOutput, parseWrk, reading{24132, 24103.15, latency{636, 1384, 3090}}},
		{"pgbench", pgbenchOutput, pgbench, reading{11352, 11374.441774, latency{71, 17437, 17437}}},
		{"sysbench", sysbenchOutput, parseSysbench, reading{21031, 20976.46, latency{129, 141, 2032}}},
		{"iperf3", iperf3Output, parseIperf3, reading{requests: 943.75, rate: 7.67, latency: latency{}}},
		{"sockperf", sockperfOutput, parseSockperf, reading{22891, 21154.55, latency{47.688, 133.057, 647.565}}},
		{
			"own", `{"Requests":3431,"Seconds":1.000180117,"P50":239.087,"P99":970.011,"P999":3516.375}`, parseLoad,
			reading{3431, 3430.38, latency{239.087, 970.011, 3516.375}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tc.parse(tc.out)
			if err != nil {
				t.Fatal(err)
			}
			about := cmpopts.EquateApprox(0, 0.01)
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(reading{}, latency{}), about); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got, err := tc.parse("Connection refused"); err == nil {
				t.Errorf("got %+v of an output without results, want an error", got)
			}
		})
	}
}

// TestParseFailures: a client that ends well may still say that something went wrong.
func TestParseFailures(t *testing.T) {
	for name, parse := range map[string]func() (reading, error){
		"wrk, errors":     func() (reading, error) { return parseWrk("podshunt: requests 9 us 1000 p50 1 p99 1 p999 1 errors 2") },
		"wrk, stalled":    func() (reading, error) { return parseWrk("podshunt: requests 0 us 1000 p50 0 p99 0 p999 0 errors 0") },
		"iperf3":          func() (reading, error) { return parseIperf3(`{"error": "unable to connect", "end": {}}`) },
		"own":             func() (reading, error) { return parseLoad(`{"Requests":0,"Seconds":1}`) },
		"pgbench, log":    func() (reading, error) { return parsePgbench(pgbenchOutput, "") },
		"pgbench, skips":  func() (reading, error) { return parsePgbench(pgbenchOutput, "0 1 skipped 0 1795751089 835397") },
		"sysbench, fewer": func() (reading, error) { return parseSysbench("ignored errors:      1      (0.00 per sec.)") },
	} {
		if got, err := parse(); err == nil {
			t.Errorf("%s: got %+v, want an error", name, got)
		}
	}
}

func TestPercentiles(t *testing.T) {
	got, err := percentiles([]bucket{{10, 500}, {20, 489}, {30, 1}, {40, 9}, {50, 1}})
	if want := (latency{10, 30, 40}); err != nil || got != want {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestNewTally(t *testing.T) {
	var times []time.Duration
	for i := range 1000 {
		times = append(times, time.Duration(1000-i)*time.Microsecond)
	}
	got, want := newTally(times, 2*time.Second, 16), tally{16000, 2, 501, 991, 1000}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestProcessorTime(t *testing.T) {
	cpu, err := parseCPUStat("usage_usec 123456\nuser_usec 100000\nsystem_usec 23456\nnice_usec 0\n")
	if want := 123456 * time.Microsecond; err != nil || cpu != want {
		t.Errorf("cpu.stat: got %v, %v, want %v", cpu, err, want)
	}
	softirq, err := parseStat("cpu  5427007 2254099 1916264 5140292 62114 3 195832 52727 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
	if want := 1958350 * time.Millisecond; err != nil || softirq != want {
		t.Errorf("/proc/stat: got %v, %v, want %v", softirq, err, want)
	}
	if _, err := parseCPUStat("user_usec 1\n"); err == nil {
		t.Error("cpu.stat without usage_usec: got no error")
	}
	if _, err := parseStat("intr 1 2 3\n"); err == nil {
		t.Error("/proc/stat without cpu: got no error")
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing: got %v", got)
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Each parser is for the output of one program. What it does not find is an error, but
// for what the program may lack.

// number finds the first number that a pattern with one group matches.
func number(pattern *regexp.Regexp, text string) (float64, error) {
	found := pattern.FindStringSubmatch(text)
	if found == nil {
		return 0, fmt.Errorf("no %q in: %s", pattern, tail(text))
	}
	return strconv.ParseFloat(found[1], 64)
}

// numbers is number for several patterns.
func numbers(text string, into map[*float64]*regexp.Regexp) error {
	var errs []error
	for to, pattern := range into {
		var err error
		*to, err = number(pattern, text)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// bucket is a line of a histogram: so many were no slower than upTo microseconds.
type bucket struct{ upTo, count float64 }

// percentiles reads them from buckets in ascending order.
func percentiles(buckets []bucket) (latency, error) {
	total := 0.0
	for _, b := range buckets {
		total += b.count
	}
	if total == 0 {
		return latency{}, errors.New("the histogram is empty")
	}
	at := func(part float64) float64 {
		n := 0.0
		for _, b := range buckets {
			if n += b.count; n >= part*total {
				return b.upTo
			}
		}
		return buckets[len(buckets)-1].upTo
	}
	return latency{at(0.5), at(0.99), at(0.999)}, nil
}

var (
	redisRequests = regexp.MustCompile(`(\d+) requests completed in [\d.]+ seconds`)
	redisRate     = regexp.MustCompile(`throughput summary: ([\d.]+) requests per second`)
	redisP50      = regexp.MustCompile(`(?m)^ +avg +min +p50 +p95 +p99 +max *\n *[\d.]+ +[\d.]+ +([\d.]+) `)
	redisP99      = regexp.MustCompile(`(?m)^ +avg +min +p50 +p95 +p99 +max *\n *[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+) `)
	// redisP999 is as near as it comes to 99.9 %. It has no such line for few requests.
	redisP999 = regexp.MustCompile(`(?m)^99\.902% <= ([\d.]+) milliseconds`)
)

// parseRedis reads the output of redis-benchmark for one test.
func parseRedis(out string) (r reading, err error) {
	// It rewrites the line with its progress.
	out = strings.ReplaceAll(out, "\r", "\n")
	err = numbers(out, map[*float64]*regexp.Regexp{
		&r.requests: redisRequests, &r.rate: redisRate, &r.latency.p50: redisP50, &r.latency.p99: redisP99,
	})
	if err != nil {
		return reading{}, err
	}
	if redisP999.MatchString(out) {
		if r.latency.p999, err = number(redisP999, out); err != nil {
			return reading{}, err
		}
	}
	r.latency = latency{r.latency.p50 * 1e3, r.latency.p99 * 1e3, r.latency.p999 * 1e3}
	return r, nil
}

// parseLoad reads what a load of this program prints.
func parseLoad(out string) (reading, error) {
	var t tally
	if err := json.Unmarshal([]byte(out), &t); err != nil {
		return reading{}, err
	}
	if t.Requests == 0 || t.Seconds == 0 {
		return reading{}, fmt.Errorf("no request: %s", out)
	}
	return reading{float64(t.Requests), float64(t.Requests) / t.Seconds, latency{t.P50, t.P99, t.P999}}, nil
}

// parseWrk reads the line of wrkScript.
func parseWrk(out string) (reading, error) {
	_, line, ok := strings.Cut(out, "podshunt: ")
	var requests, us, p50, p99, p999, failures int
	_, err := fmt.Sscanf(line, "requests %d us %d p50 %d p99 %d p999 %d errors %d", &requests, &us, &p50, &p99, &p999, &failures)
	switch {
	case !ok || err != nil:
		return reading{}, fmt.Errorf("wrk says: %s", tail(out))
	case failures > 0:
		return reading{}, fmt.Errorf("wrk had %d errors: %s", failures, tail(out))
	case requests == 0 || us == 0:
		return reading{}, fmt.Errorf("no request: %s", tail(out))
	}
	return reading{float64(requests), float64(requests) / float64(us) * 1e6, latency{float64(p50), float64(p99), float64(p999)}}, nil
}

var (
	pgbenchCount = regexp.MustCompile(`number of transactions actually processed: (\d+)`)
	pgbenchRate  = regexp.MustCompile(`tps = ([\d.]+) \(without initial connection time\)`)
)

// parsePgbench reads the output of pgbench, and its log: a line for each transaction,
// whose third word is how many microseconds it took.
func parsePgbench(out, log string) (r reading, err error) {
	if err := numbers(out, map[*float64]*regexp.Regexp{&r.requests: pgbenchCount, &r.rate: pgbenchRate}); err != nil {
		return reading{}, err
	}
	var buckets []bucket
	lines := bufio.NewScanner(strings.NewReader(log))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 {
			return reading{}, fmt.Errorf("pgbench logs %q", lines.Text())
		}
		us, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			return reading{}, err
		}
		buckets = append(buckets, bucket{us, 1})
	}
	slices.SortFunc(buckets, func(a, b bucket) int { return int(a.upTo - b.upTo) })
	r.latency, err = percentiles(buckets)
	return r, errors.Join(err, lines.Err())
}

var (
	sysbenchEvents = regexp.MustCompile(`total number of events: +(\d+)`)
	sysbenchTime   = regexp.MustCompile(`total time: +([\d.]+)s`)
	sysbenchErrors = regexp.MustCompile(`ignored errors: +(\d+) `)
	sysbenchBucket = regexp.MustCompile(`(?m)^ *([\d.]+) \|\** +(\d+)$`)
)

// parseSysbench reads the output of sysbench with a histogram.
func parseSysbench(out string) (r reading, err error) {
	var seconds, failures float64
	err = numbers(out, map[*float64]*regexp.Regexp{&r.requests: sysbenchEvents, &seconds: sysbenchTime, &failures: sysbenchErrors})
	if err != nil {
		return reading{}, err
	}
	if failures > 0 {
		return reading{}, fmt.Errorf("sysbench had %v errors", failures)
	}
	r.rate = r.requests / seconds
	var buckets []bucket
	for _, found := range sysbenchBucket.FindAllStringSubmatch(out, -1) {
		ms, err := strconv.ParseFloat(found[1], 64)
		count, err2 := strconv.ParseFloat(found[2], 64)
		if err := errors.Join(err, err2); err != nil {
			return reading{}, err
		}
		buckets = append(buckets, bucket{ms * 1e3, count})
	}
	r.latency, err = percentiles(buckets)
	return r, err
}

// parseIperf3 reads the report of iperf3, whose rate becomes Gbit/s, of both ways
// together, and whose requests are MiB.
func parseIperf3(out string) (reading, error) {
	type sum struct {
		Bytes   float64
		Seconds float64
	}
	var report struct {
		Error string
		End   struct {
			Received sum `json:"sum_received"`
			Reverse  sum `json:"sum_received_bidir_reverse"`
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return reading{}, err
	}
	if report.Error != "" || report.End.Received.Bytes == 0 || report.End.Received.Seconds == 0 {
		return reading{}, fmt.Errorf("iperf3 says: %s", tail(out))
	}
	bytes := report.End.Received.Bytes + report.End.Reverse.Bytes
	return reading{requests: bytes / (1 << 20), rate: bytes * 8 / 1e9 / report.End.Received.Seconds}, nil
}

var (
	sockperfTotal = regexp.MustCompile(`\[Total Run\].* ReceivedMessages=(\d+)`)
	sockperfValid = regexp.MustCompile(`\[Valid Duration\].* ReceivedMessages=(\d+)`)
	sockperfTime  = regexp.MustCompile(`\[Valid Duration\] RunTime=([\d.]+) sec`)
	sockperfP50   = regexp.MustCompile(`percentile 50\.000 = +([\d.]+)`)
	sockperfP99   = regexp.MustCompile(`percentile 99\.000 = +([\d.]+)`)
	sockperfP999  = regexp.MustCompile(`percentile 99\.900 = +([\d.]+)`)
)

// parseSockperf reads the output of sockperf with --full-rtt.
func parseSockperf(out string) (r reading, err error) {
	var valid, seconds float64
	err = numbers(out, map[*float64]*regexp.Regexp{
		&r.requests: sockperfTotal, &valid: sockperfValid, &seconds: sockperfTime,
		&r.latency.p50: sockperfP50, &r.latency.p99: sockperfP99, &r.latency.p999: sockperfP999,
	})
	if err != nil {
		return reading{}, err
	}
	r.rate = valid / seconds
	return r, nil
}

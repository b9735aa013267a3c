// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/podshunt/podshunt/e2e/measure"
)

// TestReport: a row whose interval is below the limit is listed, the columns of what was
// not measured are left out, and each placement has its tables.
func TestReport(t *testing.T) {
	one := placement{"one", "Both ends on one core", 0, 0}
	two := placement{"two", "Across two cores", 0, 1}
	message := row{kind: measure.PingPong, size: kib, noDelay: true}
	stream := row{kind: measure.Stream, size: 64, bare: true}
	steady := samples(1e5, 1e5, 1e5, 1e5, 1e5, 1e5)
	fast, slow := samples(2e5, 2e5, 2e5, 2e5, 2e5, 2e5), samples(5e4, 5e4, 5e4, 5e4, 5e4, 5e4)
	streams := func(all []sample) []sample {
		for i := range all {
			all[i].P99, all[i].share = 0, 0.5
		}
		return all
	}
	r := results{
		todo: []place{{one, message}, {one, stream}, {two, message}},
		compared: map[place]table{
			{one, message}: {tcp: steady, tcpAgain: steady, shortcut: fast},
			{one, stream}: {
				tcp:      streams(samples(1e9, 1e9, 1e9, 1e9, 1e9, 1e9)),
				tcpAgain: streams(samples(1e9, 1e9, 1e9, 1e9, 1e9, 1e9)),
				shortcut: streams(samples(5e8, 5e8, 5e8, 5e8, 5e8, 5e8)),
			},
			{two, message}: {tcp: steady, tcpAgain: slow, shortcut: steady},
		},
	}
	bare := map[place]table{{one, stream}: {tcp: streams(samples(1e9))}}
	r.before, r.loaded, r.after = bare, bare, bare
	var got strings.Builder
	r.write(&got)
	want := `
### Slower than TCP

1 of 3 rows; of TCP to TCP, 1.

|  | slower | ratio to TCP | bytes by shortcut |
| --- | --: | --: | --: |
| Both ends on one core: stream 64 B, nagle | median | 0.50 (0.50–0.50) | 50.0 % |

### Both ends on one core, TCP_NODELAY

|  | TCP | shortcut | ratio to TCP | p99 to TCP | TCP to TCP | p99, TCP to TCP | slower | bytes by shortcut |
| --- | --: | --: | --: | --: | --: | --: | --: | --: |
| ping-pong 1 KiB | 10.00 (20.0) µs | 5.00 (10.0) µs | **2.00 (2.00–2.00)** | 2.00 (2.00–2.00) | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) | no | 0.0 % |

### Both ends on one core, without TCP_NODELAY

|  | TCP | shortcut | ratio to TCP | TCP to TCP | slower | bytes by shortcut |
| --- | --: | --: | --: | --: | --: | --: |
| stream 64 B | 8.00 Gbit/s | 4.00 Gbit/s | **0.50 (0.50–0.50)** | 1.00 (1.00–1.00) | median | 50.0 % |

### Across two cores, TCP_NODELAY

|  | TCP | shortcut | ratio to TCP | p99 to TCP | TCP to TCP | p99, TCP to TCP | slower | bytes by shortcut |
| --- | --: | --: | --: | --: | --: | --: | --: | --: |
| ping-pong 1 KiB | 10.00 (20.0) µs | 10.00 (20.0) µs | **1.00 (1.00–1.00)** | 1.00 (1.00–1.00) | 0.50 (0.50–0.50) | 0.50 (0.50–0.50) | no | 0.0 % |

### Plain TCP on one core with podshunt loaded and with nothing loaded

|  | before loading | loaded | after unloading | loaded to before | loaded to after |
| --- | --: | --: | --: | --: | --: |
| stream 64 B, nagle | 8.00 Gbit/s | 8.00 Gbit/s | 8.00 Gbit/s | 1.00 | 1.00 |
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

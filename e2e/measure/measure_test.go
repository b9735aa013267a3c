// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	os.Exit(Main(m.Run))
}

// here is an end in the test's own network namespace.
func here(cpu int) End { return End{Start: (*exec.Cmd).Start, CPU: cpu} }

// freeAddress returns a loopback address that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestRun(t *testing.T) {
	for _, tc := range []struct {
		kind        Kind
		size        int
		nonBlocking bool
	}{
		{PingPong, 1, false},
		{PingPong, 64 << 10, true},
		{Stream, 128, true},
		{Stream, 128 << 10, false},
		{Stream, 128 << 10, true},
		{BothWays, 64, true},
		{BothWays, 1 << 20, true},
		{Replies, 64 << 10, true},
		{RandomSizes, 64 << 10, false},
		{RandomSizes, 64 << 10, true},
		{Connect, 0, false},
		{Connect, 0, true},
	} {
		for network, listen := range map[string]string{"tcp": freeAddress(t), "unix": filepath.Join(t.TempDir(), "socket")} {
			t.Run(fmt.Sprintf("%s %d %s", tc.kind, tc.size, network), func(t *testing.T) {
				spec := Spec{
					Kind: tc.kind, Size: tc.size, Duration: 50 * time.Millisecond, WarmUp: 10 * time.Millisecond,
					Listen: listen, NonBlocking: tc.nonBlocking, NoDelay: tc.nonBlocking, Requests: 3,
				}
				began := time.Now()
				got, err := Run(t.Context(), spec, here(-1), here(runtime.NumCPU()-1))
				if err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took < spec.Duration+spec.WarmUp {
					t.Errorf("took %v, want %v and more", took, spec.Duration+spec.WarmUp)
				}
				if got.Count == 0 || got.Rate <= 0 {
					t.Errorf("nothing measured: got %+v", got)
				}
				if hasTimes := got.P50 > 0 && got.P99 >= got.P50; hasTimes == tc.kind.countsBytes() {
					t.Errorf("round trips: got %v and %v", got.P50, got.P99)
				}
				if whole := got.Requests%spec.Requests == 0; !whole || got.Requests/spec.Requests < got.Count && tc.kind == Connect {
					t.Errorf("got %d requests of %d connections, want %d of each, and those of the warm-up", got.Requests, got.Count, spec.Requests)
				}
			})
		}
	}
}

func TestRunFails(t *testing.T) {
	refused := freeAddress(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		spec Spec
		want string
	}{
		{"client refused", t.Context(), Spec{Kind: PingPong, Size: 1, Listen: freeAddress(t), Dial: refused}, "client: exit status 1: connect: connection refused"},
		{"blocking", t.Context(), Spec{Kind: BothWays, Size: 1, Listen: refused}, "needs non-blocking ones"},
		{"bad address", t.Context(), Spec{Kind: Stream, Size: 1, Listen: "[::1]:80"}, "accepted are IPv4 addresses"},
		{"interrupted", ended, Spec{Kind: Connect, Listen: freeAddress(t)}, context.Canceled.Error()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			began := time.Now()
			_, err := Run(tc.ctx, tc.spec, here(0), here(0))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
			if took := time.Since(began); took > grace/2 {
				t.Errorf("took %v, want it to fail at once", took)
			}
		})
	}
}

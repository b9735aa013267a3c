// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newNodeFixture returns a fixture with the clock of the machine and n pods that take part.
func newNodeFixture(b *testing.B, n int) *fixture {
	b.Helper()
	f, source := newClusterFixture(b, func(cfg *Config) {
		cfg.Now = time.Now
		cfg.Redirects = func(string) (bool, error) { return false, nil }
	})
	intents := map[string]Intent{}
	for i := range n {
		w := enabled(fmt.Sprint("uid", i))
		w.Labels = map[string]string{"app": "web", "pod": fmt.Sprint(i)}
		intents[fmt.Sprint("pod", i)] = w
	}
	source.set(intents)
	for i := range n {
		f.mustPut(b, f.attachment(b, fmt.Sprint("pod", i), uint64(100+i)))
	}
	if got := len(f.kernel.enrolled); got != n {
		b.Fatalf("%d of %d pods are enrolled", got, n)
	}
	return f
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkIdle measures minutes in which nothing happens on a node. Run it with -benchtime=1x.
func BenchmarkIdle(b *testing.B) {
	for _, n := range []int{110, 250} {
		b.Run(fmt.Sprint("pods=", n), func(b *testing.B) {
			f := newNodeFixture(b, n)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error, 1)
			go func() { done <- f.Run(ctx) }()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			start, used := time.Now(), cpuTime(b)
			b.ResetTimer()
			for range b.N {
				time.Sleep(time.Minute)
			}
			b.StopTimer()
			used = cpuTime(b) - used
			elapsed := time.Since(start)
			runtime.ReadMemStats(&after)
			cancel()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(100*used.Seconds()/elapsed.Seconds(), "%core")
			b.ReportMetric(float64(after.Mallocs-before.Mallocs)/elapsed.Seconds(), "allocs/s")
		})
	}
}

// BenchmarkPut measures the ADD and DEL of one more pod on a node.
func BenchmarkPut(b *testing.B) {
	for _, n := range []int{110, 250} {
		b.Run(fmt.Sprint("pods=", n), func(b *testing.B) {
			f := newNodeFixture(b, n)
			a := f.attachment(b, "one-more", 9)
			b.ReportAllocs()
			used := cpuTime(b)
			for b.Loop() {
				f.mustPut(b, a)
				if err := f.Remove(a.AttachmentID); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpuTime(b)-used).Microseconds())/float64(b.N), "cpu-us/op")
		})
	}
}

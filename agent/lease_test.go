// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/podshunt/podshunt/agent/datapath"
)

// kernelLease is a datapath's lease without a kernel.
type kernelLease struct {
	until time.Time
	sets  int
	err   error
}

func (k *kernelLease) Lease() (time.Time, error) { return k.until, nil }

func (k *kernelLease) SetLease(length time.Duration) error {
	if k.err != nil {
		return k.err
	}
	k.sets++
	k.until = time.Time{}
	if length > 0 {
		k.until = time.Now().Add(length)
	}
	return nil
}

func TestLease(t *testing.T) {
	refused := errors.New("refused")
	for _, tc := range []struct {
		name   string
		had    time.Duration // 0: none
		length time.Duration
		vouch  error
		set    error

		wantBegun, wantRenewed bool
		wantErr                error
	}{
		{name: "first start", length: time.Hour, wantBegun: true, wantRenewed: true},
		{name: "first start without a source", length: time.Hour, vouch: refused, wantBegun: true, wantErr: refused},
		{name: "the one before has left some", had: time.Minute, length: time.Hour, wantRenewed: true},
		{name: "the one before has left none", had: -time.Minute, length: time.Hour, wantRenewed: true},
		{name: "expired, and no source", had: -time.Minute, length: time.Hour, vouch: refused, wantErr: refused},
		{name: "unloaded", had: time.Minute, length: time.Hour, set: datapath.ErrUnloaded},
		{name: "switched off", had: -time.Minute, wantBegun: true},
		{name: "off as before"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := &kernelLease{err: tc.set}
			if tc.had != 0 {
				k.until = time.Now().Add(tc.had)
			}
			l := &lease{datapath: k, length: tc.length, log: slog.New(slog.DiscardHandler), vouch: func(time.Time) error { return tc.vouch }}
			if err := l.begin(); err != nil {
				t.Fatal(err)
			}
			if got := k.sets > 0; got != tc.wantBegun {
				t.Errorf("set at the start: got %v, want %v", got, tc.wantBegun)
			}
			if tc.length == 0 {
				if s := l.state(); s != nil {
					t.Errorf("got %+v, want no lease", s)
				}
				return
			}
			before := k.sets
			if ok := l.renew(time.Now()); ok != (tc.wantErr == nil) {
				t.Errorf("got %v from renew, want %v", ok, tc.wantErr == nil)
			}
			if got := k.sets > before; got != tc.wantRenewed {
				t.Errorf("renewed: got %v, want %v", got, tc.wantRenewed)
			}
			if !errors.Is(l.err, tc.wantErr) || (l.err == nil) != (tc.wantErr == nil) {
				t.Errorf("got %v, want %v", l.err, tc.wantErr)
			}
			if s := l.state(); s == nil || !s.Until.Equal(k.until) || (s.Error == "") != (tc.wantErr == nil) {
				t.Errorf("got state %+v, want the end %v, and the error if there is one", s, k.until)
			}
		})
	}
}

// TestLeaseRetry: a lease that cannot be renewed at first is renewed soon after it can.
func TestLeaseRetry(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	tries := make(chan struct{}, 3)
	l := &lease{datapath: &kernelLease{}, length: 1000 * time.Hour, log: slog.New(slog.DiscardHandler), vouch: func(time.Time) error {
		tries <- struct{}{}
		if len(tries) < cap(tries) {
			return errors.New("nobody has told of the pods yet")
		}
		cancel()
		return nil
	}}
	if err := l.run(ctx); err != nil {
		t.Error(err)
	}
	if l.err != nil {
		t.Errorf("got %v, want the lease renewed", l.err)
	}
}

func TestLeaseRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	renewed := make(chan struct{}, 1)
	l := &lease{datapath: &kernelLease{}, length: time.Second, log: slog.New(slog.DiscardHandler), vouch: func(time.Time) error {
		select {
		case renewed <- struct{}{}:
		default:
		}
		return nil
	}}
	ended := make(chan error)
	go func() { ended <- l.run(ctx) }()
	for range 3 {
		<-renewed
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

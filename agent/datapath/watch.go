// SPDX-License-Identifier: Apache-2.0

// Watched connections join: the agent's half of bpf/watch.h.

package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/time/rate"

	"github.com/podshunt/podshunt/bpf"
)

// insertRate is how often a second insert_candidates runs at most, and insertBurst how often in
// a row: those that ask faster are inserted together. A run takes some 50 µs of a processor.
const (
	insertRate  = 1000
	insertBurst = 50
)

// watcher puts sockets into the SOCKHASH that have earned it.
type watcher struct {
	objects  *ebpf.Collection
	insert   *link.Iter
	requests *ringbuf.Reader
	limit    *rate.Limiter

	mu    sync.Mutex // held while sockets are inserted
	ended bool       // an unload has begun
}

// CheckWatch returns an error if no watched connection can join on this kernel: it refuses
// the iterator for that.
func CheckWatch() error {
	err := loadProbe(ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "bpf_sk_storage_map"})
	if err != nil {
		return fmt.Errorf("kernel %s refuses programs of type iter/bpf_sk_storage_map: %w", release(), err)
	}
	return nil
}

// NoWatch returns the error of CheckWatch if connections join at their handshake because of
// it, and not once they have earned it.
func (d *Datapath) NoWatch() error { return d.noWatch }

func newWatcher(shared map[string]*ebpf.Map, types *btf.Cache) (_ *watcher, err error) {
	w := &watcher{limit: rate.NewLimiter(insertRate, insertBurst)}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.objects, err = loadIterators(shared, []string{bpf.ShortcutProgInsertCandidates}, types); err != nil {
		return nil, err
	}
	w.insert, err = link.AttachIter(link.IterOptions{
		Program: w.objects.Programs[bpf.ShortcutProgInsertCandidates], Map: shared[bpf.ShortcutMapCandidates],
	})
	if err != nil {
		return nil, fmt.Errorf("attach iterator %s: %w", bpf.ShortcutProgInsertCandidates, err)
	}
	if w.requests, err = ringbuf.NewReader(shared[bpf.ShortcutMapRequests]); err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.ShortcutMapRequests, err)
	}
	return w, nil
}

func (w *watcher) close() error {
	if w == nil {
		return nil
	}
	var errs []error
	if w.requests != nil {
		errs = append(errs, w.requests.Close())
	}
	if w.insert != nil {
		errs = append(errs, w.insert.Close())
	}
	if w.objects != nil {
		w.objects.Close()
	}
	return errors.Join(errs...)
}

// end waits until no socket is being inserted, and lets none be inserted later.
func (w *watcher) end() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
}

// getWatcher returns the watcher, or nil after an unload or if all connections join at their
// handshake.
func (d *Datapath) getWatcher() *watcher {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.watcher
}

// insertAll puts all candidates into the SOCKHASH.
func (w *watcher) insertAll() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return ErrUnloaded
	}
	r, err := openIterator(w.insert)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
		err = errors.Join(err, r.Close())
	}
	return err
}

// JoinAfter returns how many segments of data a connection must have sent and received before
// it joins; 0 if all join at their handshake.
func (d *Datapath) JoinAfter() uint32 { return d.cfg.JoinAfter }

// JoinWatched lets watched connections join as soon as they ask for it, until ctx ends or
// an unload begins. Those that have asked while nobody called it join at once.
func (d *Datapath) JoinWatched(ctx context.Context) error {
	w := d.getWatcher()
	if w == nil {
		return nil
	}
	defer context.AfterFunc(ctx, func() { _ = w.requests.Flush() })() // ends a read
	for {
		if err := w.insertAll(); err != nil {
			return unlessEnded(err)
		}
		if err := w.wait(ctx); err != nil {
			return unlessEnded(err)
		}
	}
}

// wait returns after the next request, within the limit, and takes all that are there then.
func (w *watcher) wait(ctx context.Context) error {
	var request ringbuf.Record
	err := w.requests.ReadInto(&request)
	if err == nil {
		err = sleep(ctx, w.limit.Reserve().Delay())
	}
	w.requests.SetDeadline(time.Unix(1, 0)) // long ago: what is there is read, and no more
	for err == nil {
		err = w.requests.ReadInto(&request)
	}
	w.requests.SetDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// unlessEnded returns an error of watching unless it says that an unload has begun, or that
// the caller wants no more.
func unlessEnded(err error) error {
	for _, end := range []error{ErrUnloaded, ringbuf.ErrFlushed, os.ErrClosed, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, end) {
			return nil
		}
	}
	return fmt.Errorf("let watched connections join: %w", err)
}

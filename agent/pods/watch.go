// SPDX-License-Identifier: Apache-2.0

// The watch of directories, by fsnotify. An event says that it is worth a look, never what
// is so: events get lost.

package pods

import (
	"context"
	"log/slog"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// passInterval is how often everything is looked at that an event should have told
	// of: inotify's queue may have been full, a directory been deleted and made again,
	// a file changed by another node. Nothing tells of a network namespace that is gone.
	passInterval = 10 * time.Second
	// unwatchedInterval takes its place for directories that cannot be watched, because
	// they are not there or the node has no more inotify instances.
	unwatchedInterval = time.Second
	// settleTime is how long what may be a series of events is waited for.
	settleTime = 50 * time.Millisecond
)

// watch calls look when something may have changed in a directory, and once in an
// interval, until ctx ends. Which directories that are is asked each time.
func watch(ctx context.Context, dirs func() []string, interval time.Duration, log *slog.Logger, look func()) {
	var events <-chan fsnotify.Event
	var failures <-chan error
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer watcher.Close()
		events, failures = watcher.Events, watcher.Errors
	} else {
		log.Warn("directories not watched, but looked at from time to time", "interval", unwatchedInterval.String(), "err", err)
	}
	for {
		rest := interval
		for _, dir := range dirs() {
			// Added again each time: the watch of a directory ends with it.
			if watcher == nil || watcher.Add(dir) != nil {
				rest = min(interval, unwatchedInterval)
			}
		}
		// After the watch, which tells of what comes later.
		look()
		timer := time.NewTimer(rest)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case err := <-failures:
			log.Debug("events of directories lost", "err", err)
		case <-events:
			settle(ctx, events)
		}
		timer.Stop()
	}
}

func settle(ctx context.Context, events <-chan fsnotify.Event) {
	timer := time.NewTimer(settleTime)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-events:
		}
	}
}

// notify makes a channel with room for one receive.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

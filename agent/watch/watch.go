// SPDX-License-Identifier: Apache-2.0

// Package watch watches directories by fsnotify. An event only means that a look is
// worth it: callers must not rely on what it says, or on getting one, since events get
// lost.
package watch

import (
	"context"
	"log/slog"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Settle is the pause between a change and the look at it: more changes may follow,
// and files that are written in place are incomplete for a moment.
const Settle = 50 * time.Millisecond

// Config says what to watch; all fields are required.
type Config struct {
	// Dirs returns the directories; it is called before each look.
	Dirs func() []string
	// Interval is the longest time between two looks. Unwatched, if shorter, replaces it
	// while one of the directories cannot be watched, because it is not there or the node
	// has no more inotify instances.
	Interval, Unwatched time.Duration
	Log                 *slog.Logger
}

// Run calls look at once, when something may have changed in a directory, and at least
// once in each interval. It returns nil when ctx ends, or look's error.
func Run(ctx context.Context, cfg Config, look func() error) error {
	var events <-chan fsnotify.Event
	var failures <-chan error
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer watcher.Close()
		events, failures = watcher.Events, watcher.Errors
	} else {
		cfg.Log.Warn("directories not watched, but looked at from time to time", "dirs", cfg.Dirs(), "interval", cfg.Unwatched.String(), "err", err)
	}
	for {
		rest := cfg.Interval
		for _, dir := range cfg.Dirs() {
			// Add it each time: the watch ends when the directory is
			// deleted.
			if watcher == nil || watcher.Add(dir) != nil {
				rest = min(cfg.Interval, cfg.Unwatched)
			}
		}
		// Look after the watch is set, so that no change in between is
		// missed.
		if err := look(); err != nil {
			return err
		}
		timer := time.NewTimer(rest)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case err := <-failures:
			cfg.Log.Debug("events of directories lost", "dirs", cfg.Dirs(), "err", err)
		case <-events:
			settle(ctx, events)
		}
		timer.Stop()
	}
}

// settle waits until a series of events has ended.
func settle(ctx context.Context, events <-chan fsnotify.Event) {
	timer := time.NewTimer(Settle)
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

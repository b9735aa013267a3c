// SPDX-License-Identifier: Apache-2.0

// Package watch watches directories by fsnotify. An event says that it is worth a look,
// never what is so: events get lost.
package watch

import (
	"context"
	"log/slog"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Settle is how long a change is left alone: it may be one of a series, and files that
// are written in place are incomplete for a moment.
const Settle = 50 * time.Millisecond

// Config is what is watched; all of it is required.
type Config struct {
	// Dirs returns the directories; it is asked before each look.
	Dirs func() []string
	// Interval is how often is looked without an event, and Unwatched, where that is
	// shorter, how often while one of the directories cannot be watched, because it is not
	// there or the node has no more inotify instances.
	Interval, Unwatched time.Duration
	Log                 *slog.Logger
}

// Run calls look when something may have changed in a directory, at first and once in an
// interval, until ctx ends or look returns an error, which it returns.
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
			// Added again each time: the watch of a directory ends with it.
			if watcher == nil || watcher.Add(dir) != nil {
				rest = min(cfg.Interval, cfg.Unwatched)
			}
		}
		// After the watch, which tells of what comes later.
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

// settle waits for the end of what may be a series of events.
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

// SPDX-License-Identifier: Apache-2.0

// The watch of directories.

package pods

import (
	"context"
	"log/slog"
	"time"

	"github.com/podshunt/podshunt/agent/watch"
)

const (
	// passInterval is how often everything is looked at that an event should have told
	// of: inotify's queue may have been full, a directory been deleted and made again,
	// a file changed by another node. Nothing tells of a network namespace that is gone.
	passInterval = 10 * time.Second
	// unwatchedInterval takes its place for directories that cannot be watched, because
	// they are not there or the node has no more inotify instances.
	unwatchedInterval = time.Second
)

// watchDirs calls look when something may have changed in one of the directories, and once
// in an interval, until ctx ends.
func watchDirs(ctx context.Context, dirs func() []string, interval time.Duration, log *slog.Logger, look func()) {
	cfg := watch.Config{Dirs: dirs, Interval: interval, Unwatched: unwatchedInterval, Log: log}
	// It fails as look does, never.
	_ = watch.Run(ctx, cfg, func() error { look(); return nil })
}

// notify makes a channel with room for one receive.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

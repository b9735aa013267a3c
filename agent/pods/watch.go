// SPDX-License-Identifier: Apache-2.0

// This file watches directories.

package pods

import (
	"context"
	"log/slog"
	"time"

	"github.com/podshunt/podshunt/agent/watch"
)

const (
	// passInterval is the time between two looks at everything, since events get lost:
	// inotify's queue may be full, a directory be deleted and made again, or a file be
	// changed by another node. The end of a network namespace causes no event at all.
	passInterval = 10 * time.Second
	// unwatchedInterval replaces passInterval for directories that cannot be watched,
	// because they are not there or the node has no more inotify instances.
	unwatchedInterval = time.Second
)

// watchDirs calls look when something may have changed in one of the directories, and at
// least once in each interval, until ctx ends.
func watchDirs(ctx context.Context, dirs func() []string, interval time.Duration, log *slog.Logger, look func()) {
	cfg := watch.Config{Dirs: dirs, Interval: interval, Unwatched: unwatchedInterval, Log: log}
	// Run fails only if look does, which never happens.
	_ = watch.Run(ctx, cfg, func() error { look(); return nil })
}

// notify sends to a channel with room for one, unless something is in it.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

package store

import (
	"log/slog"
	"time"
)

const (
	// slowCommit is what a commit may take before the log says so.
	slowCommit = time.Second
	// slowPause is how much time is between two such warnings, at least.
	slowPause = time.Minute
)

// watchdog warns of commits that take long, while they do: a disk that hangs
// lets none of them end.
type watchdog struct {
	log *slog.Logger
	// last is when it has warned last; only one commit is watched at a time.
	last time.Time
}

// watch watches a commit until done is called.
func (w *watchdog) watch() (done func()) {
	begin := time.Now()
	stop, stopped := make(chan struct{}), make(chan struct{})
	timer := time.AfterFunc(max(slowCommit, w.last.Add(slowPause).Sub(begin)), func() {
		defer close(stopped)
		w.warn(begin, stop)
	})
	return func() {
		close(stop)
		if !timer.Stop() {
			<-stopped
			w.log.Warn("the slow commit has ended", "took", time.Since(begin).Round(time.Millisecond))
		}
	}
}

// warn warns now, and again while it goes on.
func (w *watchdog) warn(begin time.Time, stop <-chan struct{}) {
	ticker := time.NewTicker(slowPause)
	defer ticker.Stop()
	for {
		w.last = time.Now()
		w.log.Warn("the disk is slow: changes wait for a commit, reads go on", "for", w.last.Sub(begin).Round(time.Millisecond))
		select {
		case <-ticker.C:
		case <-stop:
			return
		}
	}
}

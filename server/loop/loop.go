// Package loop supervises the goroutines that work in the background for as long
// as the process lives. A panic or an error in one of them ends neither the
// process nor the work: it is logged and counted, and the loop goes on after a
// wait. Each loop has a heartbeat, so that one that hangs is seen from outside.
package loop

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// How long a loop waits after a failure: the first wait, doubled each time up to
// the last, each varied by up to a half. A loop with a shorter interval never
// waits longer than that.
const (
	firstWait = 200 * time.Millisecond
	maxWait   = 10 * time.Second
	// steady is how long a long-running loop must have run for its end to count as
	// the first failure.
	steady = time.Minute
)

// hangs is how far beyond its deadline a round is taken for one that never ends.
const hangs = 30 * time.Second

// errEnded is the failure of a long-running loop that returned without a reason.
var errEnded = errors.New("ended by itself")

// Group owns the goroutines of its loops. Each of them ends with the context that
// it was started with, and Wait waits for all.
type Group struct {
	log *slog.Logger
	wg  sync.WaitGroup

	mu    sync.Mutex
	loops []*loop // in the order of their start
}

// New returns a group without loops.
func New(log *slog.Logger) *Group { return &Group{log: log} }

// Every calls round at once, and again whenever the interval has passed since its
// end, until ctx ends. The round's own context ends after the timeout. A round
// that fails or panics is made again after a wait of its own, never longer than
// the interval.
//
// The heartbeat is a round without an error. The loop is stale when there was
// none for three intervals and the timeout; it hangs when a round is still not
// over half a minute after its timeout.
//
// done is closed when the goroutine has ended.
func (g *Group) Every(ctx context.Context, name string, interval, timeout time.Duration, round func(context.Context) error) {
	l := g.add(name, 3*interval+timeout)
	l.timeout = timeout
	wait := newBackOff(min(firstWait, interval), min(maxWait, interval))
	g.start(ctx, l, func() time.Duration {
		err := l.call(func() error {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			return round(ctx)
		})
		if ctx.Err() != nil {
			return 0
		}
		if err == nil {
			wait.Reset()
			l.beat()
			return interval
		}
		return l.failed(ctx, err, min(wait.NextBackOff(), interval))
	})
}

// Run calls run, which returns when ctx ends; if it returns before that, or
// panics, it is called again after a wait. It calls beat, from any goroutine,
// whenever it has seen that all is well, and is stale when it did not for longer
// than limit. With limit 0 it needs no heartbeat: it is stale while it does not
// run.
func (g *Group) Run(ctx context.Context, name string, limit time.Duration, run func(ctx context.Context, beat func()) error) {
	l := g.add(name, limit)
	wait := newBackOff(firstWait, maxWait)
	g.start(ctx, l, func() time.Duration {
		began := time.Now()
		err := l.call(func() error { return run(ctx, l.beat) })
		if ctx.Err() != nil {
			return 0
		}
		if err == nil {
			err = errEnded
		}
		if time.Since(began) >= steady {
			wait.Reset()
		}
		return l.failed(ctx, err, min(wait.NextBackOff(), maxWait))
	})
}

func newBackOff(first, most time.Duration) *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval, b.Multiplier = first, most, 2
	b.Reset()
	return b
}

// Wait returns when every loop has ended. No loop is started after it was called.
func (g *Group) Wait() { g.wg.Wait() }

// Status tells how each loop does, in the order of their start.
func (g *Group) Status() []Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]Status, 0, len(g.loops))
	for _, l := range g.loops {
		all = append(all, l.status())
	}
	return all
}

func (g *Group) add(name string, limit time.Duration) *loop {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range g.loops {
		if l.name == name {
			panic("loop: two loops are called " + name)
		}
	}
	l := &loop{name: name, log: g.log.With("loop", name), limit: limit, start: time.Now()}
	g.loops = append(g.loops, l)
	return l
}

// start calls turn over and over until ctx ends, with the pause that it returns
// in between.
func (g *Group) start(ctx context.Context, l *loop, turn func() time.Duration) {
	g.wg.Go(func() {
		defer l.end()
		timer := time.NewTimer(0)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			if ctx.Err() != nil {
				return
			}
			timer.Reset(turn())
		}
	})
}

// loop is what is known of a loop. Its goroutine and those who ask for its status
// share it.
type loop struct {
	name    string
	log     *slog.Logger
	limit   time.Duration // without a heartbeat
	timeout time.Duration // of a round; 0: long-running
	start   time.Time

	mu       sync.Mutex
	began    time.Time // of the call in flight; zero between two
	lastBeat time.Time
	lastErr  error
	errTime  time.Time
	failures int // since the last heartbeat
	restarts uint64
	panics   uint64
	ended    bool
}

// call makes one call of the loop's function and turns a panic into an error.
func (l *loop) call(f func() error) (err error) {
	l.mu.Lock()
	l.began = time.Now()
	l.mu.Unlock()
	defer func() {
		p := recover()
		if p != nil {
			l.log.Error("panic in a background loop", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.began = time.Time{}
		if p != nil {
			l.panics++
		}
	}()
	return f()
}

// beat notes that all is well.
func (l *loop) beat() {
	l.mu.Lock()
	failures := l.failures
	l.lastBeat, l.failures = time.Now(), 0
	l.mu.Unlock()
	if failures > 0 {
		l.log.Info("background loop works again", "failures", failures)
	}
}

// failed notes that the loop has to be restarted after the wait, and returns it.
func (l *loop) failed(ctx context.Context, err error, wait time.Duration) time.Duration {
	l.mu.Lock()
	l.lastErr, l.errTime = err, time.Now()
	l.failures++
	l.restarts++
	l.mu.Unlock()
	l.log.WarnContext(ctx, "background loop failed", "error", err, "restart_in", wait)
	return wait
}

func (l *loop) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
}

// Status is how a loop does.
type Status struct {
	Name string
	// LastBeat is the time of the last heartbeat; zero: none yet.
	LastBeat time.Time
	// LastError is the last failure, with its time; nil: none yet.
	LastError     error
	LastErrorTime time.Time
	// Restarts counts failures, Panics those of them that were panics.
	Restarts, Panics uint64
	// Stale: it had no heartbeat for too long, whether it hangs or fails again and
	// again.
	Stale bool
	// Hangs: a round does not come to its end, though its deadline has long passed.
	Hangs bool
}

func (l *loop) status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Status{
		Name:     l.name,
		LastBeat: l.lastBeat, LastError: l.lastErr, LastErrorTime: l.errTime,
		Restarts: l.restarts, Panics: l.panics,
	}
	if l.ended {
		return s // on purpose: nobody waits for its heartbeat any more
	}
	last := l.lastBeat
	if last.IsZero() {
		last = l.start
	}
	if l.limit > 0 {
		s.Stale = time.Since(last) > l.limit
	} else {
		s.Stale = l.began.IsZero() && l.restarts > 0
	}
	s.Hangs = l.timeout > 0 && !l.began.IsZero() && time.Since(l.began) > l.timeout+hangs
	return s
}

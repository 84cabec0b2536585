package workspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// actor brings one workspace's container to what its record asks for. It alone
// creates, starts, stops and removes the workspace's containers. Its supervisor
// owns it: kick and interrupt reach it from any goroutine and never block,
// everything below `local` belongs to the goroutine of run, of which there is
// one at most. While there is nothing to do there is none.
type actor struct {
	id   string
	sup  *Supervisor
	next atomic.Pointer[actor] // the registry's
	kick chan struct{}         // size 1: the pending flag; what is pending stands on disk
	life atomic.Int32          // awake, asleep or retired

	// A pass's context ends when the workspace is stopped or deleted, and with it
	// the effect in flight.
	mu         sync.Mutex
	cancelPass context.CancelCauseFunc

	log   *slog.Logger
	first *listed // by the boot, for the first pass; nil: ask
	local actorState
}

// listed are a workspace's instances as the boot has found them. Nobody but the
// actor changes them; that one has ended since is seen when it is watched.
type listed struct {
	uid       string
	instances []runtime.Instance
}

// An actor's life. Who kicks leaves the token and then looks at the life; who
// goes to sleep, or retires, says so and then looks at the token. So one of the
// two sees the other, and no kick is lost.
const (
	awake   int32 = iota // it has a goroutine, which will look at the token
	asleep               // it has none: who swaps this for awake starts one
	retired              // forgotten, or about to be: the supervisor's lock tells
)

// actorState is what an actor remembers between passes. Losing it costs nothing
// but a delay. Its maps are made when something is put there.
type actorState struct {
	uid            string                   // of the workspace it remembers this of
	attempts       int                      // failed attempts since the last good one
	failure        *store.Failure           // the newest, recorded or not
	exits          int                      // ends in a row that are waited after
	fallbackAt     time.Time                // not before this is the last good spec started again
	stuck          map[string]time.Time     // not before this is a clean-up tried again
	stuckFor       map[string]time.Duration // the wait before that
	fallbackFailed int64
	unrotatable    string              // an instance that takes in no other files as it runs
	prepared       map[string]prepared // by standby: what it was prepared from
	rollout        func()              // ends its turn in a rollout; nil: it has none
	exit           *exitWatch          // of the container that runs; nil: none
}

// prepared is what a standby was prepared from.
type prepared struct {
	spec  store.Spec
	token seal.Plaintext // empty: it gets none
}

// exitWatch watches a container.
type exitWatch struct {
	id    string
	ended atomic.Bool
	stop  func()
}

var errInterrupted = errors.New("interrupted: the workspace was stopped or deleted")

// newActor returns an actor that sleeps.
func newActor(sup *Supervisor, id string) *actor {
	// A copy: an id that comes out of a record keeps all of its row in memory.
	a := &actor{id: strings.Clone(id), sup: sup, kick: make(chan struct{}, 1)}
	a.life.Store(asleep)
	return a
}

// hint leaves the token. If the life that it returns is awake the actor will look.
func (a *actor) hint() (life int32) {
	if len(a.kick) == 0 { // asking costs less than the send that does nothing
		signal(a.kick)
	}
	return a.life.Load()
}

// kicked reports whether the token lies there. It takes it and gives it back: so
// the look is atomic, and comes after what was said of the life before. len is not.
func (a *actor) kicked() bool {
	select {
	case <-a.kick:
		signal(a.kick)
		return true
	default:
		return false
	}
}

// interrupt ends the effect in flight. The stop or deletion is on disk already:
// a pass that begins after this reads it.
func (a *actor) interrupt() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cancelPass != nil {
		a.cancelPass(errInterrupted)
	}
}

// run is the actor's goroutine. It returns when there is nothing to do before a
// kick, when the workspace is gone, or when ctx ends.
func (a *actor) run(ctx context.Context) {
	a.log = a.sup.cfg.Logger.With("workspace", a.id)
	var due <-chan time.Time
	for {
		if due == nil && a.sleep() {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-a.kick:
		case <-due:
		}
		// The token is taken; from here on the record is read.
		a.sup.busy.enter()
		next, gone := a.work(ctx)
		a.sup.busy.leave()
		due = nil
		switch {
		case gone:
			a.unwatch()
			if a.sup.retire(a) {
				return
			}
		case !next.IsZero():
			// A clock that is set back meanwhile stretches no wait. A timer that
			// nobody reads any more is collected.
			due = time.After(min(max(0, next.Sub(a.sup.now())), a.sup.maxWait()))
		}
	}
}

// sleep reports whether the goroutine has to end: there is no token, or another
// goroutine was started to take it.
func (a *actor) sleep() bool {
	if len(a.kick) > 0 {
		return false
	}
	log := a.log
	a.log = nil // it is as large as all the rest
	a.life.Store(asleep)
	if !a.kicked() || !a.life.CompareAndSwap(asleep, awake) {
		return true
	}
	a.log = log
	return false
}

// work makes passes until there is nothing left to do now. next is when to look
// again without a kick; gone: there is no such workspace any more.
func (a *actor) work(ctx context.Context) (next time.Time, gone bool) {
	defer a.leaveRollout()
	for again := true; again && ctx.Err() == nil; {
		err := a.guard(ctx, func() (err error) {
			again, next, err = a.pass(ctx)
			return err
		})
		if errors.Is(err, store.ErrNotFound) {
			return time.Time{}, true
		}
		if err != nil {
			again, next = false, a.sup.now().Add(a.sup.cfg.Backoff.Max) // should trouble panic too
			_ = a.guard(ctx, func() error {
				next = a.trouble(ctx, err)
				return nil
			})
		}
	}
	return next, false
}

// guard turns a panic into an error: the actor lives.
func (a *actor) guard(ctx context.Context, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			a.log.ErrorContext(ctx, "panic in a cycle", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			a.sup.panics.Add(1)
			err = &runtime.Error{Reason: reasonPanic, Message: "internal error in the daemon; its log has the stack"}
		}
	}()
	return f()
}

// pass reads, observes, decides, and does one effect. An error means that
// reading, observing or recording failed; an effect's own failure is recorded
// and is none.
func (a *actor) pass(ctx context.Context) (again bool, at time.Time, err error) {
	passCtx, cancel := context.WithCancelCause(ctx)
	a.mu.Lock()
	a.cancelPass = cancel
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.cancelPass = nil
		a.mu.Unlock()
		cancel(nil)
	}()

	ws, err := a.sup.cfg.Store.Workspace(a.id)
	if err != nil {
		return false, time.Time{}, err
	}
	if a.local.uid != ws.UID {
		a.reset(&ws)
	}
	instances, err := a.list(passCtx, ws.UID)
	if err != nil {
		if errors.Is(context.Cause(passCtx), errInterrupted) {
			return true, time.Time{}, nil
		}
		return false, time.Time{}, err
	}
	now := a.sup.now()
	s := decide(view{
		ws:             &ws,
		instances:      instances,
		failure:        a.local.failure,
		stuck:          a.local.stuck,
		fallbackFailed: a.local.fallbackFailed,
		fallbackAt:     a.local.fallbackAt,
		unrotatable:    a.local.unrotatable,
		maxWait:        a.sup.maxWait(),
		now:            now,
	})
	if a.sup.draining.Load() && (s.action == actPrepare || s.action == actFallback) {
		return false, time.Time{}, nil // the successor's: pending is on disk
	}
	if s.action != actIdle && s.action != actWait {
		a.log.DebugContext(ctx, "step", "action", s.action.String(), "instance", s.instance.ID,
			"generation", ws.Generation, "observed", ws.Status.ObservedGeneration)
	}
	return a.do(ctx, passCtx, &ws, s)
}

// reset forgets what was remembered of an earlier workspace of the same id.
func (a *actor) reset(ws *store.Workspace) {
	a.unwatch()
	a.leaveRollout()
	st := &ws.Status
	a.local = actorState{uid: strings.Clone(ws.UID), failure: st.Failure} // no part of the record's row
	// What failed or ended again and again goes on doing so at its pace.
	if f := st.Failure; f != nil && f.Reason != string(reasonExited) {
		a.local.attempts = f.Attempt
	}
	a.local.exits = st.Crashes.InARow
	if st.EndedGeneration != 0 && st.LastExit != nil {
		a.local.fallbackAt = st.LastExit.Time.Add(a.sup.cfg.Backoff.wait(a.local.exits))
	}
}

// trouble notes that a pass could not be made, and returns when to try again.
func (a *actor) trouble(ctx context.Context, err error) time.Time {
	if ctx.Err() != nil {
		return time.Time{}
	}
	a.log.ErrorContext(ctx, "can't work on the workspace", "error", err)
	ws, readErr := a.sup.cfg.Store.Workspace(a.id)
	f := a.local.failure
	held := f != nil && f.Generation == ws.Generation && f.NextAttempt.IsZero()
	if readErr != nil || !ws.Pending() || held {
		a.local.attempts++
		return a.sup.now().Add(a.sup.cfg.Backoff.wait(a.local.attempts))
	}
	// A caller who waits for the generation learns why it does not come.
	return a.fail(ctx, &ws, err, false)
}

// watchExit watches the instance's end, and no other's any longer. The empty id
// watches nothing. When that can't be it returns when to try again.
func (a *actor) watchExit(ctx context.Context, id string) (retry time.Time) {
	w := a.local.exit
	if w != nil && w.id == id && !w.ended.Load() {
		return time.Time{}
	}
	a.unwatch()
	if id == "" {
		return time.Time{}
	}
	w = &exitWatch{id: strings.Clone(id)} // no part of the record's row
	wctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.List)
	defer cancel()
	err := a.guard(ctx, func() (err error) {
		w.stop, err = a.sup.cfg.Runtime.Watch(wctx, id, func(runtime.Exit) {
			w.ended.Store(true)
			a.sup.wake(a)
		})
		return err
	})
	if err == nil {
		a.local.exit = w
		return time.Time{}
	}
	if ctx.Err() != nil {
		return time.Time{}
	}
	// Unknown is not dead. The actor asks again, but not in a tight loop.
	a.log.WarnContext(ctx, "can't watch the container", "instance", id, "error", err)
	return a.sup.now().Add(a.sup.cfg.Deadlines.WaitRetry)
}

// unwatch ends the watch, if there is one.
func (a *actor) unwatch() {
	if w := a.local.exit; w != nil {
		w.stop()
		a.local.exit = nil
	}
}

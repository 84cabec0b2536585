package workspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// actor brings one workspace's container to what its record asks for. It alone
// creates, starts, stops and removes the workspace's containers. Its supervisor
// owns it: kick and interrupt reach it from any goroutine and never block,
// everything below `local` belongs to the goroutine of run.
type actor struct {
	id   string
	sup  *Supervisor
	log  *slog.Logger
	kick chan struct{} // size 1: the pending flag; what is pending stands on disk
	done chan struct{} // closed when run has returned

	// A pass's context ends when the workspace is stopped or deleted, and with it
	// the effect in flight.
	mu         sync.Mutex
	cancelPass context.CancelCauseFunc

	local actorState
}

// actorState is what an actor remembers between passes. Losing it costs nothing
// but a delay.
type actorState struct {
	uid            string // of the workspace it remembers this of
	backoff        *backoff.ExponentialBackOff
	attempts       int            // failed attempts since the last good one
	failure        *store.Failure // the newest, recorded or not
	exits          *backoff.ExponentialBackOff
	fallbackAt     time.Time                // not before this is the last good spec started again
	stuck          map[string]time.Time     // not before this is a clean-up tried again
	stuckFor       map[string]time.Duration // the wait before that
	fallbackFailed int64
	prepared       map[string]store.Spec // by standby: the spec it was prepared from
	rollout        func()                // ends its turn in a rollout; nil: it has none
	exit           exitWait
}

// exitWait watches the container that runs.
type exitWait struct {
	id     string
	ended  <-chan struct{} // closed when it ended, or can't be watched any longer
	cancel context.CancelFunc
}

// maxSteps is how many doublings bring every backoff to its end.
const maxSteps = 32

var errInterrupted = errors.New("interrupted: the workspace was stopped or deleted")

func newActor(sup *Supervisor, id string) *actor {
	return &actor{
		id:    id,
		sup:   sup,
		log:   sup.cfg.Logger.With("workspace", id),
		kick:  make(chan struct{}, 1),
		done:  make(chan struct{}),
		local: actorState{backoff: sup.cfg.Backoff.policy()},
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

// run is the actor's goroutine. It returns when ctx ends, or when the workspace
// is gone.
func (a *actor) run(ctx context.Context) {
	defer close(a.done)
	defer a.watchExit(ctx, "")
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.kick:
		case <-timer.C:
		case <-a.local.exit.ended:
			a.watchExit(ctx, "") // the next pass finds out, and watches anew
		}
		// The token is taken; from here on the record is read.
		timer.Stop()
		a.sup.busy.enter()
		next, gone := a.work(ctx)
		a.sup.busy.leave()
		if gone && a.sup.retire(a) {
			return
		}
		if !next.IsZero() {
			// A clock that is set back meanwhile stretches no wait.
			timer.Reset(min(max(0, next.Sub(a.sup.now())), a.sup.maxWait()))
		}
	}
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
		a.reset(ctx, &ws)
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
func (a *actor) reset(ctx context.Context, ws *store.Workspace) {
	a.watchExit(ctx, "")
	a.leaveRollout()
	a.local = actorState{
		uid:      ws.UID,
		backoff:  a.sup.cfg.Backoff.policy(),
		exits:    a.sup.cfg.Backoff.policy(),
		failure:  ws.Status.Failure,
		stuck:    make(map[string]time.Time),
		stuckFor: make(map[string]time.Duration),
		prepared: make(map[string]store.Spec),
	}
	// What failed or ended again and again goes on doing so at its pace.
	st := &ws.Status
	if f := st.Failure; f != nil && f.Reason != string(reasonExited) {
		a.local.attempts = f.Attempt
		for range min(f.Attempt, maxSteps) {
			a.local.backoff.NextBackOff()
		}
	}
	var wait time.Duration
	for range min(st.Crashes.InARow, maxSteps) {
		wait = a.local.exits.NextBackOff()
	}
	if st.EndedGeneration != 0 && st.LastExit != nil {
		a.local.fallbackAt = st.LastExit.Time.Add(wait)
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
		return a.sup.now().Add(a.local.backoff.NextBackOff())
	}
	// A caller who waits for the generation learns why it does not come.
	return a.fail(ctx, &ws, err, false)
}

// watchExit watches the instance's end, and no other's any longer. The empty id
// watches nothing. It waits for the goroutine it replaces.
func (a *actor) watchExit(ctx context.Context, id string) {
	w := &a.local.exit
	if w.id == id {
		return
	}
	if w.cancel != nil {
		w.cancel()
		<-w.ended
	}
	*w = exitWait{id: id}
	if id == "" {
		return
	}
	waitCtx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	w.cancel, w.ended = cancel, ended
	go func() {
		defer close(ended)
		err := a.guard(waitCtx, func() error {
			_, err := a.sup.cfg.Runtime.Wait(waitCtx, id)
			return err
		})
		if err == nil || waitCtx.Err() != nil {
			return
		}
		// Unknown is not dead. The actor asks again, but not in a tight loop.
		a.log.WarnContext(waitCtx, "can't watch the container", "instance", id, "error", err)
		pause := time.NewTimer(a.sup.cfg.Deadlines.WaitRetry)
		defer pause.Stop()
		select {
		case <-pause.C:
		case <-waitCtx.Done():
		}
	}()
}

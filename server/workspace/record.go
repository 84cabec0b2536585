package workspace

import (
	"context"
	"errors"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// record writes the status. Only the actor does.
func (a *actor) record(ctx context.Context, step string, ws *store.Workspace, edit func(store.Workspace, *store.Status)) error {
	// The daemon's end does not cut off the record of what was done.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.sup.cfg.Deadlines.Store)
	defer cancel()
	return a.sup.cfg.Around(ctx, step, func(ctx context.Context) error {
		now, err := a.sup.cfg.Store.UpdateStatus(ctx, ws.ID, ws.UID, edit)
		if err == nil {
			*ws = now
		}
		return err
	})
}

// recordStart records the container that runs, and the generation it was
// started with. If that fails the next pass finds the container and adopts it.
// spec is what it was prepared from, nil when that is not known.
func (a *actor) recordStart(ctx context.Context, ws *store.Workspace, in runtime.Instance, spec *store.Spec) error {
	err := a.record(ctx, stepStatusObserved, ws, func(w store.Workspace, st *store.Status) {
		hash := ""
		switch r, t := st.Running, st.Token; {
		case t != nil && t.InstanceID == in.ID:
			hash = t.Hash
		case r != nil && r.InstanceID == in.ID:
			hash = r.TokenHash
		}
		st.Token = nil // whose else it was, that one is gone or never gets it
		st.Running = &store.Running{
			InstanceID:     in.ID,
			PID:            in.PID,
			ImageDigest:    in.ImageDigest,
			StartTime:      in.StartTime,
			SecretVersions: in.SecretVersions,
			GlobalSecrets:  in.GlobalSecrets,
			TokenHash:      hash,
		}
		st.ObservedGeneration = in.Generation
		st.StartingGeneration = 0
		st.EndedGeneration = 0
		if spec != nil {
			st.LastGood = &store.LastGood{Generation: in.Generation, Spec: *spec}
		}
		if st.Starts > 0 {
			st.RestartCount++
		}
		st.Starts++
		if st.Failure != nil && st.Failure.Generation <= in.Generation {
			st.Failure = nil
		}
	})
	if err != nil {
		return err
	}
	if f := a.local.failure; f != nil && f.Generation <= in.Generation {
		a.calm()
		a.local.failure = nil
	}
	a.local.prepared = nil
	return nil
}

// recordRotation records what the running container has now. If that fails the next
// pass finds it in the runtime's record.
func (a *actor) recordRotation(ctx context.Context, ws *store.Workspace, in runtime.Instance) error {
	err := a.record(ctx, stepStatusRotated, ws, func(_ store.Workspace, st *store.Status) {
		if st.Running == nil || st.Running.InstanceID != in.ID {
			return
		}
		st.Running.SecretVersions, st.Running.GlobalSecrets = in.SecretVersions, in.GlobalSecrets
		st.ObservedGeneration = in.Generation
		st.StartingGeneration = 0
		if st.Failure != nil && st.Failure.Generation <= in.Generation {
			st.Failure = nil
		}
	})
	if err != nil {
		return err
	}
	if f := a.local.failure; f != nil && f.Generation <= in.Generation {
		a.calm()
		a.local.failure = nil
	}
	return nil
}

// recordExit records that the container on record is gone. One that ended by
// itself is started again, if its crash policy says so, after a wait that grows
// unless it ran well for a while. What it says nothing about is the newest
// generation, where that is another one: neither its failure nor its next attempt
// change.
//
// Nothing is left of the container when in has no id: the machine was restarted,
// say. That is no end of its own: it counts for no policy.
func (a *actor) recordExit(ctx context.Context, ws *store.Workspace, in runtime.Instance) error {
	a.unwatch()
	if in.Stopped { // by this actor, and then the daemon died
		return a.record(ctx, stepStatusStopped, ws, func(_ store.Workspace, st *store.Status) { st.Running = nil })
	}
	now := a.sup.now()
	exit := runtime.Exit{Time: now}
	if in.Exit != nil {
		exit = *in.Exit
	}
	lost := in.ID == ""
	ended := now
	if exit.Known && exit.Time.Before(now) { // it may have been noticed late
		ended = exit.Time
	}
	crashes := a.countCrash(ws, ended, lost)
	a.local.exits++
	next := now.Add(a.sup.cfg.Backoff.wait(a.local.exits))
	a.log.WarnContext(ctx, "container ended by itself", "instance", ws.Status.Running.InstanceID,
		"lost", lost, "code", exit.Code, "known", exit.Known, "signal", exit.Signal, "oom", exit.OOMKilled, "times", crashes.InARow)

	recorded := &store.Exit{Code: exit.Code, Known: exit.Known, Signal: exit.Signal, OOMKilled: exit.OOMKilled, Time: exit.Time}
	failure := a.local.failure
	switch {
	case ws.NeedsStart():
		a.local.fallbackAt = next
	case ws.Spec.CrashPolicy.Restart != store.CrashRestartAlways && ws.Spec.CrashPolicy.Restart != "" && !recorded.Failed():
		failure = nil // it has done what it was made for
	default:
		failure = &store.Failure{
			Generation:  ws.Generation,
			Reason:      string(reasonExited),
			Message:     exitMessage(exit),
			Attempt:     crashes.InARow,
			Time:        now,
			NextAttempt: next,
		}
	}
	a.local.failure = failure
	return a.record(ctx, stepStatusExit, ws, func(_ store.Workspace, st *store.Status) {
		st.Running = nil
		st.StartingGeneration = 0
		st.LastExit = recorded
		st.Crashes = crashes
		if !lost {
			st.EndedGeneration = st.ObservedGeneration
		}
		st.Failure = failure
	})
}

// countCrash counts an end of the container on record. After one that ran well
// for a while, and in a new generation, it begins anew, and so do the waits.
func (a *actor) countCrash(ws *store.Workspace, ended time.Time, lost bool) store.Crashes {
	st := &ws.Status
	crashes := store.Crashes{Generation: st.ObservedGeneration, InARow: st.Crashes.InARow}
	ranWell := ended.Sub(st.Running.StartTime) >= a.sup.cfg.Backoff.Reset
	if ranWell || st.Crashes.Generation != st.ObservedGeneration {
		a.local.exits = 0
		crashes.InARow = 0
	}
	if !lost {
		crashes.InARow++
	}
	return crashes
}

// settle clears what the status says of a cycle that is no longer there.
func (a *actor) settle(ctx context.Context, ws *store.Workspace) error {
	if ws.Parked {
		return a.record(ctx, stepStatusSettled, ws, func(_ store.Workspace, st *store.Status) {
			st.Running = nil
			st.Token = nil
			st.StartingGeneration = 0
		})
	}
	a.calm()
	a.local.failure = nil
	return a.record(ctx, stepStatusSettled, ws, func(_ store.Workspace, st *store.Status) {
		st.StartingGeneration = 0
		st.Token = nil
		st.Failure = nil
	})
}

// failed records that the cycle failed, unless it was interrupted. oldGone: the
// old container has ended.
func (a *actor) failed(ctx, passCtx context.Context, ws *store.Workspace, err error, oldGone bool) error {
	if interrupted(ctx, passCtx, err) {
		if !oldGone || ws.Status.Running == nil {
			return nil
		}
		return a.record(ctx, stepStatusStopped, ws, func(_ store.Workspace, st *store.Status) { st.Running = nil })
	}
	attrs := []any{"generation", ws.Generation, "attempt", a.local.attempts + 1, "error", err, "old_container_ended", oldGone}
	if cause := errors.Unwrap(err); cause != nil {
		attrs = append(attrs, "cause", cause)
	}
	a.log.ErrorContext(ctx, "cycle failed", attrs...)
	a.fail(ctx, ws, err, oldGone)
	return nil
}

// fail records a failed attempt and returns when the next one is due. That it
// can't be recorded changes nothing for the actor.
func (a *actor) fail(ctx context.Context, ws *store.Workspace, err error, oldGone bool) time.Time {
	var re *runtime.Error
	// A command that every check found good and that can't be executed all the
	// same would take the workspace down again at each try: it waits for a
	// change, while the last good spec runs.
	held := oldGone && errors.As(err, &re) && re.Permanent &&
		ws.Status.LastGood != nil && ws.Status.LastGood.Generation < ws.SpecGeneration
	failure := a.newFailure(ws, err, held)
	a.local.failure = failure
	recErr := a.record(ctx, stepStatusFailure, ws, func(w store.Workspace, st *store.Status) {
		if w.Parked || w.Deleting != nil {
			return
		}
		st.StartingGeneration = 0
		if oldGone {
			st.Running = nil
		}
		st.Failure = failure
	})
	if recErr != nil {
		a.log.ErrorContext(ctx, "can't record a failure", "error", recErr)
	}
	return failure.NextAttempt
}

func (a *actor) newFailure(ws *store.Workspace, err error, held bool) *store.Failure {
	a.local.attempts++
	now := a.sup.now()
	reason, message := explain(err)
	f := &store.Failure{
		Generation: ws.Generation,
		Reason:     string(reason),
		Message:    message,
		Attempt:    a.local.attempts,
		Time:       now,
	}
	if !held {
		f.NextAttempt = now.Add(a.sup.cfg.Backoff.wait(a.local.attempts))
	}
	return f
}

// calm forgets past failures: the next one waits as little as the first.
func (a *actor) calm() {
	a.local.attempts = 0
	a.local.fallbackFailed = 0
}

// explain says why a cycle failed in words that a caller may read.
func explain(err error) (runtime.Reason, string) {
	var re *runtime.Error
	var ke *store.KeyError
	switch {
	case errors.As(err, &re):
		return re.Reason, re.Message
	case errors.As(err, &ke):
		return reasonSecretUnreadable, "secret " + ke.Key + " can't be opened with this daemon's key; set or delete it"
	case errors.Is(err, context.DeadlineExceeded):
		return runtime.ReasonTimeout, "a step took longer than its deadline; the daemon's log tells which"
	default:
		return runtime.ReasonRuntimeError, "the container runtime failed; the daemon's log tells more"
	}
}

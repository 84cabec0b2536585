package workspace

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// Reasons that the actor gives besides those of runtime.
const (
	reasonSecretUnreadable runtime.Reason = "SECRET_UNREADABLE" // a secret can't be opened, or not be delivered
	reasonExited           runtime.Reason = "CONTAINER_EXITED"  // the container ended by itself
	reasonPanic            runtime.Reason = "INTERNAL"          // the daemon's own fault
)

// do does one step's effect and records it. passCtx ends when the workspace is
// stopped or deleted, ctx when the daemon shuts down.
func (a *actor) do(ctx, passCtx context.Context, ws *store.Workspace, s step) (again bool, at time.Time, err error) {
	switch s.action {
	case actIdle, actWait:
		retry := a.watchRunning(passCtx, ws)
		if errors.Is(context.Cause(passCtx), errInterrupted) {
			return true, time.Time{}, nil // it may have cut that short
		}
		return false, earlier(s.at, retry), nil
	case actRemove:
		a.remove(passCtx, ws, s.instance.ID)
	case actStop:
		return true, time.Time{}, a.stop(ctx, passCtx, ws, s.instance)
	case actRecordExit:
		return true, time.Time{}, a.recordExit(ctx, ws, s.instance)
	case actAdopt:
		return true, time.Time{}, a.recordStart(ctx, ws, s.instance, a.specOf(ws, &s.instance))
	case actSettle:
		return true, time.Time{}, a.settle(ctx, ws)
	case actPrepare:
		return true, time.Time{}, a.begin(ctx, passCtx, ws)
	case actSwitch:
		return true, time.Time{}, a.change(ctx, passCtx, ws, s.instance, s.old)
	case actRotate:
		return true, time.Time{}, a.rotate(ctx, passCtx, ws, s.instance)
	case actFallback:
		return true, time.Time{}, a.fallBack(ctx, passCtx, ws)
	case actFinishDeletion:
		return a.finishDeletion(ctx, passCtx, ws)
	}
	return true, time.Time{}, nil
}

// watchRunning watches the container on record, if any. When that can't be it
// returns when to try again.
func (a *actor) watchRunning(ctx context.Context, ws *store.Workspace) (retry time.Time) {
	id := ""
	if r := ws.Status.Running; r != nil && !ws.Parked && ws.Deleting == nil {
		id = r.InstanceID
	}
	return a.watchExit(ctx, id)
}

func (a *actor) list(ctx context.Context, uid string) ([]runtime.Instance, error) {
	if first := a.first; first != nil {
		a.first = nil
		if first.uid == uid {
			return first.instances, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.List)
	defer cancel()
	return a.sup.cfg.Runtime.List(ctx, uid)
}

// remove removes an instance that does not run. When it fails the instance is
// left for later: a clean-up keeps no workspace from running.
func (a *actor) remove(ctx context.Context, ws *store.Workspace, id string) {
	rctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Remove)
	defer cancel()
	if err := a.sup.cfg.Runtime.Remove(rctx, id); err != nil {
		if errors.Is(context.Cause(ctx), errInterrupted) {
			return
		}
		a.log.WarnContext(ctx, "can't remove a container, trying again later", "instance", id, "uid", ws.UID, "error", err)
		a.postpone(id)
		return
	}
	delete(a.local.stuck, id)
	delete(a.local.stuckFor, id)
	delete(a.local.prepared, id)
}

// postpone has a clean-up that failed tried again after a wait that is doubled
// each time: containerd may be back in a moment, or not for long.
func (a *actor) postpone(id string) {
	wait := min(max(a.sup.cfg.Backoff.Initial, 2*a.local.stuckFor[id]), a.sup.cfg.Deadlines.RemoveRetry)
	if a.local.stuck == nil {
		a.local.stuck, a.local.stuckFor = make(map[string]time.Time), make(map[string]time.Duration)
	}
	a.local.stuckFor[id] = wait
	a.local.stuck[id] = a.sup.now().Add(wait)
}

// stop stops and removes an instance that must not run.
func (a *actor) stop(ctx, passCtx context.Context, ws *store.Workspace, in runtime.Instance) error {
	a.unwatch()
	if err := a.terminate(passCtx, ws, in.ID); err != nil {
		if errors.Is(context.Cause(passCtx), errInterrupted) || ctx.Err() != nil {
			return nil
		}
		a.log.WarnContext(ctx, "can't stop a container, trying again later", "instance", in.ID, "error", err)
		a.postpone(in.ID)
		return nil
	}
	delete(a.local.stuck, in.ID)
	delete(a.local.stuckFor, in.ID)
	if r := ws.Status.Running; r != nil && r.InstanceID == in.ID {
		return a.record(ctx, stepStatusStopped, ws, func(_ store.Workspace, st *store.Status) { st.Running = nil })
	}
	return nil
}

// terminate asks an instance to end, and ends it after the workspace's grace.
func (a *actor) terminate(ctx context.Context, ws *store.Workspace, id string) error {
	grace := stopGrace(ws)
	ctx, cancel := context.WithTimeout(ctx, grace+a.sup.cfg.Deadlines.Stop)
	defer cancel()
	err := a.sup.cfg.Runtime.Stop(ctx, id, stopSignal(ws.Spec.StopSignal), grace)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	return err
}

// stopGrace is how long the workspace's container has to end.
func stopGrace(ws *store.Workspace) time.Duration {
	if ws.Spec.StopGrace != nil {
		return *ws.Spec.StopGrace
	}
	return store.DefaultStopGrace
}

// begin begins a cycle: everything that can fail happens here, while the old
// container runs.
func (a *actor) begin(ctx, passCtx context.Context, ws *store.Workspace) error {
	token, known := newToken(ws, &ws.Spec)
	if ws.Status.StartingGeneration != ws.Generation || known != nil {
		gen := ws.Generation
		err := a.record(ctx, stepStatusStarting, ws, func(_ store.Workspace, st *store.Status) {
			st.StartingGeneration, st.Token = gen, known
		})
		if err != nil {
			return err
		}
	}
	a.sup.cycles.Add(1)
	a.local.fallbackFailed = 0 // each attempt may fall back once
	if _, err := a.prepare(passCtx, ws, &ws.Spec, ws.Generation, token); err != nil {
		return a.failed(ctx, passCtx, ws, err, false)
	}
	return nil
}

// newToken makes the token of the next standby, none if the spec wants none, and
// with it the standby's id. What is known of it is recorded before the standby is
// made, so that no container ever has a token that is not on disk; the token itself
// is only ever in this actor's memory and on its way into the container.
func newToken(ws *store.Workspace, spec *store.Spec) (token seal.Plaintext, known *store.InstanceToken) {
	if !spec.WorkspaceAPI {
		return seal.Plaintext{}, nil
	}
	return store.NewInstanceToken(ws.ID, runtime.NewInstanceID(ws.ID))
}

// prepare makes a standby of the spec. What is known of its token, if it has one,
// is on record.
func (a *actor) prepare(ctx context.Context, ws *store.Workspace, spec *store.Spec, generation int64, token seal.Plaintext) (runtime.Instance, error) {
	launch, err := a.read(ctx, stepSecretsRead, ws, spec, generation, token)
	if err != nil {
		return runtime.Instance{}, err
	}
	// A pull may take its time: it holds no slot.
	pullCtx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Pull)
	defer cancel()
	if _, err := a.sup.cfg.Runtime.EnsureImage(pullCtx, spec.Image); err != nil {
		return runtime.Instance{}, err
	}
	release, err := a.takeSlot(ctx, ws)
	if err != nil {
		return runtime.Instance{}, err
	}
	defer release()
	prepCtx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Prepare)
	defer cancel()
	rs := runtimeSpec(ws, spec, generation, &launch)
	if token.Len() > 0 {
		rs.InstanceID = ws.Status.Token.InstanceID
	}
	in, err := a.sup.cfg.Runtime.Prepare(prepCtx, rs)
	if err != nil {
		return runtime.Instance{}, err
	}
	if a.local.prepared == nil {
		a.local.prepared = make(map[string]prepared)
	}
	a.local.prepared[in.ID] = prepared{*spec, token}
	return in, nil
}

// takeSlot waits for a slot of the cycle limit. A running workspace that a fleet's
// change reaches waits for its turn in the rollout before, which it keeps until
// its new container runs: so never more of the fleet are down at once, however
// long their programs take to end.
func (a *actor) takeSlot(ctx context.Context, ws *store.Workspace) (release func(), err error) {
	c := classOf(ws)
	if c == bulk && a.local.rollout == nil {
		if c, err = a.joinRollout(ctx, ws); err != nil {
			return nil, err
		}
	}
	return a.sup.limit.acquire(ctx, c, a.sup.cfg.SlotLend, nil, nil)
}

// joinRollout waits for the workspace's turn. If it is changed by itself
// meanwhile it waits no longer. The kick that tells of it is given back: the
// change may be of more than this cycle sees.
func (a *actor) joinRollout(ctx context.Context, ws *store.Workspace) (c class, err error) {
	kicked := false
	defer func() {
		if kicked {
			signal(a.kick)
		}
	}()
	c = bulk
	lend := a.sup.cfg.SlotLend + stopGrace(ws) + a.sup.cfg.Deadlines.Stop
	a.local.rollout, err = a.sup.rollout.acquire(ctx, bulk, lend, a.kick, func() bool {
		kicked = true
		if now, err := a.sup.cfg.Store.Workspace(a.id); err == nil {
			c = classOf(&now)
		}
		return c == bulk
	})
	return c, err
}

// leaveRollout ends the workspace's turn, if it has one.
func (a *actor) leaveRollout() {
	if a.local.rollout != nil {
		a.local.rollout()
		a.local.rollout = nil
	}
}

// classOf says in which line a cycle of the workspace waits for its slot.
func classOf(ws *store.Workspace) class {
	if ws.ChangeReason == store.ReasonGlobalSecret && ws.Status.Running != nil {
		return bulk
	}
	return single
}

// read reads the secrets and makes what a container of the spec, prepared at
// generation, is started with. The launch's generation is the newest one, unless
// the spec has changed since it was prepared: then the container stays behind.
func (a *actor) read(ctx context.Context, step string, ws *store.Workspace, spec *store.Spec, prepared int64, token seal.Plaintext) (launch runtime.Launch, err error) {
	ctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Store)
	defer cancel()
	err = a.sup.cfg.Around(ctx, step, func(context.Context) error {
		launch, err = a.snapshot(ws, spec, prepared, token)
		return err
	})
	return launch, err
}

func (a *actor) snapshot(ws *store.Workspace, spec *store.Spec, prepared int64, token seal.Plaintext) (runtime.Launch, error) {
	sn, err := a.sup.cfg.Store.Snapshot(a.id)
	if err != nil {
		return runtime.Launch{}, err
	}
	if sn.Workspace.UID != ws.UID || sn.Workspace.Deleting != nil || sn.Workspace.Parked {
		return runtime.Launch{}, errInterrupted
	}
	generation := sn.Workspace.Generation
	if sn.Workspace.SpecGeneration > prepared {
		generation = prepared
	}
	return launchOf(spec, &sn, generation, token)
}

// commits is the store's count of them at some moment.
type commits struct {
	n       uint64
	settled bool
}

func (a *actor) commits() (c commits) {
	c.n, c.settled = a.sup.cfg.Store.Commits()
	return c
}

// readLate is read once the old container has ended. If no commit was under way at
// the count of before, which was taken before launch was read, and none has begun
// since, launch has the latest values: to open them all again would only lengthen
// the downtime.
func (a *actor) readLate(ctx context.Context, ws *store.Workspace, spec *store.Spec, prepared int64, token seal.Plaintext, launch runtime.Launch, before commits) (runtime.Launch, error) {
	ctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Store)
	defer cancel()
	err := a.sup.cfg.Around(ctx, stepSecretsLate, func(context.Context) (err error) {
		if !before.settled || a.commits() != before {
			launch, err = a.snapshot(ws, spec, prepared, token)
		}
		return err
	})
	return launch, err
}

// change is the switch: it ends the old container, if there is one, reads the
// secrets, and starts the standby.
func (a *actor) change(ctx, passCtx context.Context, ws *store.Workspace, standby, old runtime.Instance) error {
	from, ok := a.local.prepared[standby.ID]
	spec, token := &from.spec, from.token
	known := ws.Status.Token
	if !ok || token.Len() > 0 && (known == nil || known.InstanceID != standby.ID) {
		// No standby of this actor's making, or one whose token is not on record.
		a.remove(passCtx, ws, standby.ID)
		return nil
	}
	// Opens every secret once more before the old container is touched.
	before := a.commits()
	launch, err := a.read(passCtx, stepSecretsRead, ws, spec, standby.PreparedGeneration, token)
	if err != nil {
		return a.failed(ctx, passCtx, ws, err, false)
	}
	if old.ID != "" {
		if err := a.arm(passCtx, standby.ID, launch); err != nil {
			// The next attempt's is of the spec that is the newest then.
			a.remove(passCtx, ws, standby.ID)
			return a.failed(ctx, passCtx, ws, err, false)
		}
	}
	begun := a.sup.now()
	if old.ID != "" {
		a.unwatch()
		if err := a.terminate(passCtx, ws, old.ID); err != nil {
			return a.failed(ctx, passCtx, ws, err, false)
		}
	}
	late, err := a.readLate(passCtx, ws, spec, standby.PreparedGeneration, token, launch, before)
	switch {
	case err == nil:
		launch = late
	case errors.Is(err, errInterrupted):
		return a.failed(ctx, passCtx, ws, err, true)
	default:
		// The old container is gone. What was read a moment ago is complete and
		// gets the workspace up again; what is wrong now shows in the next cycle,
		// since the generation it belongs to stays pending.
		a.log.ErrorContext(ctx, "late read failed, starting with the values read before", "generation", launch.Generation, "error", err)
	}
	startCtx, cancel := context.WithTimeout(passCtx, a.sup.cfg.Deadlines.Start)
	defer cancel()
	in, err := a.sup.cfg.Runtime.Start(startCtx, standby.ID, launch)
	if err != nil {
		return a.failed(ctx, passCtx, ws, err, true)
	}
	a.leaveRollout()
	a.log.InfoContext(ctx, "container started", "instance", in.ID, "generation", launch.Generation,
		"replaced", old.ID, "switch", a.sup.now().Sub(begun), "pending_for", pendingFor(ws, a.sup.now()))
	return a.recordStart(ctx, ws, in, spec)
}

// arm has all of a launch made ready that is made before an old container ends.
func (a *actor) arm(ctx context.Context, id string, launch runtime.Launch) error {
	ctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Start)
	defer cancel()
	return a.sup.cfg.Runtime.Arm(ctx, id, launch)
}

// rotate gives the running container the files of the newest generation, if it can
// take that in, with all that came until they are read.
func (a *actor) rotate(ctx, passCtx context.Context, ws *store.Workspace, in runtime.Instance) error {
	release, err := a.sup.limit.acquire(passCtx, classOf(ws), a.sup.cfg.SlotLend, nil, nil)
	if err != nil {
		return a.failed(ctx, passCtx, ws, err, false)
	}
	defer release()
	rotation, err := a.readRotation(passCtx, ws, in.Generation)
	if err != nil {
		return a.failed(ctx, passCtx, ws, err, false)
	}
	if rotation == nil {
		return nil // only a new container can have what came meanwhile
	}
	rctx, cancel := context.WithTimeout(passCtx, a.sup.cfg.Deadlines.Start)
	defer cancel()
	rotated, err := a.sup.cfg.Runtime.Rotate(rctx, in.ID, *rotation)
	var re *runtime.Error
	switch {
	case errors.Is(err, runtime.ErrNotRunning):
		return nil // it has ended; the next pass sees how
	case errors.As(err, &re) && re.Permanent:
		a.log.WarnContext(ctx, "the container can't be given other files as it runs, it is replaced", "instance", in.ID, "error", err)
		a.local.unrotatable = strings.Clone(in.ID)
		return nil
	case err != nil:
		return a.failed(ctx, passCtx, ws, err, false)
	}
	a.log.InfoContext(ctx, "files changed in place", "instance", in.ID, "generation", rotated.Generation,
		"signal", rotation.Signal.String(), "pending_for", pendingFor(ws, a.sup.now()))
	return a.recordRotation(ctx, ws, rotated)
}

// readRotation reads what a container of that generation takes in as it runs; nil
// when it can't have the newest generation.
func (a *actor) readRotation(ctx context.Context, ws *store.Workspace, has int64) (rotation *runtime.Rotation, err error) {
	ctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Store)
	defer cancel()
	err = a.sup.cfg.Around(ctx, stepSecretsLive, func(context.Context) error {
		sn, err := a.sup.cfg.Store.Snapshot(a.id)
		switch {
		case err != nil:
			return err
		case sn.Workspace.UID != ws.UID || sn.Workspace.Deleting != nil || sn.Workspace.Parked:
			return errInterrupted
		case sn.Workspace.StartGeneration() <= has:
			rotation = rotationOf(&sn)
		}
		return nil
	})
	return rotation, err
}

// fallBack starts the last good spec again, with the newest secrets, because
// nothing runs and the newest generation can't. The failure stays on record.
func (a *actor) fallBack(ctx, passCtx context.Context, ws *store.Workspace) error {
	good := ws.Status.LastGood
	token, known := newToken(ws, &good.Spec)
	if known != nil {
		err := a.record(ctx, stepStatusStarting, ws, func(_ store.Workspace, st *store.Status) { st.Token = known })
		if err != nil {
			return err
		}
	}
	in, err := a.prepare(passCtx, ws, &good.Spec, good.Generation, token)
	if err == nil {
		var launch runtime.Launch
		if launch, err = a.read(passCtx, stepSecretsLate, ws, &good.Spec, good.Generation, token); err == nil {
			startCtx, cancel := context.WithTimeout(passCtx, a.sup.cfg.Deadlines.Start)
			defer cancel()
			in, err = a.sup.cfg.Runtime.Start(startCtx, in.ID, launch)
		}
	}
	if err != nil {
		if interrupted(ctx, passCtx, err) {
			return nil
		}
		a.local.fallbackFailed = ws.Generation
		a.log.ErrorContext(ctx, "the last good generation does not start either", "generation", good.Generation, "error", err)
		// What is held waits for a change only while the last good one runs.
		if f := a.local.failure; f != nil && f.NextAttempt.IsZero() {
			a.fail(ctx, ws, err, false)
		}
		return nil
	}
	a.log.WarnContext(ctx, "fell back to the last good generation", "instance", in.ID, "generation", good.Generation)
	return a.recordStart(ctx, ws, in, &good.Spec)
}

// finishDeletion removes what outlives containers, then the record.
func (a *actor) finishDeletion(ctx, passCtx context.Context, ws *store.Workspace) (again bool, at time.Time, err error) {
	rctx, cancel := context.WithTimeout(passCtx, a.sup.cfg.Deadlines.Remove)
	defer cancel()
	if err := a.sup.cfg.Runtime.RemoveWorkspace(rctx, ws.ID, ws.UID, ws.Deleting.KeepVolumes); err != nil {
		if interrupted(ctx, passCtx, err) {
			return true, time.Time{}, nil // deleted once more, without the volumes perhaps
		}
		return false, time.Time{}, fmt.Errorf("finish the deletion: %w", err)
	}
	sctx, cancel := context.WithTimeout(ctx, a.sup.cfg.Deadlines.Store)
	defer cancel()
	err = a.sup.cfg.Around(sctx, stepStatusDeleted, func(ctx context.Context) error {
		return a.sup.cfg.Store.FinishDeletion(ctx, ws.ID, ws.UID)
	})
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return false, time.Time{}, err
	}
	a.log.InfoContext(ctx, "workspace deleted", "uid", ws.UID)
	return true, time.Time{}, nil
}

// pendingFor is how long the oldest change that waited has waited.
func pendingFor(ws *store.Workspace, now time.Time) time.Duration {
	if ws.PendingSince.IsZero() {
		return 0
	}
	return now.Sub(ws.PendingSince)
}

// specOf returns the spec that an instance was prepared from, or nil when that
// is not known any more.
func (a *actor) specOf(ws *store.Workspace, in *runtime.Instance) *store.Spec {
	if p, ok := a.local.prepared[in.ID]; ok {
		return &p.spec
	}
	if in.Generation >= ws.SpecGeneration {
		return &ws.Spec
	}
	return nil
}

// interrupted reports whether an effect ended because the daemon shuts down or
// the workspace was stopped or deleted: no failure of the cycle.
func interrupted(ctx, passCtx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, errInterrupted) || errors.Is(context.Cause(passCtx), errInterrupted)
}

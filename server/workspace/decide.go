package workspace

import (
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// action is the one effect of a pass.
type action int

const (
	// actIdle: nothing to do before something happens.
	actIdle action = iota
	// actWait: nothing to do before step.at.
	actWait
	// actRemove: remove step.instance, which does not run.
	actRemove
	// actStop: stop step.instance, which must not run (any longer), and remove it.
	actStop
	// actRecordExit: the container on record has ended by itself; step.instance
	// tells how, or has no id when nothing is left of it.
	actRecordExit
	// actAdopt: step.instance runs and is not on record.
	actAdopt
	// actSettle: clear what the status says of a cycle that is no longer there.
	actSettle
	// actPrepare: begin a cycle: make a standby of the newest spec.
	actPrepare
	// actSwitch: stop step.old if it has an id, start the standby step.instance.
	actSwitch
	// actRotate: give step.instance, which runs, the files of the newest generation.
	actRotate
	// actFallback: nothing runs and the newest generation can't: start the last
	// good one again.
	actFallback
	// actFinishDeletion: nothing is left but files and the record.
	actFinishDeletion
)

var actionNames = [...]string{"idle", "wait", "remove", "stop", "record-exit", "adopt", "settle", "prepare", "switch", "rotate", "fallback", "finish-deletion"}

func (a action) String() string { return actionNames[a] }

// step is what decide wants done.
type step struct {
	action        action
	instance, old runtime.Instance
	at            time.Time
}

// view is all that decide looks at.
type view struct {
	ws        *store.Workspace
	instances []runtime.Instance // of the workspace's uid, oldest first
	// failure is the newest failed attempt: the record's, or a newer one that
	// could not be recorded.
	failure *store.Failure
	// stuck are instances that could not be removed, and when to try again: a
	// clean-up that fails keeps no workspace from running.
	stuck map[string]time.Time
	// fallbackFailed is the generation for which the fallback failed too.
	fallbackFailed int64
	// fallbackAt is when the last good spec may be started again after it ended by
	// itself.
	fallbackAt time.Time
	// unrotatable is an instance that can't be given other files as it runs.
	unrotatable string
	// maxWait is the longest wait that anything can ask for: what lies further
	// ahead was written by a clock that has since been set back.
	maxWait time.Duration
	now     time.Time
}

// isStuck reports whether the instance could not be removed and its time has
// not come.
func (v *view) isStuck(id string) bool { return v.ahead(v.stuck[id]) }

// ahead reports whether a time is still to come, and by no more than something
// waits for: a clock that was set back stretches no wait.
func (v *view) ahead(t time.Time) bool { return v.now.Before(t) && t.Sub(v.now) <= v.maxWait }

// retry is when the first stuck instance is tried again; zero when none is.
func (v *view) retry() (first time.Time) {
	for _, in := range v.instances {
		if at := v.stuck[in.ID]; v.isStuck(in.ID) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// decide says what to do next. It is pure: docs/architecture.md has its table,
// and TestDecide a case for each row.
func decide(v view) step {
	onRecord := v.ws.Status.Running
	var remnants, standbys, running, exited []runtime.Instance
	for _, in := range v.instances {
		switch {
		case in.Phase == runtime.PhaseRunning:
			running = append(running, in) // never overlooked, stuck or not
		case onRecord != nil && in.ID == onRecord.InstanceID && in.Phase == runtime.PhaseExited:
			exited = append(exited, in) // likewise: else it would be taken for lost
		case v.isStuck(in.ID):
		case in.Phase == runtime.PhaseStandby:
			standbys = append(standbys, in)
		case in.Phase == runtime.PhaseExited:
			exited = append(exited, in)
		default:
			remnants = append(remnants, in)
		}
	}

	if v.ws.Deleting != nil || v.ws.Parked {
		return decideAtRest(v, append(append(remnants, standbys...), exited...), running)
	}

	// What is left over goes first: there is at most a handful, and it holds
	// memory, mounts and names.
	if len(remnants) > 0 {
		return step{action: actRemove, instance: remnants[0]}
	}
	if len(running) > 1 {
		for _, in := range running[:len(running)-1] {
			if !v.isStuck(in.ID) {
				return step{action: actStop, instance: in}
			}
		}
		return step{action: actWait, at: v.retry()}
	}
	var current runtime.Instance
	if len(running) == 1 {
		current = running[0]
		if onRecord == nil || onRecord.InstanceID != current.ID {
			return step{action: actAdopt, instance: current}
		}
	}
	if len(exited) > 0 {
		if onRecord != nil && exited[0].ID == onRecord.InstanceID {
			return step{action: actRecordExit, instance: exited[0]}
		}
		return step{action: actRemove, instance: exited[0]}
	}
	if current.ID == "" && onRecord != nil {
		return step{action: actRecordExit}
	}

	switch {
	case current.ID != "" && v.ws.Generation <= v.ws.Status.ObservedGeneration:
		return decideSettled(v, standbys)
	case current.ID == "" && !v.ws.NeedsStart() && v.ws.End() != "":
		return decideEnded(v, standbys)
	}
	return decideCycle(v, standbys, current)
}

// decideAtRest brings a workspace that is not meant to run to rest.
func decideAtRest(v view, leftovers, running []runtime.Instance) step {
	for _, in := range running {
		if !v.isStuck(in.ID) {
			return step{action: actStop, instance: in}
		}
	}
	retry := v.retry()
	switch {
	case len(leftovers) > 0:
		return step{action: actRemove, instance: leftovers[0]}
	case !retry.IsZero():
		return step{action: actWait, at: retry}
	case v.ws.Deleting != nil:
		return step{action: actFinishDeletion}
	case unsettled(v):
		return step{action: actSettle}
	default:
		return step{action: actIdle}
	}
}

// decideSettled: the newest generation runs.
func decideSettled(v view, standbys []runtime.Instance) step {
	retry := v.retry()
	switch {
	case len(standbys) > 0:
		return step{action: actRemove, instance: standbys[0]}
	case unsettled(v):
		return step{action: actSettle}
	case !retry.IsZero():
		return step{action: actWait, at: retry}
	default:
		return step{action: actIdle}
	}
}

// decideEnded: the newest generation ran, and is not started again.
func decideEnded(v view, standbys []runtime.Instance) step {
	retry := v.retry()
	switch {
	case len(standbys) > 0:
		return step{action: actRemove, instance: standbys[0]}
	case !retry.IsZero():
		return step{action: actWait, at: retry}
	default:
		return step{action: actIdle}
	}
}

// decideCycle: the newest generation does not run. current is what runs instead,
// if anything.
func decideCycle(v view, standbys []runtime.Instance, current runtime.Instance) step {
	failure := v.failure
	if failure != nil && failure.Generation != v.ws.Generation {
		failure = nil // a newer change cuts the wait short
	}
	if failure != nil {
		at := failure.NextAttempt
		held := at.IsZero()
		if held || v.ahead(at) {
			if len(standbys) > 0 {
				return step{action: actRemove, instance: standbys[0]}
			}
			if current.ID == "" && canFallBack(v) {
				if !v.ahead(v.fallbackAt) {
					return step{action: actFallback}
				}
				at = earlier(at, v.fallbackAt)
			}
			at = earlier(at, v.retry())
			if at.IsZero() {
				return step{action: actIdle}
			}
			return step{action: actWait, at: at}
		}
	}
	if current.ID != "" && current.ID != v.unrotatable && current.Generation >= v.ws.StartGeneration() {
		if len(standbys) > 0 {
			return step{action: actRemove, instance: standbys[0]}
		}
		return step{action: actRotate, instance: current}
	}
	if n := len(standbys); n > 1 {
		return step{action: actRemove, instance: standbys[0]}
	} else if n == 1 {
		return step{action: actSwitch, instance: standbys[0], old: current}
	}
	return step{action: actPrepare}
}

// earlier returns the earlier of two times; a zero one is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// canFallBack reports whether there is an older spec that ran and is worth a
// try while the newest one fails.
func canFallBack(v view) bool {
	good := v.ws.Status.LastGood
	return good != nil && v.ws.End() == "" && good.Generation < v.ws.SpecGeneration && v.fallbackFailed != v.ws.Generation
}

// unsettled reports whether the status still speaks of a cycle, or of a
// container, that is no longer there.
func unsettled(v view) bool {
	st := &v.ws.Status
	if v.ws.Parked { // why it failed before stays to be read
		return st.Running != nil || st.StartingGeneration != 0 || st.Token != nil
	}
	return st.StartingGeneration != 0 || st.Failure != nil || st.Token != nil
}

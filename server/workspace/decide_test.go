package workspace

import (
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// TestDecide has a case for each row of the transition table in
// docs/architecture.md.
func TestDecide(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	in := func(id string, phase runtime.Phase, gen int64) runtime.Instance {
		return runtime.Instance{ID: id, Phase: phase, Generation: gen, PreparedGeneration: gen}
	}
	onRecord := func(id string) *store.Running { return &store.Running{InstanceID: id} }
	failure := func(gen int64, next time.Time) *store.Failure {
		return &store.Failure{Generation: gen, NextAttempt: next}
	}
	good := func(gen int64) *store.LastGood { return &store.LastGood{Generation: gen} }
	soon := now.Add(time.Second)
	ended := func(p store.CrashRestart, generation int64) store.Workspace {
		return store.Workspace{
			Generation: generation, Spec: store.Spec{CrashPolicy: store.CrashPolicy{Restart: p}},
			Status: store.Status{ObservedGeneration: 3, EndedGeneration: 3, LastExit: &store.Exit{Known: true}},
		}
	}

	live := func(generation, live int64) store.Workspace {
		return store.Workspace{Generation: generation, Live: live, SpecGeneration: 1, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}}
	}

	tests := []struct {
		name      string
		ws        store.Workspace
		instances []runtime.Instance
		failure   *store.Failure
		stuck     map[string]time.Time
		fallback  int64     // fallbackFailed
		pace      time.Time // fallbackAt
		fixed     string    // unrotatable
		want      action
		instance  string
		old       string
		at        time.Time
	}{
		// Meant to run, nothing left over.
		{name: "new", ws: store.Workspace{Generation: 1, SpecGeneration: 1}, want: actPrepare},
		{
			name: "settled", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actIdle,
		},
		{
			name: "pending, older one runs", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actPrepare,
		},
		{
			name: "standby ready, older one runs", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseStandby, 4)},
			want:      actSwitch, instance: "b", old: "a",
		},
		{
			name: "standby ready, nothing runs", ws: store.Workspace{Generation: 1},
			instances: []runtime.Instance{in("b", runtime.PhaseStandby, 1)}, want: actSwitch, instance: "b",
		},
		{
			name: "two standbys", ws: store.Workspace{Generation: 1},
			instances: []runtime.Instance{in("a", runtime.PhaseStandby, 1), in("b", runtime.PhaseStandby, 1)}, want: actRemove, instance: "a",
		},
		{
			name: "settled, a standby too many", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseStandby, 3)}, want: actRemove, instance: "b",
		},
		{
			name: "settled, status speaks of a cycle", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, StartingGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actSettle,
		},

		// Only what a running container takes in is new.
		{
			name: "live, runs", ws: live(5, 2), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actRotate, instance: "a",
		},
		{
			name: "live, taken in, crash before the record", ws: live(5, 2), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 5)}, want: actRotate, instance: "a",
		},
		{
			name: "live, and something else before it", ws: live(5, 1), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actPrepare,
		},
		{
			name: "live, and something else before it, standby ready", ws: live(5, 1),
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseStandby, 4)}, want: actSwitch, instance: "b", old: "a",
		},
		{
			name: "live, a standby too many", ws: live(5, 2),
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseStandby, 3)}, want: actRemove, instance: "b",
		},
		{
			name: "live, failed", ws: live(5, 2), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(5, soon), want: actWait, at: soon,
		},
		{
			name: "live, failed, time to try again", ws: live(5, 2), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(5, now),
			want: actRotate, instance: "a",
		},
		{
			name: "live, the container can't", ws: live(5, 2), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, fixed: "a", want: actPrepare,
		},
		{
			name: "live, the last good spec runs", ws: func() store.Workspace {
				w := live(5, 1)
				w.SpecGeneration, w.Status.LastGood = 4, good(3)
				return w
			}(), instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actPrepare,
		},
		{
			name: "live, ended by itself", ws: live(5, 2), instances: []runtime.Instance{in("a", runtime.PhaseExited, 3)}, want: actRecordExit, instance: "a",
		},
		{name: "live, nothing runs", ws: func() store.Workspace {
			w := live(5, 2)
			w.Status.Running = nil
			return w
		}(), want: actPrepare},
		{name: "live, at its end", ws: func() store.Workspace {
			w := ended(store.CrashRestartNever, 5)
			w.Live = 2
			return w
		}(), want: actIdle},

		// The container on record ended, and the crash policy says no.
		{name: "at its end", ws: ended(store.CrashRestartNever, 3), want: actIdle},
		{
			name: "at its end, a standby", ws: ended(store.CrashRestartNever, 3),
			instances: []runtime.Instance{in("b", runtime.PhaseStandby, 3)}, want: actRemove, instance: "b",
		},
		{
			name: "at its end, a stuck remnant", ws: ended(store.CrashRestartNever, 3),
			instances: []runtime.Instance{in("r", runtime.PhaseRemnant, 3)}, stuck: map[string]time.Time{"r": soon}, want: actWait, at: soon,
		},
		{name: "at its end, and pending", ws: ended(store.CrashRestartNever, 4), want: actPrepare},
		{name: "its end is passed over by the policy", ws: ended(store.CrashRestartAlways, 3), want: actPrepare},
		{name: "its end is passed over by the policy, the next attempt is not due", ws: ended(store.CrashRestartAlways, 3), failure: failure(3, soon), want: actWait, at: soon},
		{
			name: "no fallback to what is at its end", ws: func() store.Workspace {
				w := ended(store.CrashRestartNever, 4)
				w.SpecGeneration, w.Status.LastGood = 4, good(3)
				return w
			}(),
			failure: failure(4, soon), want: actWait, at: soon,
		},

		// Left over by a switch, a crash, a failure.
		{
			name: "old one ended in the switch", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 4, Running: onRecord("b")}},
			instances: []runtime.Instance{in("a", runtime.PhaseExited, 3), in("b", runtime.PhaseRunning, 4)}, want: actRemove, instance: "a",
		},
		{
			name: "remnant goes before the cycle", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("r", runtime.PhaseRemnant, 0), in("a", runtime.PhaseRunning, 3)}, want: actRemove, instance: "r",
		},
		{
			name: "a remnant that can't be removed holds nobody up", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("r", runtime.PhaseRemnant, 0), in("a", runtime.PhaseRunning, 3)},
			stuck:     map[string]time.Time{"r": soon}, want: actPrepare,
		},
		{
			name: "settled, a remnant waits for its next removal", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("r", runtime.PhaseRemnant, 0), in("a", runtime.PhaseRunning, 3)},
			stuck:     map[string]time.Time{"r": soon}, want: actWait, at: soon,
		},
		{
			name: "a remnant's next removal has come", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("r", runtime.PhaseRemnant, 0), in("a", runtime.PhaseRunning, 3)},
			stuck:     map[string]time.Time{"r": now}, want: actRemove, instance: "r",
		},
		{
			name: "runs, crash before the record", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("b", runtime.PhaseRunning, 4)}, want: actAdopt, instance: "b",
		},
		{
			name: "first one runs, crash before the record", ws: store.Workspace{Generation: 1},
			instances: []runtime.Instance{in("b", runtime.PhaseRunning, 1)}, want: actAdopt, instance: "b",
		},
		{
			name: "switched, crash before the record", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseExited, 3), in("b", runtime.PhaseRunning, 4)}, want: actAdopt, instance: "b",
		},
		{
			name: "two run", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 4, Running: onRecord("b")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseRunning, 4)}, want: actStop, instance: "a",
		},
		{
			name: "two run and the older can't be stopped", ws: store.Workspace{Generation: 5, Status: store.Status{ObservedGeneration: 4, Running: onRecord("b")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseRunning, 4)},
			stuck:     map[string]time.Time{"a": soon}, want: actWait, at: soon,
		},

		// The container ended by itself.
		{
			name: "ended by itself", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseExited, 3)}, want: actRecordExit, instance: "a",
		},
		{
			name: "ended and nothing is left of it", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			want: actRecordExit,
		},
		{
			name: "exit recorded", ws: store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 3}},
			instances: []runtime.Instance{in("a", runtime.PhaseExited, 3)}, want: actRemove, instance: "a",
		},
		{
			name: "ended, its wait not over", ws: store.Workspace{Generation: 3, SpecGeneration: 1, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(3, soon), want: actWait, at: soon,
		},
		{
			name: "ended, its wait over", ws: store.Workspace{Generation: 3, SpecGeneration: 1, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(3, now), want: actPrepare,
		},

		// The cycle failed.
		{
			name: "failed, older one runs", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(4, soon), want: actWait, at: soon,
		},
		{
			name: "failed, its standby goes", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseStandby, 4)},
			failure:   failure(4, soon), want: actRemove, instance: "b",
		},
		{
			name: "failed, a new change cuts the wait short", ws: store.Workspace{Generation: 5, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(4, soon), want: actPrepare,
		},
		{
			name: "failed, time to try again", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(4, now), want: actPrepare,
		},
		{
			name: "failed, the clock was set back", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(4, now.Add(time.Hour)), want: actPrepare,
		},
		{
			name: "failed, a stuck remnant comes first", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("r", runtime.PhaseRemnant, 0), in("a", runtime.PhaseRunning, 3)}, failure: failure(4, soon.Add(time.Second)),
			stuck: map[string]time.Time{"r": soon}, want: actWait, at: soon,
		},
		{
			name: "held until a change, older one runs", ws: store.Workspace{Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, failure: failure(4, time.Time{}), want: actIdle,
		},
		{
			name: "nothing runs, the newest spec failed", ws: store.Workspace{Generation: 4, SpecGeneration: 4, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(4, time.Time{}), want: actFallback,
		},
		{
			name: "nothing runs, the last good one has just ended", ws: store.Workspace{Generation: 4, SpecGeneration: 4, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(4, soon.Add(time.Second)), pace: soon, want: actWait, at: soon,
		},
		{
			name: "nothing runs, held, the last good one has just ended", ws: store.Workspace{Generation: 4, SpecGeneration: 4, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(4, time.Time{}), pace: soon, want: actWait, at: soon,
		},
		{
			name: "nothing runs, the last good one ended a while ago", ws: store.Workspace{Generation: 4, SpecGeneration: 4, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(4, soon), pace: now, want: actFallback,
		},
		{
			name: "nothing runs, the last good one failed too", ws: store.Workspace{Generation: 4, SpecGeneration: 4, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(4, soon), fallback: 4, want: actWait, at: soon,
		},
		{
			name: "nothing runs, the spec that failed is the last good one", ws: store.Workspace{Generation: 4, SpecGeneration: 2, Status: store.Status{ObservedGeneration: 3, LastGood: good(3)}},
			failure: failure(4, soon), want: actWait, at: soon,
		},
		{
			name: "nothing ever ran", ws: store.Workspace{Generation: 1, SpecGeneration: 1},
			failure: failure(1, soon), want: actWait, at: soon,
		},

		// Parked.
		{
			name: "parked, runs", ws: store.Workspace{Parked: true, Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, want: actStop, instance: "a",
		},
		{
			name: "parked in the middle of a cycle", ws: store.Workspace{Parked: true, Generation: 4, Status: store.Status{ObservedGeneration: 3}},
			instances: []runtime.Instance{in("a", runtime.PhaseExited, 3), in("b", runtime.PhaseStandby, 4)}, want: actRemove, instance: "b",
		},
		{
			name: "parked, its container's rest", ws: store.Workspace{Parked: true, Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseExited, 3)}, want: actRemove, instance: "a",
		},
		{
			name: "parked, status speaks of a container", ws: store.Workspace{Parked: true, Generation: 3, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			want: actSettle,
		},
		{
			name: "parked, can't be stopped", ws: store.Workspace{Parked: true, Status: store.Status{Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3)}, stuck: map[string]time.Time{"a": soon}, want: actWait, at: soon,
		},
		{name: "parked, pending", ws: store.Workspace{Parked: true, Generation: 4, Status: store.Status{ObservedGeneration: 3}}, want: actIdle},
		{
			name: "started again although it can't be stopped", ws: store.Workspace{Generation: 5, Status: store.Status{ObservedGeneration: 4, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 4), in("b", runtime.PhaseStandby, 5)},
			stuck:     map[string]time.Time{"a": soon}, want: actSwitch, instance: "b", old: "a",
		},

		// Deletion wins.
		{
			name: "deleted, runs", ws: store.Workspace{Deleting: &store.Deleting{}, Generation: 4, Status: store.Status{ObservedGeneration: 3, Running: onRecord("a")}},
			instances: []runtime.Instance{in("a", runtime.PhaseRunning, 3), in("b", runtime.PhaseStandby, 4)}, want: actStop, instance: "a",
		},
		{
			name: "deleted, a standby is left", ws: store.Workspace{Deleting: &store.Deleting{}, Parked: true},
			instances: []runtime.Instance{in("b", runtime.PhaseStandby, 4)}, want: actRemove, instance: "b",
		},
		{
			name: "deleted, what is left can't be removed", ws: store.Workspace{Deleting: &store.Deleting{}},
			instances: []runtime.Instance{in("b", runtime.PhaseRemnant, 4)}, stuck: map[string]time.Time{"b": soon}, want: actWait, at: soon,
		},
		{name: "deleted, nothing is left", ws: store.Workspace{Deleting: &store.Deleting{}}, want: actFinishDeletion},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := decide(view{
				ws: &tt.ws, instances: tt.instances, failure: tt.failure, stuck: tt.stuck,
				fallbackFailed: tt.fallback, fallbackAt: tt.pace, unrotatable: tt.fixed, maxWait: 2 * time.Minute, now: now,
			})
			if got.action != tt.want || got.instance.ID != tt.instance || got.old.ID != tt.old || !got.at.Equal(tt.at) {
				t.Errorf("decide = %v instance %q old %q at %v, want %v %q %q %v",
					got.action, got.instance.ID, got.old.ID, got.at, tt.want, tt.instance, tt.old, tt.at)
			}
		})
	}
}

func TestStateOf(t *testing.T) {
	run := &store.Running{InstanceID: "a"}
	next := time.Now()
	tests := []struct {
		name        string
		ws          store.Workspace
		want        State
		reconciling bool
	}{
		{"new", store.Workspace{Generation: 1}, StateProvisioning, true},
		{"runs", store.Workspace{Generation: 2, Status: store.Status{ObservedGeneration: 2, Running: run}}, StateRunning, false},
		{"runs, pending", store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 2, Running: run}}, StateRunning, true},
		{"older runs, newer failed", store.Workspace{Generation: 3, Status: store.Status{ObservedGeneration: 2, Running: run, Failure: &store.Failure{Generation: 3}}}, StateDegraded, true},
		{"nothing runs, waits", store.Workspace{Generation: 1, Status: store.Status{Failure: &store.Failure{Generation: 1, NextAttempt: next}}}, StateBackoff, true},
		{"nothing runs, tries again", store.Workspace{Generation: 1, Status: store.Status{StartingGeneration: 1, Failure: &store.Failure{Generation: 1, NextAttempt: next}}}, StateProvisioning, true},
		{"live, runs", store.Workspace{Generation: 3, Live: 1, Status: store.Status{ObservedGeneration: 2, Running: run}}, StateRunning, true},
		{"live, ended for good", store.Workspace{
			Generation: 3, Live: 1, Spec: store.Spec{CrashPolicy: store.CrashPolicy{Restart: store.CrashRestartNever}},
			Status: store.Status{ObservedGeneration: 2, EndedGeneration: 2, LastExit: &store.Exit{Known: true}},
		}, StateExited, false},
		{"parked", store.Workspace{Parked: true, Generation: 3, Status: store.Status{ObservedGeneration: 2}}, StateStopped, false},
		{"parked, still runs", store.Workspace{Parked: true, Generation: 2, Status: store.Status{ObservedGeneration: 2, Running: run}}, StateRunning, true},
		{"deleted", store.Workspace{Deleting: &store.Deleting{}, Parked: true, Status: store.Status{Running: run}}, StateDeleting, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, reconciling := StateOf(&tt.ws)
			if got != tt.want || reconciling != tt.reconciling {
				t.Errorf("StateOf = %v %v, want %v %v", got, reconciling, tt.want, tt.reconciling)
			}
		})
	}
}

package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// steps lets a test take the steps of rollouts of a store.
type steps chan time.Time

// newSteps returns them, for a harness that is opened again by it.
func newSteps(h *harness, above, chunk int) steps {
	s := make(steps)
	h.cfg.rollouts = rolloutPolicy{above: above, chunk: chunk, next: s}
	h.reopen()
	return s
}

// step does the next transaction of the rollouts that there are, and reports
// whether there were any.
func (s steps) step(h *harness) bool {
	h.t.Helper()
	if len(dump(h.t, h.db)["rollouts"]) == 0 {
		return false
	}
	s <- time.Time{}
	if err := h.Ping(ctx); err != nil { // it is done
		h.t.Fatal(err)
	}
	return true
}

// A change of global secrets is every workspace's at once, whenever its record
// takes it in.
func TestRollout(t *testing.T) {
	h := newHarness(t)
	steps := newSteps(h, 2, 2)
	h.create("a", value("K", "1"))
	h.create("b")
	h.create("c")
	h.create("d", value("G", "own"))
	h.create("e")
	h.create("f")
	must(h.DeleteWorkspace(ctx, "f", false, Options{}))(t)
	f := &follower{h: h}
	f.sync(0)
	h.record.take()
	before := h.Revision()

	r := must(h.UpdateSecrets(ctx, Scope{}, set("G", "1"), request("id", "one")))(t)
	if !r.Changed || r.Affected != 4 || h.Revision() != before+1 || h.record.take() != nil {
		t.Errorf("got %+v, revision %d", r, h.Revision())
	}
	check := func(want map[string]int64) {
		t.Helper()
		ws, _, err := h.ListWorkspaces("", 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkShared(t, h.Store, ws)
		got := map[string]int64{}
		for _, w := range ws {
			got[w.ID] = w.Generation
			if diff := cmp.Diff(w, must(h.Workspace(w.ID))(t)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(w, must(h.Snapshot(w.ID))(t).Workspace); diff != "" {
				t.Error(diff)
			}
			if w.Generation > 1 && w.ID != "f" && (w.ChangeReason != ReasonGlobalSecret || !w.Pending()) {
				t.Errorf("got %+v", w)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	want := map[string]int64{"a": 2, "b": 2, "c": 2, "d": 1, "e": 2, "f": 1}
	check(want)
	if h.values("a")["G"] != "1" || h.values("d")["G"] != "own" {
		t.Errorf("got %v, %v", h.values("a"), h.values("d"))
	}
	if diff := cmp.Diff(r, must(h.UpdateSecrets(ctx, Scope{}, set("G", "1"), request("id", "one")))(t)); diff != "" {
		t.Errorf("another answer: %s", diff)
	}

	// A new one has it already, also one of an id that was reused.
	h.create("aa")
	want["aa"] = 1
	check2 := func() { t.Helper(); check(want) }
	check2()
	// What writes a record takes it in, and tells.
	h.record.take()
	w := must(h.Workspace("e"))(t)
	must(h.UpdateStatus(ctx, "e", w.UID, func(_ Workspace, st *Status) { st.Starts = 1 }))(t)
	if changes := h.record.take(); len(changes) != 1 || !changes[0].Desired {
		t.Errorf("told: %+v", changes)
	}
	check2()
	// A secret of its own, set now, does not undo what it has seen.
	must(h.UpdateSecrets(ctx, in("c"), SecretsUpdate{Set: set("G", "own").Set, NextStart: true}, Options{}))(t)
	check2()
	h.record.take()

	for i := range 3 { // aa and a, b and c, d and e
		h.reopen() // wherever it is
		steps.step(h)
		if i < 2 {
			steps.step(h)
		}
		check2()
	}
	for steps.step(h) {
		check2()
	}
	told := map[string]int{}
	for _, c := range h.record.take() {
		if !c.Desired || c.Interrupt {
			t.Errorf("told: %+v", c)
		}
		told[c.ID]++
	}
	if diff := cmp.Diff(map[string]int{"a": 1, "b": 1}, told); diff != "" {
		t.Errorf("told: %s", diff)
	}
	f.follow(1)
	f.check()
	h.reopen()
	check2()
}

// Each of several changes counts, also those that come during a rollout, and
// there are never more than a few rollouts.
func TestRollout_Several(t *testing.T) {
	h := newHarness(t)
	steps := newSteps(h, 2, 1)
	ids := []string{"a", "b", "c", "d"}
	for _, id := range ids {
		h.create(id)
	}
	generation := int64(1)
	for i := range 5 * maxRollouts {
		must(h.UpdateSecrets(ctx, Scope{}, set("G", fmt.Sprint(i)), Options{}))(t)
		generation++
		if i%3 == 0 {
			steps.step(h)
		}
		if n := len(dump(t, h.db)["rollouts"]); n > maxRollouts {
			t.Fatalf("%d rollouts", n)
		}
		for _, id := range ids {
			if w := must(h.Workspace(id))(t); w.Generation != generation {
				t.Fatalf("%s has generation %d after %d changes", id, w.Generation, i+1)
			}
		}
	}
	n := 0
	for steps.step(h) {
		if n++; n > 100 {
			t.Fatal("it has no end")
		}
	}
	for _, id := range ids {
		if w := must(h.Workspace(id))(t); w.Generation != generation {
			t.Errorf("%s has generation %d", id, w.Generation)
		}
	}
}

// A rollout goes on by itself, beside others' changes, and after a restart.
func TestRollout_InTheBackground(t *testing.T) {
	h := newHarness(t)
	h.cfg.rollouts = rolloutPolicy{above: 10, chunk: 7, next: atOnce}
	h.reopen()
	h.db.NoSync = true
	const n = 300
	for i := range n {
		h.create(fmt.Sprint("w", i))
	}
	h.record.take()
	var stop atomic.Bool
	var others sync.WaitGroup
	for i := range 4 {
		others.Go(func() {
			for j := 0; !stop.Load() || j == 0; j++ {
				must(h.RestartWorkspace(ctx, fmt.Sprint("w", i*50+j%50), Options{}))(t)
			}
		})
	}
	for i := range 3 {
		if r := must(h.UpdateSecrets(ctx, Scope{}, set("G", fmt.Sprint(i)), Options{}))(t); r.Affected != n {
			t.Errorf("affected %d", r.Affected)
		}
	}
	for len(dump(t, h.db)["rollouts"]) > 0 {
		if err := h.Ping(ctx); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	others.Wait()
	told := map[string]bool{}
	for _, c := range h.record.take() {
		told[c.ID] = told[c.ID] || c.Desired
	}
	ws, _, err := h.ListWorkspaces("", 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range ws {
		if !told[w.ID] {
			t.Errorf("%s was not told", w.ID)
		}
	}
	for i := 200; i < n; i++ { // which nobody else changes
		if w := must(h.Workspace(fmt.Sprint("w", i)))(t); w.Generation != 4 {
			t.Errorf("%s has generation %d", w.ID, w.Generation)
		}
	}
	must(h.UpdateSecrets(ctx, Scope{}, set("G", "last"), Options{}))(t)
	h.reopen() // in the middle of it
	for len(dump(t, h.db)["rollouts"]) > 0 {
		if err := h.Ping(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if w := must(h.Workspace("w299"))(t); w.Generation != 5 {
		t.Errorf("generation %d", w.Generation)
	}
}

// A transaction of a rollout that fails is tried again.
func TestRollout_TriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		h := newHarness(t)
		h.cfg.Logger = log.logger()
		h.cfg.rollouts = rolloutPolicy{above: 0, chunk: 1, next: atOnce}
		h.reopen()
		h.create("a")
		h.create("b")
		// What was done after all need not be done again.
		for moment, failures := range map[fault.Moment]int{fault.Before: 3, fault.After: 2} {
			in := fault.New(fault.Rule{Step: stepCommit, Moment: moment, Action: fault.Error, Skip: 1, Times: 3})
			h.around = func(ctx context.Context, step string, do func(context.Context) error) error {
				return in.Around(ctx, step, do)
			}
			must(h.UpdateSecrets(ctx, Scope{}, set("G", string(moment)), Options{}))(t)
			synctest.Wait()
			if len(dump(t, h.db)["rollouts"]) == 0 {
				t.Error("no commit has failed")
			}
			time.Sleep(10 * rolloutRetry) // the bubble's clock
			synctest.Wait()
			if n := len(dump(t, h.db)["rollouts"]); n != 0 {
				t.Errorf("%d rollouts are left", n)
			}
			if lines := log.take(); len(lines) != failures {
				t.Errorf("logged: %q", lines)
			}
		}
		for _, id := range []string{"a", "b"} {
			if w := must(h.Workspace(id))(t); w.Generation != 3 {
				t.Errorf("%s has generation %d", id, w.Generation)
			}
		}
		h.close()
	})
}

// A record that can't be read keeps no other from its generation.
func TestRollout_DamagedRecord(t *testing.T) {
	h := newHarness(t)
	steps := newSteps(h, 1, 10)
	h.create("a")
	h.create("b")
	h.create("c")
	must(h.UpdateSecrets(ctx, Scope{}, set("G", "1"), Options{}))(t)
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketWorkspaces).Put([]byte("b"), []byte("x")) })
	for steps.step(h) {
	}
	for _, id := range []string{"a", "c"} {
		if w := must(h.Workspace(id))(t); w.Generation != 2 {
			t.Errorf("%s has generation %d", id, w.Generation)
		}
	}
	if _, err := h.Workspace("b"); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
}

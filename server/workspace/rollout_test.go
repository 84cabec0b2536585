package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// TestRolloutLetsOthersBy: while a global secret is rolled out a change of one
// workspace does not wait for the fleet, also when that workspace is part of it;
// all get all values in the end, each in one cycle.
func TestRolloutLetsOthersBy(t *testing.T) {
	inConfiguredWorld(t, func(w *world) { w.cfg.MaxConcurrentCycles = 1 }, func(t *testing.T, w *world) {
		fleet := []string{"a", "b", "c", "d", "e", "f"}
		for _, id := range fleet {
			w.running(t, id)
		}
		w.running(t, "apart")
		must(w.set("apart", "GLOBAL", "own"))(t)
		synctest.Wait()
		before, cycles := len(w.fake.Launches("")), w.sup.Cycles()
		gate := w.fake.Hold(runtimetest.Prepare, "")
		must(w.set("", "GLOBAL", "1"))(t)
		held(t, gate)
		must(w.set("apart", "K", "v"))(t)
		synctest.Wait()
		member := "f" // one of the fleet that waits
		for _, c := range w.fake.Calls() {
			if c.Method == runtimetest.Prepare && !c.Done && c.WorkspaceID == member {
				member = "e"
			}
		}
		must(w.set(member, "K", "v"))(t)
		synctest.Wait()
		for range len(fleet) + 1 {
			gate.Step()
			synctest.Wait()
		}
		gate.Release()
		synctest.Wait()
		var order []string
		for _, l := range w.fake.Launches("")[before:] {
			order = append(order, l.Instance.WorkspaceID)
		}
		for _, id := range []string{"apart", member} {
			if n := slices.Index(order, id); n < 1 || n > 4 {
				t.Errorf("%s is number %d in %v, want it among the first", id, n, order)
			}
		}
		for _, id := range append(fleet, "apart") {
			w.wantSettled(t, id)
		}
		if n := w.sup.Cycles() - cycles; n != int64(len(fleet))+1 {
			t.Errorf("%d cycles for %d workspaces", n, len(fleet)+1)
		}
	})
}

// TestCleanUpIsTriedAgainSoon: containerd that is away for a moment delays a stop
// by no more than that, and one that is away for long is not asked all the time.
func TestCleanUpIsTriedAgainSoon(t *testing.T) {
	for _, method := range []runtimetest.Method{runtimetest.Stop, runtimetest.Remove} {
		t.Run(string(method), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.running(t, "a")
				heal := w.fake.Fail(method, "a", errors.New("away"), 0)
				must(w.store.StopWorkspace(context.Background(), "a", store.Options{}))(t)
				pass(300 * time.Millisecond)
				heal()
				pass(time.Second)
				w.wantSettled(t, "a")

				must(w.store.StartWorkspace(context.Background(), "a", store.Options{}))(t)
				synctest.Wait()
				calls := w.fake.Count(method, "a")
				heal = w.fake.Fail(method, "a", errors.New("away"), 0)
				must(w.store.StopWorkspace(context.Background(), "a", store.Options{}))(t)
				pass(time.Hour)
				if n := w.fake.Count(method, "a") - calls; n < 100 || n > 130 {
					t.Errorf("tried %d times in an hour, want about two a minute", n)
				}
				heal()
				pass(time.Minute)
				if s := w.state(t, "a"); s != workspace.StateStopped {
					t.Errorf("state %v", s)
				}
			})
		})
	}
}

// TestRolloutIsNeverAllDown: of a fleet whose programs take their time to end no
// more are down at once than the cycle limit allows.
func TestRolloutIsNeverAllDown(t *testing.T) {
	const limit, fleet = 3, 12
	inConfiguredWorld(t, func(w *world) { w.cfg.MaxConcurrentCycles = limit }, func(t *testing.T, w *world) {
		w.fake.AddImage("good", runtimetest.Image{Commands: map[string]runtimetest.Command{"serve": {StopDelay: 4 * time.Second}}})
		var ids []string
		for i := range fleet {
			ids = append(ids, fmt.Sprintf("w%d", i))
			w.running(t, ids[i])
		}
		var mu sync.Mutex
		down, most := make(map[string]bool), 0
		note := func(moment runtimetest.Method, isDown bool) runtimetest.Hook {
			return func(_ context.Context, c runtimetest.Call) error {
				mu.Lock()
				defer mu.Unlock()
				if c.Method == moment {
					if down[c.WorkspaceID] = isDown; !isDown {
						delete(down, c.WorkspaceID)
					}
				}
				most = max(most, len(down))
				return nil
			}
		}
		w.fake.OnCall(note(runtimetest.Stop, true))
		w.fake.AfterCall(note(runtimetest.Start, false))
		begun := time.Now()
		must(w.set("", "GLOBAL", "1"))(t)
		for w.settled(ids[0]) != nil || w.settled(ids[fleet-1]) != nil {
			pass(time.Second)
			if time.Since(begun) > 10*time.Minute {
				t.Fatal("the rollout does not end")
			}
		}
		pass(time.Minute)
		for _, id := range ids {
			w.wantSettled(t, id)
		}
		mu.Lock()
		defer mu.Unlock()
		if most > limit || most < 2 {
			t.Errorf("%d were down at once, the limit is %d", most, limit)
		}
	})
}

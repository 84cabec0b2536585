package e2e

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Promise 2, on real containers: at most as many cycles as promised.
func TestContract02_Coalescing(t *testing.T) {
	s := newStage(t, 4*time.Minute)

	t.Run("one request is one cycle", func(t *testing.T) {
		s := &stage{Stage: s.Stage, t: t, ctx: s.ctx}
		before := s.create("single", nil)
		s.wait("single", s.set("single", "A", "1"))
		if got := s.get("single").RestartCount - before.RestartCount; got != 1 {
			t.Errorf("%d cycles, want 1", got)
		}
	})

	t.Run("three one after another are three", func(t *testing.T) {
		s := &stage{Stage: s.Stage, t: t, ctx: s.ctx}
		before := s.create("sequence", nil)
		for i := range 3 {
			s.wait("sequence", s.set("sequence", "A", fmt.Sprint(i)))
		}
		if got := s.get("sequence").RestartCount - before.RestartCount; got != 3 {
			t.Errorf("%d cycles, want 3", got)
		}
	})

	t.Run("the same value again is none", func(t *testing.T) {
		s := &stage{Stage: s.Stage, t: t, ctx: s.ctx}
		before := s.create("equal", map[string]string{"A": "1"})
		resp, err := s.client().SetSecret(s.ctx, setSecret("equal", "A", "1"))
		if err != nil {
			t.Fatal(err)
		}
		if resp.Changed || resp.Generation != before.Generation {
			t.Errorf("answer %v, want changed: false and generation %d", resp, before.Generation)
		}
		if got := s.wait("equal", 0).RestartCount - before.RestartCount; got != 0 {
			t.Errorf("%d cycles, want none", got)
		}
	})

	for _, n := range []int{5, 100} {
		t.Run(fmt.Sprintf("%d during one cycle are at most one more", n), func(t *testing.T) {
			s := &stage{Stage: s.Stage, t: t, ctx: s.ctx}
			id := fmt.Sprintf("burst-%d", n)
			before := s.create(id, nil)
			ref, hold, err := s.PushSlow(s.ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			defer hold.Release()
			newest := s.update(id, &workspacev1.WorkspaceSpec{Image: ref}, "spec.image")
			s.waitFor("the pull", hold.Reached)

			want := map[string]string{}
			generations := make([]int64, n)
			var group errgroup.Group
			for i := range n {
				key := fmt.Sprintf("KEY_%d", i)
				want[key] = fmt.Sprint(i)
				group.Go(func() error {
					resp, err := s.client().SetSecret(s.ctx, setSecret(id, key, fmt.Sprint(i)))
					generations[i] = resp.GetGeneration()
					return err
				})
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
			seen := map[int64]bool{}
			for _, g := range generations {
				if g <= newest || seen[g] {
					t.Errorf("generation %d given twice, or older than %d", g, newest)
				}
				seen[g] = true
			}
			if w := s.get(id); !w.Reconciling || w.ContainerId != before.ContainerId {
				t.Errorf("not pending while the cycle is held: %v", w)
			}
			hold.Release()
			for _, g := range generations {
				s.wait(id, g)
			}
			w := s.get(id)
			if got := w.RestartCount - before.RestartCount; got < 1 || got > 2 {
				t.Errorf("%d cycles, want 1 or 2", got)
			}
			if w.Reconciling || w.LastError != nil || w.StartingGeneration != 0 {
				t.Errorf("not calm after it: %v", w)
			}
			checkEnv(t, s.inside(id, w.ObservedGeneration), want)
		})
	}
	s.settle(5)
}

// Promise 3: a workspace that hangs in a pull delays nobody, even when it is all
// the cycles that may run at once.
func TestContract03_Isolation(t *testing.T) {
	s := newStage(t, 3*time.Minute, "--max-concurrent-cycles=1")
	s.create("hung", nil)
	s.create("free", nil)
	ref, hold, err := s.PushSlow(s.ctx, "slow")
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Release()
	hung := s.update("hung", &workspacev1.WorkspaceSpec{Image: ref}, "spec.image")
	s.waitFor("the pull", hold.Reached)

	began := time.Now()
	for i := range 3 {
		s.wait("free", s.set("free", "A", fmt.Sprint(i)))
	}
	t.Logf("3 cycles of the free workspace took %v", time.Since(began))
	if w := s.get("hung"); w.ObservedGeneration >= hung {
		t.Fatalf("the pull was not held: %v", w)
	}
	// A stop interrupts the pull, and a deletion does.
	if _, err := s.client().DeleteWorkspace(s.ctx, &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/hung"}); err != nil {
		t.Fatal(err)
	}
	s.gone("hung")
	s.settle(1)
}

package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

func TestContract11_ParkedStaysParked(t *testing.T) {
	ctx := context.Background()
	t.Run("nothing but a start starts it", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			must(w.store.StopWorkspace(ctx, "a", store.Options{}))(t)
			synctest.Wait()
			if s := w.state(t, "a"); s != workspace.StateStopped {
				t.Fatalf("state is %v, want STOPPED", s)
			}
			cycles := w.sup.Cycles()
			must(w.set("a", "K", "1"))(t)
			must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "other" }))(t)
			pass(time.Hour)
			if err := w.shutdown(); err != nil {
				t.Fatal(err)
			}
			if err := w.boot(); err != nil {
				t.Fatal(err)
			}
			pass(time.Hour)
			w.wantSettled(t, "a")
			if w.sup.Cycles() != 0 || cycles != 1 {
				t.Errorf("cycles began: %d, %d", cycles, w.sup.Cycles())
			}
			must(w.store.StartWorkspace(ctx, "a", store.Options{}))(t)
			synctest.Wait()
			w.wantSettled(t, "a")
			if w.env("a")["K"] != "1" {
				t.Error("the change made while parked was not taken up")
			}
		})
	})
	for _, at := range []runtimetest.Method{runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("a stop interrupts %s,after=%v", at, after), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.running(t, "a")
					hold := w.fake.Hold
					if after {
						hold = w.fake.HoldAfter
					}
					gate := hold(at, "")
					must(w.set("a", "K", "1"))(t)
					held(t, gate)
					begun := time.Now()
					must(w.store.StopWorkspace(ctx, "a", store.Options{}))(t)
					if at == runtimetest.Stop || at == runtimetest.Remove {
						synctest.Wait()
						gate.Release() // what parking itself needs
					}
					synctest.Wait()
					if d := time.Since(begun); d != 0 {
						t.Errorf("the stop waited %v", d)
					}
					gate.Release()
					pass(time.Minute)
					w.wantSettled(t, "a")
					if s := w.state(t, "a"); s != workspace.StateStopped {
						t.Errorf("state is %v, want STOPPED", s)
					}
				})
			})
		}
	}
	t.Run("a stop ends a backoff", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			w.fake.Fail(runtimetest.Prepare, "a", errors.New("no"), 0)
			must(w.set("a", "K", "1"))(t)
			pass(time.Minute)
			must(w.store.StopWorkspace(ctx, "a", store.Options{}))(t)
			synctest.Wait()
			w.wantSettled(t, "a")
			ws := must(w.store.Workspace("a"))(t)
			if s := w.state(t, "a"); s != workspace.StateStopped || ws.Status.Failure == nil {
				t.Errorf("state is %v, failure %+v; want STOPPED, and why it failed", s, ws.Status.Failure)
			}
			cycles := w.sup.Cycles()
			pass(time.Hour)
			if w.sup.Cycles() != cycles {
				t.Error("it was tried again")
			}
		})
	})
}

func TestContract12_DeletionWins(t *testing.T) {
	ctx := context.Background()
	gone := func(t *testing.T, w *world, id string) {
		t.Helper()
		if _, err := w.store.Workspace(id); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("the record is there still: %v", err)
		}
		if in := w.fake.Instances(); len(in) > 0 {
			t.Errorf("instances are left: %+v", in)
		}
		if w.fake.HasLog(id) || len(w.fake.Volumes(id)) > 0 {
			t.Error("log or volumes are left")
		}
	}
	for _, at := range []runtimetest.Method{runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("in %s,crash=%v", at, crash), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.running(t, "a")
					gate := w.fake.Hold(at, "")
					must(w.set("a", "K", "1"))(t)
					held(t, gate)
					must(w.store.DeleteWorkspace(ctx, "a", false, store.Options{}))(t)
					if crash {
						if err := w.crash(); err != nil {
							t.Fatal(err)
						}
						if err := w.boot(); err != nil {
							t.Fatal(err)
						}
					}
					if at == runtimetest.Stop || at == runtimetest.Remove || crash {
						synctest.Wait()
						gate.Release()
					}
					synctest.Wait()
					pass(time.Minute)
					gone(t, w, "a")
					gate.Release()
					// The id is free again.
					w.running(t, "a")
				})
			})
		}
	}
	t.Run("half done and finished at boot", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.HoldAfter(runtimetest.RemoveWorkspace, "a")
			must(w.store.DeleteWorkspace(ctx, "a", false, store.Options{}))(t)
			held(t, gate)
			if err := w.crash(); err != nil {
				t.Fatal(err)
			}
			gate.Release()
			if err := w.boot(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			gone(t, w, "a")
		})
	})
	t.Run("a clean-up that fails is repeated", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			w.fake.Fail(runtimetest.RemoveWorkspace, "a", errors.New("busy"), 3)
			w.fake.Fail(runtimetest.Remove, "a", errors.New("busy"), 3)
			w.fake.Fail(runtimetest.Stop, "a", errors.New("busy"), 3)
			must(w.store.DeleteWorkspace(ctx, "a", false, store.Options{}))(t)
			pass(10 * time.Minute)
			gone(t, w, "a")
		})
	})
	t.Run("the id is taken again while its actor retires", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			again := func() {
				w.fault.gone.Store(nil)
				if _, err := w.create("a"); err != nil {
					t.Error(err)
				}
			}
			w.fault.gone.Store(&again)
			must(w.store.DeleteWorkspace(ctx, "a", false, store.Options{}))(t)
			synctest.Wait()
			w.wantSettled(t, "a")
		})
	})
	t.Run("while parked", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			must(w.store.StopWorkspace(ctx, "a", store.Options{}))(t)
			synctest.Wait()
			must(w.store.DeleteWorkspace(ctx, "a", false, store.Options{}))(t)
			synctest.Wait()
			gone(t, w, "a")
		})
	})
}

func TestContract13_UnknownIsNotDead(t *testing.T) {
	t.Run("an error while listing", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			old, _ := w.fake.Running("a")
			cycles := w.sup.Cycles()
			heal := w.fake.Fail(runtimetest.List, "", errors.New("unavailable"), 0)
			w.fake.Fail(runtimetest.Watch, "", errors.New("unavailable"), 3)
			w.sup.OnCommit([]store.Change{{ID: "a", Desired: true}})
			pass(time.Hour)
			heal()
			pass(2 * time.Minute)
			w.wantSettled(t, "a")
			if now, _ := w.fake.Running("a"); now.ID != old.ID || w.sup.Cycles() != cycles {
				t.Errorf("%s was replaced by %s", old.ID, now.ID)
			}
		})
	})
	t.Run("an exit restarts it", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			old, _ := w.fake.Running("a")
			pass(time.Hour)
			w.fake.Exit(old.ID, runtime.Exit{Code: 3, Known: true})
			synctest.Wait()
			ws := must(w.store.Workspace("a"))(t)
			if s := w.state(t, "a"); s != workspace.StateBackoff || ws.Status.LastExit == nil || ws.Status.LastExit.Code != 3 {
				t.Errorf("state %v, last exit %+v; want BACKOFF and code 3", s, ws.Status.LastExit)
			}
			pass(time.Second)
			w.wantSettled(t, "a")
		})
	})
	t.Run("a command that ends at once is no tight loop", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.fake.AddImage("good", runtimetest.Image{Commands: map[string]runtimetest.Command{
				"serve": {Exit: &runtime.Exit{Known: true}, Lifetime: time.Millisecond},
			}})
			must(w.create("a"))(t)
			pass(time.Hour)
			if n := w.sup.Cycles(); n < 30 || n > 150 {
				t.Errorf("%d cycles in an hour, want about one a minute", n)
			}
		})
	})
}

func TestExecFailureFallsBack(t *testing.T) {
	ctx := context.Background()
	inWorld(t, func(t *testing.T, w *world) {
		w.fake.AddImage("bad", runtimetest.Image{Commands: map[string]runtimetest.Command{"serve": runtimetest.ExecFailure}})
		w.running(t, "a")
		must(w.set("a", "K", "1"))(t)
		synctest.Wait()
		must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "bad" }))(t)
		synctest.Wait()
		in, ok := w.fake.Running("a")
		ws := must(w.store.Workspace("a"))(t)
		if !ok || in.Generation != 2 || ws.Status.ObservedGeneration != 2 || w.env("a")["K"] != "1" {
			t.Fatalf("running %v at %d, observed %d, env %v; want the last good generation, 2", ok, in.Generation, ws.Status.ObservedGeneration, w.env("a"))
		}
		if f := ws.Status.Failure; w.state(t, "a") != workspace.StateDegraded || f == nil || f.Reason != "EXEC_FAILED" || !f.NextAttempt.IsZero() {
			t.Fatalf("state %v, failure %+v; want DEGRADED, EXEC_FAILED, held", w.state(t, "a"), ws.Status.Failure)
		}
		// It is not taken down again for what can't succeed, nor at boot.
		pass(time.Hour)
		if err := w.crash(); err != nil {
			t.Fatal(err)
		}
		if err := w.boot(); err != nil {
			t.Fatal(err)
		}
		pass(time.Hour)
		if now, _ := w.fake.Running("a"); now.ID != in.ID {
			t.Errorf("%s was replaced by %s", in.ID, now.ID)
		}
		// It crashes: it comes back.
		w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
		pass(time.Minute)
		if now, ok := w.fake.Running("a"); !ok || now.Generation != 2 {
			t.Errorf("running %v at generation %d, want 2", ok, now.Generation)
		}
		must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "good" }))(t)
		synctest.Wait()
		w.wantSettled(t, "a")
		must(w.store.StopWorkspace(ctx, "a", store.Options{}))(t)
	})
}

func TestLateReadFailureStartsWithWhatWasRead(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		seen := w.fault.reads.Load()
		broken := func(n int64) error {
			if n-seen == 3 { // prepare, before the stop, after the stop
				return &store.KeyError{Key: "K", Err: store.ErrUnreadable}
			}
			return nil
		}
		w.fault.snapshot.Store(&broken)
		must(w.set("a", "K", "1"))(t)
		synctest.Wait()
		w.wantSettled(t, "a")
	})
}

func TestStopUsesSignalAndGrace(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.fake.AddImage("good", runtimetest.Image{Commands: map[string]runtimetest.Command{"serve": {StopDelay: -1}}})
		grace := 42 * time.Second
		must(w.store.CreateWorkspace(context.Background(), store.NewWorkspace{ID: "a", Spec: store.Spec{
			Image: "good", Command: []string{"serve"}, StopSignal: "SIGINT", StopGrace: &grace,
		}}, store.Options{}))(t)
		synctest.Wait()
		begun := time.Now()
		must(w.store.RestartWorkspace(context.Background(), "a", store.Options{}))(t)
		pass(grace)
		w.wantSettled(t, "a")
		if d := time.Since(begun); d != grace {
			t.Errorf("the switch took %v, want the grace %v", d, grace)
		}
	})
}

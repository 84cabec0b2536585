package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// A live change is taken in by the container that runs: all changed files at once,
// then the signal, then the generation.
func TestRotate(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		must(w.create("a"))(t)
		must(w.edit("a", func(e *store.Editable) { e.Spec.LiveSignal = "SIGHUP" }))(t)
		must(w.set("a", "ENV", "env"))(t)
		must(w.setFile("a", "FILE", "old", false))(t)
		synctest.Wait()
		restarts := w.wantSettled(t, "a").Status.RestartCount
		before, _ := w.fake.Running("a")
		cycles := w.sup.Cycles()

		r := must(w.setFile("a", "FILE", "new", true))(t)
		if !r.Changed || r.Affected != 1 {
			t.Errorf("result %+v", r)
		}
		synctest.Wait()
		ws := w.wantSettled(t, "a")
		in, _ := w.fake.Running("a")
		if in.ID != before.ID || w.sup.Cycles() != cycles || ws.Status.RestartCount != restarts || in.Generation != r.Workspace.Generation {
			t.Errorf("%+v runs after %d cycles", in, w.sup.Cycles()-cycles)
		}
		if diff := cmp.Diff(map[string]int64{"ENV": 1, "FILE": 2}, ws.Status.Running.SecretVersions); diff != "" {
			t.Error(diff)
		}
		if got := w.fake.Signals(in.ID); !slices.Equal(got, []syscall.Signal{syscall.SIGHUP}) {
			t.Errorf("signals %v", got)
		}

		// A change that needs a restart has everything in it.
		must(w.setFile("a", "FILE", "newer", true))(t)
		must(w.set("a", "ENV", "other"))(t)
		must(w.setFile("a", "FILE", "newest", true))(t)
		synctest.Wait()
		w.wantSettled(t, "a")
		if now, _ := w.fake.Running("a"); now.ID == in.ID {
			t.Error("it was not restarted")
		}
		// And a global one.
		must(w.setFile("", "GLOBAL", "g", true))(t)
		synctest.Wait()
		w.wantSettled(t, "a")
	})
}

// Live changes that come while one is taken in are taken in together.
func TestRotate_Coalesces(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		gate := w.fake.Hold(runtimetest.Rotate, "a")
		must(w.setFile("a", "F", "0", true))(t)
		held(t, gate)
		for i := range 10 {
			must(w.setFile("a", "F", fmt.Sprint(i), true))(t)
			must(w.setFile("a", fmt.Sprint("F", i), "x", true))(t)
			synctest.Wait()
		}
		gate.Release()
		synctest.Wait()
		w.wantSettled(t, "a")
		if n := w.fake.Count(runtimetest.Rotate, "a"); n != 2 {
			t.Errorf("%d rotations for a change and 20 more during it, want 2", n)
		}
	})
}

// Whatever fails, and wherever the daemon dies: the container runs on, and has
// everything in the end, without a restart.
func TestRotate_FailsAndCrashes(t *testing.T) {
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprintf("fails,after=%v", after), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				before := w.running(t, "a")
				fail := w.fake.Fail
				if after {
					fail = w.fake.FailAfter
				}
				heal := fail(runtimetest.Rotate, "a", &runtime.Error{Reason: runtime.ReasonStorage, Message: "full"}, 0)
				must(w.setFile("a", "F", "1", true))(t)
				synctest.Wait()
				ws := must(w.store.Workspace("a"))(t)
				if f := ws.Status.Failure; w.state(t, "a") != workspace.StateDegraded || f == nil || f.Reason != string(runtime.ReasonStorage) || f.NextAttempt.IsZero() {
					t.Errorf("state %v, failure %+v", w.state(t, "a"), f)
				}
				heal()
				pass(time.Minute)
				if now := w.wantSettled(t, "a"); now.Status.Running.InstanceID != before.Status.Running.InstanceID {
					t.Error("it was restarted")
				}
			})
		})
		t.Run(fmt.Sprintf("crash,after=%v", after), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				before := w.running(t, "a")
				hold := w.fake.Hold
				if after {
					hold = w.fake.HoldAfter
				}
				gate := hold(runtimetest.Rotate, "a")
				must(w.setFile("a", "F", "1", true))(t)
				held(t, gate)
				must(w.setFile("a", "G", "1", true))(t)
				if err := w.crash(); err != nil {
					t.Fatal(err)
				}
				gate.Release()
				if err := w.boot(); err != nil {
					t.Fatal(err)
				}
				pass(time.Minute)
				if now := w.wantSettled(t, "a"); now.Status.Running.InstanceID != before.Status.Running.InstanceID {
					t.Error("it was restarted")
				}
			})
		})
	}
	t.Run("not recorded", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			before := w.running(t, "a")
			must(w.edit("a", func(e *store.Editable) { e.Spec.LiveSignal = "SIGUSR1" }))(t)
			synctest.Wait()
			fails := func() error { return errors.New("disk") }
			w.fault.update.Store(&fails)
			must(w.setFile("a", "F", "1", true))(t)
			synctest.Wait()
			w.fault.update.Store(nil)
			pass(3 * time.Minute)
			if now := w.wantSettled(t, "a"); now.Status.Running.InstanceID != before.Status.Running.InstanceID {
				t.Error("it was restarted")
			}
			// What has the generation on record is left as it is.
			if got := w.fake.Signals(before.Status.Running.InstanceID); len(got) != 1 {
				t.Errorf("signals %v", got)
			}
		})
	})
	t.Run("can't, is replaced", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			before := w.running(t, "a")
			w.fake.Fail(runtimetest.Rotate, "a", &runtime.Error{Reason: runtime.ReasonRuntimeError, Message: "no files", Permanent: true}, 0)
			must(w.setFile("a", "F", "1", true))(t)
			synctest.Wait()
			if now := w.wantSettled(t, "a"); now.Status.Running.InstanceID == before.Status.Running.InstanceID {
				t.Error("it was not restarted")
			}
		})
	})
	t.Run("a secret that can't be opened", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			before := w.running(t, "a")
			fails := func(int64) error { return &store.KeyError{Key: "F", Err: store.ErrUnreadable} }
			w.fault.snapshot.Store(&fails)
			must(w.setFile("a", "F", "1", true))(t)
			synctest.Wait()
			if f := must(w.store.Workspace("a"))(t).Status.Failure; f == nil || f.Reason != "SECRET_UNREADABLE" {
				t.Errorf("failure %+v", f)
			}
			if w.fake.Count(runtimetest.Rotate, "a") != 0 {
				t.Error("a part of the files was written")
			}
			w.fault.snapshot.Store(nil)
			pass(time.Minute)
			if now := w.wantSettled(t, "a"); now.Status.Running.InstanceID != before.Status.Running.InstanceID {
				t.Error("it was restarted")
			}
		})
	})
}

// A live change starts nothing that does not run, and the next start has it.
func TestRotate_NothingRuns(t *testing.T) {
	t.Run("parked", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			must(w.store.StopWorkspace(context.Background(), "a", store.Options{}))(t)
			synctest.Wait()
			must(w.setFile("a", "F", "1", true))(t)
			pass(time.Hour)
			w.wantSettled(t, "a")
			must(w.store.StartWorkspace(context.Background(), "a", store.Options{}))(t)
			synctest.Wait()
			w.wantSettled(t, "a")
		})
	})
	t.Run("ended for good", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.createWith(t, store.CrashPolicy{Restart: store.CrashRestartNever}, nil, 0)
			synctest.Wait()
			in, _ := w.fake.Running("a")
			// One that was under way when it ended, and one that comes later.
			gate := w.fake.Hold(runtimetest.Rotate, "a")
			must(w.setFile("a", "F", "1", true))(t)
			held(t, gate)
			w.fake.Exit(in.ID, runtime.Exit{Known: true})
			gate.Release()
			synctest.Wait()
			must(w.setFile("a", "F", "2", true))(t)
			pass(time.Hour)
			ws := must(w.store.Workspace("a"))(t)
			if state, reconciling := workspace.StateOf(&ws); state != workspace.StateExited || reconciling || len(w.fake.Launches("a")) != 1 {
				t.Errorf("state %v, reconciling %v, %d starts", state, reconciling, len(w.fake.Launches("a")))
			}
			w.reboot(t)
			pass(time.Hour)
			if n := len(w.fake.Launches("a")); n != 1 {
				t.Errorf("%d starts after another boot", n)
			}
			must(w.store.StartWorkspace(context.Background(), "a", store.Options{}))(t)
			synctest.Wait()
			w.wantSettled(t, "a")
		})
	})
	t.Run("ends, and its wait is not cut short", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.createWith(t, store.CrashPolicy{}, nil, 0)
			synctest.Wait()
			in, _ := w.fake.Running("a")
			gate := w.fake.Hold(runtimetest.Rotate, "a")
			must(w.setFile("a", "F", "1", true))(t)
			held(t, gate)
			w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
			gate.Release()
			synctest.Wait()
			if w.state(t, "a") != workspace.StateBackoff {
				t.Errorf("state %v", w.state(t, "a"))
			}
			pass(time.Minute)
			w.wantSettled(t, "a")
		})
	})
	t.Run("stopped in the middle", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.Hold(runtimetest.Rotate, "a")
			must(w.setFile("a", "F", "1", true))(t)
			held(t, gate)
			must(w.store.StopWorkspace(context.Background(), "a", store.Options{}))(t)
			synctest.Wait()
			w.wantSettled(t, "a") // although the gate is shut
			gate.Release()
		})
	})
}

// What waits for the next start waits for it, whatever is changed live meanwhile.
func TestRotate_StagedWaits(t *testing.T) {
	file := func(key, value string) store.SecretValue {
		return store.SecretValue{Key: key, Value: seal.New([]byte(value)), Delivery: store.DeliveryFiles}
	}
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		own := store.Scope{WorkspaceID: "a"}
		change := func(scope store.Scope, u store.SecretsUpdate) {
			t.Helper()
			must(w.store.UpdateSecrets(context.Background(), scope, u, store.Options{}))(t)
			synctest.Wait()
		}
		change(own, store.SecretsUpdate{Set: []store.SecretValue{file("SET", "1"), file("GONE", "1"), file("LIVE", "1"), file("BARE", "1")}})
		change(store.Scope{}, store.SecretsUpdate{Set: []store.SecretValue{file("GLOBAL", "1"), file("BARE", "global")}})
		change(own, store.SecretsUpdate{NextStart: true, Set: []store.SecretValue{file("SET", "2"), file("NEW", "1"), file("GLOBAL", "own")}, Delete: []string{"GONE"}})
		change(store.Scope{}, store.SecretsUpdate{NextStart: true, Set: []store.SecretValue{file("OTHER", "1")}})
		in, _ := w.fake.Running("a")
		// The own one hid a global one, which takes its place.
		change(own, store.SecretsUpdate{Live: true, Set: []store.SecretValue{file("LIVE", "2")}, Delete: []string{"BARE"}})
		want := map[string]string{"SET": "1", "GONE": "1", "LIVE": "2", "GLOBAL": "1", "BARE": "global"}
		if diff := cmp.Diff(want, w.fake.Files(in.ID)); diff != "" {
			t.Error(diff)
		}
		ws := must(w.store.Workspace("a"))(t)
		if diff := cmp.Diff(map[string]int64{"SET": 1, "GONE": 1, "LIVE": 2, "GLOBAL": 1, "BARE": 1}, ws.Status.Running.SecretVersions); diff != "" {
			t.Error(diff)
		}
		if ws.Pending() || ws.Status.Running.InstanceID != in.ID {
			t.Errorf("status %+v", ws.Status)
		}
		// The same change again, live, is put into force.
		change(own, store.SecretsUpdate{Live: true, Set: []store.SecretValue{file("SET", "2")}})
		if got := w.fake.Files(in.ID)["SET"]; got != "2" {
			t.Errorf("SET is %q", got)
		}
		must(w.store.RestartWorkspace(context.Background(), "a", store.Options{}))(t)
		synctest.Wait()
		w.wantSettled(t, "a")
	})
}

package workspace_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// failing makes the workspace's next generation one that fails: its image can't
// be pulled, or its command not be executed.
func failing(t *testing.T, w *world, image string) {
	t.Helper()
	w.fake.AddImage("unexecutable", runtimetest.Image{Commands: map[string]runtimetest.Command{"serve": runtimetest.ExecFailure}})
	w.fake.Fail(runtimetest.EnsureImage, "unpullable", errPull, 0)
	must(w.edit("a", func(e *store.Editable) { e.Spec.Image = image }))(t)
	synctest.Wait()
}

// A program that ends again and again does so at the pace of its backoff, also
// while a newer generation can't come about, and hides nothing of that.
func TestCrashLoopWhileTheNewestFails(t *testing.T) {
	for image, reason := range map[string]string{"unpullable": "IMAGE_PULL_FAILED", "unexecutable": "EXEC_FAILED"} {
		t.Run(image, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.fake.AddImage("good", runtimetest.Image{Commands: map[string]runtimetest.Command{
					"serve": {Exit: &runtime.Exit{Code: 1, Known: true}, Lifetime: 100 * time.Millisecond},
				}})
				must(w.create("a"))(t)
				pass(time.Second)
				failing(t, w, image)
				before := len(w.fake.Launches("a"))
				pass(30 * time.Minute)
				if n := len(w.fake.Launches("a")) - before; n < 15 || n > 60 {
					t.Errorf("%d starts in half an hour, want about one a minute", n)
				}
				ws := must(w.store.Workspace("a"))(t)
				if f := ws.Status.Failure; f == nil || f.Reason != reason || f.Generation != ws.Generation {
					t.Errorf("failure %+v, want %s of generation %d", f, reason, ws.Generation)
				}
				if ws.Status.LastExit == nil || ws.Status.LastExit.Code != 1 {
					t.Errorf("last exit %+v, want code 1", ws.Status.LastExit)
				}
			})
		})
	}
}

// The end of an older container is no reason for the newest generation to wait.
func TestExitWhilePending(t *testing.T) {
	t.Run("while the standby is made", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			old, _ := w.fake.Running("a")
			gate := w.fake.Hold(runtimetest.EnsureImage, "new")
			must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "new" }))(t)
			held(t, gate)
			w.fake.Exit(old.ID, runtime.Exit{Code: 1, Known: true})
			synctest.Wait()
			begun, launches := time.Now(), len(w.fake.Launches("a"))
			gate.Release()
			synctest.Wait()
			ws := w.wantSettled(t, "a")
			if d := time.Since(begun); d != 0 {
				t.Errorf("the switch waited %v", d)
			}
			if n := len(w.fake.Launches("a")) - launches; n != 1 {
				t.Errorf("%d starts, want 1: the old spec was started again", n)
			}
			if ws.Status.LastExit == nil || ws.Status.LastExit.Code != 1 {
				t.Errorf("last exit %+v, want code 1", ws.Status.LastExit)
			}
		})
	})
	t.Run("committed before the exit is seen", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			old, _ := w.fake.Running("a")
			gate := w.fake.Hold(runtimetest.List, "")
			w.fake.Exit(old.ID, runtime.Exit{Code: 1, Known: true})
			held(t, gate)
			must(w.set("a", "K", "1"))(t)
			begun := time.Now()
			gate.Release()
			pass(0)
			// The pass that saw the exit had read the record before the change.
			w.wantSettled(t, "a")
			if d := time.Since(begun); d != 0 {
				t.Errorf("the change waited %v", d)
			}
		})
	})
}

func TestHeldStaysHeld(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		failing(t, w, "unexecutable")
		tried := w.fake.Count(runtimetest.EnsureImage, "unexecutable")
		stops := w.fake.Count(runtimetest.Stop, "a")
		same := func(when string) {
			t.Helper()
			if n := w.fake.Count(runtimetest.EnsureImage, "unexecutable"); n != tried {
				t.Errorf("%s: what can't be executed was tried %d more times", when, n-tried)
			}
			if n := w.fake.Count(runtimetest.Stop, "a"); n != stops {
				t.Errorf("%s: the last good container was stopped %d times", when, n-stops)
			}
			if in, ok := w.fake.Running("a"); !ok || in.Generation != 1 {
				t.Errorf("%s: running %v, generation %d; want the last good one", when, ok, in.Generation)
			}
			if s := w.state(t, "a"); s != workspace.StateDegraded {
				t.Errorf("%s: state %v, want DEGRADED", when, s)
			}
		}
		same("at first")
		in, _ := w.fake.Running("a")
		pass(time.Hour)
		w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
		pass(time.Hour)
		same("after it ended by itself")
		heal := w.fake.Fail(runtimetest.List, "", errors.New("containerd is late"), 0)
		if err := w.crash(); err != nil {
			t.Fatal(err)
		}
		if err := w.boot(); err != nil {
			t.Fatal(err)
		}
		pass(time.Hour)
		heal()
		pass(time.Hour)
		same("after containerd was late at boot")
		// A change tries again.
		must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "good" }))(t)
		synctest.Wait()
		w.wantSettled(t, "a")
	})
}

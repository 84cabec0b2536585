package workspace_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// createWith makes a workspace under a crash policy whose command ends by itself
// after its lifetime; exit nil: it does not.
func (w *world) createWith(t *testing.T, p store.CrashPolicy, exit *runtime.Exit, lifetime time.Duration) {
	t.Helper()
	w.fake.AddImage("good", runtimetest.Image{Commands: map[string]runtimetest.Command{
		"serve": {Exit: exit, Lifetime: lifetime},
	}})
	must(w.store.CreateWorkspace(context.Background(), store.NewWorkspace{
		ID: "a", Spec: store.Spec{Image: "good", Command: []string{"serve"}, CrashPolicy: p},
	}, store.Options{}))(t)
}

func (w *world) reboot(t *testing.T) {
	t.Helper()
	if err := w.crash(); err != nil {
		t.Fatal(err)
	}
	if err := w.boot(); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// TestCrashPolicy: which ends are followed by a start, how many, and what the
// workspace says in the end. A restart of the daemon changes nothing.
func TestCrashPolicy(t *testing.T) {
	code := func(c int) *runtime.Exit { return &runtime.Exit{Code: c, Known: true} }
	killed := &runtime.Exit{Code: 137, Known: true, Signal: 9}
	oom := &runtime.Exit{Code: 137, Known: true, Signal: 9, OOMKilled: true}
	unknown := &runtime.Exit{}
	const many = -1
	for _, test := range []struct {
		name   string
		policy store.CrashPolicy
		exit   *runtime.Exit
		starts int
		state  workspace.State
		failed bool // there is a failure on record
	}{
		{"the default", store.CrashPolicy{}, code(0), many, workspace.StateBackoff, true},
		{"always", store.CrashPolicy{Restart: store.CrashRestartAlways}, code(0), many, workspace.StateBackoff, true},
		{"always, 3 retries", store.CrashPolicy{Restart: store.CrashRestartAlways, MaxRetries: 3}, code(0), 4, workspace.StateExhausted, true},
		{"the default, 3 retries", store.CrashPolicy{MaxRetries: 3}, killed, 4, workspace.StateExhausted, true},
		{"on failure, code 0", store.CrashPolicy{Restart: store.CrashRestartOnFailure}, code(0), 1, workspace.StateExited, false},
		{"on failure, code 1", store.CrashPolicy{Restart: store.CrashRestartOnFailure}, code(1), many, workspace.StateBackoff, true},
		{"on failure, signal", store.CrashPolicy{Restart: store.CrashRestartOnFailure}, killed, many, workspace.StateBackoff, true},
		{"on failure, memory", store.CrashPolicy{Restart: store.CrashRestartOnFailure, MaxRetries: 1}, oom, 2, workspace.StateExhausted, true},
		{"on failure, unknown", store.CrashPolicy{Restart: store.CrashRestartOnFailure}, unknown, many, workspace.StateBackoff, true},
		{"never, code 0", store.CrashPolicy{Restart: store.CrashRestartNever}, code(0), 1, workspace.StateExited, false},
		{"never, code 1", store.CrashPolicy{Restart: store.CrashRestartNever}, code(1), 1, workspace.StateExited, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.createWith(t, test.policy, test.exit, 100*time.Millisecond)
				check := func(when string) {
					t.Helper()
					pass(30*time.Minute + 7*time.Second)
					n := len(w.fake.Launches("a"))
					if test.starts == many && n < 20 || test.starts != many && n != test.starts {
						t.Errorf("%s: %d starts, want %d", when, n, test.starts)
					}
					if s := w.state(t, "a"); s != test.state {
						t.Errorf("%s: state %v, want %v", when, s, test.state)
					}
					st := must(w.store.Workspace("a"))(t).Status
					if got := st.Failure != nil; got != test.failed {
						t.Errorf("%s: failure %+v", when, st.Failure)
					}
					want := store.Exit{Code: test.exit.Code, Known: test.exit.Known, Signal: test.exit.Signal, OOMKilled: test.exit.OOMKilled}
					if st.LastExit == nil {
						t.Fatalf("%s: no last exit", when)
					}
					got := *st.LastExit
					got.Time = time.Time{}
					if got != want {
						t.Errorf("%s: last exit %+v, want %+v", when, got, want)
					}
					if test.starts != many && len(w.fake.Instances()) > 0 {
						t.Errorf("%s: %v is left", when, w.fake.Instances())
					}
				}
				check("at first")
				w.reboot(t)
				check("after a crash of the daemon")
			})
		})
	}
}

// TestEndedIsLeft: what ends the rest of a workspace that its crash policy does
// not start again.
func TestEndedIsLeft(t *testing.T) {
	ctx := context.Background()
	always := func(e *store.Editable) { e.Spec.CrashPolicy = store.CrashPolicy{} }
	for name, leave := range map[string]func(*world) (store.Result, error){
		"secret":        func(w *world) (store.Result, error) { return w.set("a", "K", "v") },
		"global secret": func(w *world) (store.Result, error) { return w.set("", "K", "v") },
		"spec": func(w *world) (store.Result, error) {
			return w.edit("a", func(e *store.Editable) { e.Spec.Image = "other" })
		},
		"policy":  func(w *world) (store.Result, error) { return w.edit("a", always) },
		"restart": func(w *world) (store.Result, error) { return w.store.RestartWorkspace(ctx, "a", store.Options{}) },
		"start":   func(w *world) (store.Result, error) { return w.store.StartWorkspace(ctx, "a", store.Options{}) },
	} {
		for _, p := range []store.CrashPolicy{{Restart: store.CrashRestartNever}, {MaxRetries: 1}} {
			t.Run(name, func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.createWith(t, p, nil, 0)
					for range 1 + p.MaxRetries {
						pass(time.Second)
						in, _ := w.fake.Running("a")
						w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
					}
					pass(time.Hour)
					if s := w.state(t, "a"); s != workspace.StateExited && s != workspace.StateExhausted {
						t.Fatalf("state %v", s)
					}
					starts := len(w.fake.Launches("a"))
					if res := must(leave(w))(t); !res.Changed {
						t.Error("the answer says that nothing changed")
					}
					pass(time.Second)
					w.wantSettled(t, "a")
					if n := len(w.fake.Launches("a")) - starts; n != 1 {
						t.Errorf("%d starts, want 1", n)
					}
				})
			})
		}
	}
	t.Run("not by what restarts nothing", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.createWith(t, store.CrashPolicy{Restart: store.CrashRestartNever}, &runtime.Exit{Known: true}, time.Second)
			pass(time.Minute)
			must(w.edit("a", func(e *store.Editable) { e.Labels = map[string]string{"k": "v"} }))(t)
			must(w.store.UpdateSecrets(ctx, store.Scope{WorkspaceID: "a"}, store.SecretsUpdate{Delete: []string{"NONE"}}, store.Options{}))(t)
			must(w.store.StopWorkspace(ctx, "a", store.Options{}))(t)
			w.reboot(t)
			pass(time.Hour)
			if s, n := w.state(t, "a"), len(w.fake.Launches("a")); s != workspace.StateStopped || n != 1 {
				t.Errorf("state %v after %d starts", s, n)
			}
			must(w.store.StartWorkspace(ctx, "a", store.Options{}))(t)
			pass(time.Minute)
			if s, n := w.state(t, "a"), len(w.fake.Launches("a")); s != workspace.StateExited || n != 2 {
				t.Errorf("state %v after %d starts", s, n)
			}
		})
	})
}

// TestCrashCountBeginsAnew: after it ran well for a while, and in each new
// generation, the count of ends and the waits begin anew; over a restart of the
// daemon they go on.
func TestCrashCountBeginsAnew(t *testing.T) {
	end := func(t *testing.T, w *world) (restartedIn time.Duration) {
		t.Helper()
		in, ok := w.fake.Running("a")
		if !ok {
			t.Fatalf("nothing runs: %v", w.state(t, "a"))
		}
		begun := time.Now()
		w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
		for range 200 {
			pass(time.Second / 2)
			if _, ok := w.fake.Running("a"); ok {
				return time.Since(begun)
			}
		}
		return 0
	}
	crashes := func(t *testing.T, w *world) int {
		t.Helper()
		return must(w.store.Workspace("a"))(t).Status.Crashes.InARow
	}
	inWorld(t, func(t *testing.T, w *world) {
		w.createWith(t, store.CrashPolicy{MaxRetries: 100}, nil, 0)
		synctest.Wait()
		for range 9 {
			end(t, w)
		}
		if n := crashes(t, w); n != 9 {
			t.Errorf("%d ends in a row, want 9", n)
		}
		w.reboot(t)
		if d := end(t, w); d < 25*time.Second {
			t.Errorf("after a restart of the daemon the 10th wait is %v", d)
		}
		if n := crashes(t, w); n != 10 {
			t.Errorf("%d ends in a row, want 10", n)
		}
		must(w.set("a", "K", "v"))(t)
		synctest.Wait()
		if d := end(t, w); d > 2*time.Second {
			t.Errorf("in a new generation the first wait is %v", d)
		}
		if n := crashes(t, w); n != 1 {
			t.Errorf("%d ends in a row, want 1", n)
		}
		for range 9 {
			end(t, w)
		}
		pass(31 * time.Second)
		if d := end(t, w); d > 2*time.Second {
			t.Errorf("after it ran well the first wait is %v", d)
		}
		if n := crashes(t, w); n != 1 {
			t.Errorf("%d ends in a row, want 1", n)
		}
	})
}

// TestEndNoticedLate: that nobody looked for a while does not make a container one
// that ran well.
func TestEndNoticedLate(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.createWith(t, store.CrashPolicy{MaxRetries: 3}, nil, 0)
		synctest.Wait()
		for range 4 {
			pass(time.Second)
			in, ok := w.fake.Running("a")
			if !ok {
				t.Fatalf("nothing runs: %v", w.state(t, "a"))
			}
			if err := w.crash(); err != nil {
				t.Fatal(err)
			}
			w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true, Time: time.Now()})
			pass(time.Hour) // without a daemon
			if err := w.boot(); err != nil {
				t.Fatal(err)
			}
			pass(10 * time.Second)
		}
		if s := w.state(t, "a"); s != workspace.StateExhausted {
			t.Errorf("state %v, want EXHAUSTED", s)
		}
	})
}

// TestLostIsNoEnd: a container that vanished with the machine's restart has not
// ended by itself. No policy keeps it from running, and it counts as no retry.
func TestLostIsNoEnd(t *testing.T) {
	for _, p := range []store.CrashPolicy{{}, {Restart: store.CrashRestartNever}, {Restart: store.CrashRestartOnFailure}, {MaxRetries: 1}} {
		t.Run(string(p.Restart), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.createWith(t, p, nil, 0)
				synctest.Wait()
				for range 5 {
					if err := w.crash(); err != nil {
						t.Fatal(err)
					}
					for _, in := range w.fake.Instances() { // the machine restarts
						if err := w.fake.Remove(context.Background(), in.ID); err != nil {
							t.Fatal(err)
						}
					}
					if err := w.boot(); err != nil {
						t.Fatal(err)
					}
					pass(time.Minute)
					w.wantSettled(t, "a")
				}
				if n := must(w.store.Workspace("a"))(t).Status.Crashes.InARow; n != 0 {
					t.Errorf("%d ends are counted", n)
				}
			})
		})
	}
}

// TestNoFallbackToWhatHasEnded: a program that has done its work is not started
// again because a newer spec fails.
func TestNoFallbackToWhatHasEnded(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.createWith(t, store.CrashPolicy{Restart: store.CrashRestartNever}, &runtime.Exit{Known: true}, time.Second)
		pass(time.Minute)
		failing(t, w, "unpullable")
		pass(time.Hour)
		if n := len(w.fake.Launches("a")); n != 1 {
			t.Errorf("%d starts, want 1", n)
		}
		if s := w.state(t, "a"); s != workspace.StateBackoff {
			t.Errorf("state %v, want BACKOFF", s)
		}
	})
}

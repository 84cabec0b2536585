package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// The old system's bug: of two saves close together the second restart was
// dropped.
func TestContract01_NoLostChange(t *testing.T) {
	// Where the cycle for the first save is when the second one comes.
	for _, at := range []runtimetest.Method{
		runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove, runtimetest.List,
	} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,after=%v", at, after), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.running(t, "a")
					hold := w.fake.Hold
					if after {
						hold = w.fake.HoldAfter
					}
					gate := hold(at, "")
					must(w.set("a", "API_KEY", "k"))(t)
					held(t, gate)
					must(w.edit("a", func(e *store.Editable) { e.Model = "m" }))(t)
					synctest.Wait()
					gate.Release()
					synctest.Wait()
					w.wantSettled(t, "a")
					if env := w.env("a"); env["API_KEY"] != "k" || env["MODEL_PROVIDER"] != "m" {
						t.Errorf("the container has %v, want both values", env)
					}
				})
			})
		}
	}
}

// The second change comes in each single call of the first one's cycle, up to
// the last look that finds nothing to do.
func TestContract01_TokenBeforeRead(t *testing.T) {
	calls := 0 // of a cycle, counted below
	for nth := 0; nth == 0 || nth <= calls; nth++ {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d,after=%v", nth, after), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.running(t, "a")
					n := 0
					on := w.fake.OnCall
					if after {
						on = w.fake.AfterCall
					}
					on(func(_ context.Context, c runtimetest.Call) error {
						if c.Method == runtimetest.Watch {
							return nil
						}
						if n++; n == nth {
							if _, err := w.set("a", "L", "1"); err != nil {
								t.Error(err)
							}
						}
						return nil
					})
					must(w.set("a", "K", "1"))(t)
					synctest.Wait()
					w.wantSettled(t, "a")
					if nth == 0 {
						calls = n
					} else if w.env("a")["L"] != "1" {
						t.Error("the second change did not come")
					}
				})
			})
		}
	}
	if calls < 8 {
		t.Errorf("a cycle made %d calls: this tested less than it says", calls)
	}
}

func TestContract02_Coalescing(t *testing.T) {
	t.Run("1 request is 1 cycle", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			before := w.sup.Cycles()
			must(w.set("a", "K", "1"))(t)
			synctest.Wait()
			w.wantSettled(t, "a")
			if n := w.sup.Cycles() - before; n != 1 {
				t.Errorf("%d cycles, want 1", n)
			}
		})
	})
	for _, n := range []int{1, 5, 100} {
		t.Run(fmt.Sprintf("%d during a cycle are 2 in total", n), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.running(t, "a")
				before := w.sup.Cycles()
				gate := w.fake.Hold(runtimetest.Start, "a") // after the late read
				must(w.set("a", "FIRST", "1"))(t)
				held(t, gate)
				for i := range n {
					must(w.set("a", fmt.Sprintf("K%d", i), "v"))(t)
				}
				gate.Release()
				synctest.Wait()
				w.wantSettled(t, "a")
				if n := w.sup.Cycles() - before; n != 2 {
					t.Errorf("%d cycles, want 2", n)
				}
			})
		})
	}
	t.Run("3 in sequence are 3", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			before := w.sup.Cycles()
			for i := range 3 {
				must(w.store.RestartWorkspace(context.Background(), "a", store.Options{}))(t)
				synctest.Wait()
				w.wantSettled(t, "a")
				if n := w.sup.Cycles() - before; n != int64(i+1) {
					t.Errorf("%d cycles after %d requests", n, i+1)
				}
			}
		})
	})
	t.Run("a burst before the snapshot is read is 1", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			before := w.sup.Cycles()
			gate := w.fake.Hold(runtimetest.EnsureImage, "")
			must(w.set("a", "FIRST", "1"))(t)
			held(t, gate)
			for i := range 50 {
				must(w.set("a", fmt.Sprintf("K%d", i), "v"))(t)
			}
			gate.Release()
			synctest.Wait()
			w.wantSettled(t, "a")
			if n := w.sup.Cycles() - before; n != 1 {
				t.Errorf("%d cycles, want 1", n)
			}
		})
	})
	t.Run("state is clean after the drain", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.Hold(runtimetest.Start, "a")
			must(w.set("a", "K", "1"))(t)
			held(t, gate)
			must(w.set("a", "K", "2"))(t)
			gate.Release()
			synctest.Wait()
			ws := w.wantSettled(t, "a")
			cycles := w.sup.Cycles()
			pass(time.Hour)
			if ws2 := w.wantSettled(t, "a"); ws2.Revision != ws.Revision || w.sup.Cycles() != cycles {
				t.Errorf("something happened afterwards: revision %d -> %d, %d more cycles", ws.Revision, ws2.Revision, w.sup.Cycles()-cycles)
			}
		})
	})
}

func TestContract03_Isolation(t *testing.T) {
	// a hangs in that call; one cycle at a time is allowed.
	for _, at := range []runtimetest.Method{runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove} {
		t.Run(string(at), func(t *testing.T) {
			inConfiguredWorld(t, func(w *world) { w.cfg.MaxConcurrentCycles = 1 }, func(t *testing.T, w *world) {
				w.running(t, "a")
				w.running(t, "b")
				target := "a"
				if at == runtimetest.EnsureImage {
					target = "slow"
					must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "slow" }))(t)
				}
				gate := w.fake.Hold(at, target)
				must(w.set("a", "K", "1"))(t)
				must(w.edit("a", func(e *store.Editable) { e.Spec.Image = "slow" }))(t)
				held(t, gate)
				must(w.set("b", "K", "1"))(t)
				synctest.Wait()
				if at == runtimetest.Prepare {
					pass(6 * time.Second) // the slot that a holds is lent for 5
				}
				w.wantSettled(t, "b")
				if gate.Held() == 0 {
					t.Error("a does not hang any more")
				}
				gate.Release()
				synctest.Wait()
				pass(time.Minute)
				w.wantSettled(t, "a")
			})
		})
	}
	t.Run("the limit holds", func(t *testing.T) {
		inConfiguredWorld(t, func(w *world) { w.cfg.MaxConcurrentCycles = 2 }, func(t *testing.T, w *world) {
			gate := w.fake.Hold(runtimetest.Prepare, "")
			for i := range 5 {
				must(w.create(fmt.Sprintf("w%d", i)))(t)
			}
			held(t, gate)
			if n := gate.Held(); n != 2 {
				t.Errorf("%d cycles at once, want 2", n)
			}
			gate.Release()
			synctest.Wait()
			for i := range 5 {
				w.wantSettled(t, fmt.Sprintf("w%d", i))
			}
		})
	})
}

func TestContract04_LateBinding(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		before := w.sup.Cycles()
		gate := w.fake.HoldAfter(runtimetest.Stop, "a") // the old one has ended
		must(w.set("a", "K", "early"))(t)
		held(t, gate)
		must(w.set("a", "K", "late"))(t)
		gate.Release()
		synctest.Wait()
		w.wantSettled(t, "a")
		if got := w.env("a")["K"]; got != "late" || w.sup.Cycles()-before != 1 {
			t.Errorf("K is %q after %d cycles, want late after 1", got, w.sup.Cycles()-before)
		}
	})
	t.Run("a global one that makes no generation", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.HoldAfter(runtimetest.Stop, "a")
			must(w.set("a", "K", "early"))(t)
			held(t, gate)
			must(w.store.UpdateSecrets(t.Context(), store.Scope{}, store.SecretsUpdate{
				Set: []store.SecretValue{{Key: "G", Value: seal.New([]byte("late"))}}, NextStart: true,
			}, store.Options{}))(t)
			gate.Release()
			synctest.Wait()
			w.wantSettled(t, "a")
			if got := w.env("a")["G"]; got != "late" {
				t.Errorf("G is %q, want late", got)
			}
		})
	})
	t.Run("nothing is opened again when nothing was committed", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.HoldAfter(runtimetest.Stop, "a")
			must(w.set("a", "K", "early"))(t)
			held(t, gate)
			reads := w.fault.reads.Load()
			gate.Release()
			synctest.Wait()
			w.wantSettled(t, "a")
			if n := w.fault.reads.Load() - reads; n != 0 || w.env("a")["K"] != "early" {
				t.Errorf("%d reads after the old container's end, and K is %q", n, w.env("a")["K"])
			}
		})
	})
	t.Run("a spec that changed since is left to the next cycle", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.HoldAfter(runtimetest.Stop, "a")
			must(w.set("a", "K", "early"))(t) // generation 2
			held(t, gate)
			must(w.edit("a", func(e *store.Editable) { e.Spec.Env = map[string]string{"E": "new"} }))(t)
			must(w.set("a", "K", "late"))(t)
			second := w.fake.Hold(runtimetest.EnsureImage, "")
			gate.Release()
			held(t, second)
			ws := must(w.store.Workspace("a"))(t)
			if env := w.env("a"); env["K"] != "late" || env["E"] != "" || ws.Status.ObservedGeneration != 2 || ws.Generation != 4 {
				t.Errorf("env %v, observed %d of %d; want the newest secret, the old spec, 2 of 4", env, ws.Status.ObservedGeneration, ws.Generation)
			}
			second.Release()
			synctest.Wait()
			w.wantSettled(t, "a")
		})
	})
}

func TestContract05_NeverWorseOff(t *testing.T) {
	unreadable := &store.KeyError{Key: "K", Err: store.ErrUnreadable}
	tests := []struct {
		name     string
		sabotage func(w *world) (heal func())
		reason   string
	}{
		{"image", func(w *world) func() { return w.fake.Fail(runtimetest.EnsureImage, "", errPull, 0) }, "IMAGE_PULL_FAILED"},
		{"command", func(w *world) func() {
			return w.fake.Fail(runtimetest.Prepare, "a", &runtime.Error{Reason: runtime.ReasonCommandNotFound, Message: "no such file"}, 0)
		}, "COMMAND_NOT_FOUND"},
		{"task, answer lost", func(w *world) func() {
			return w.fake.FailAfter(runtimetest.Prepare, "a", errors.New("connection reset"), 0)
		}, "RUNTIME_ERROR"},
		{"what the start needs", func(w *world) func() {
			return w.fake.Fail(runtimetest.Arm, "a", &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge, Message: "too much", Permanent: true}, 0)
		}, "ENVIRONMENT_TOO_LARGE"},
		{"secret", func(w *world) func() {
			f := func(int64) error { return unreadable }
			w.fault.snapshot.Store(&f)
			return func() { w.fault.snapshot.Store(nil) }
		}, "SECRET_UNREADABLE"},
		{"secret, broken since the standby was made", func(w *world) func() {
			seen := w.fault.reads.Load()
			f := func(n int64) error {
				if n-seen > 1 {
					return unreadable
				}
				return nil
			}
			w.fault.snapshot.Store(&f)
			return func() { w.fault.snapshot.Store(nil) }
		}, "SECRET_UNREADABLE"},
		{"hang in the image", func(w *world) func() {
			g := w.fake.Hold(runtimetest.EnsureImage, "")
			return g.Release
		}, "TIMEOUT"},
		{"hang in prepare", func(w *world) func() {
			g := w.fake.Hold(runtimetest.Prepare, "a")
			return g.Release
		}, "TIMEOUT"},
		{"hang in what the start needs", func(w *world) func() {
			g := w.fake.Hold(runtimetest.Arm, "a")
			return g.Release
		}, "TIMEOUT"},
		{"stop of the old one", func(w *world) func() {
			return w.fake.Fail(runtimetest.Stop, "a", errors.New("permission denied"), 0)
		}, "RUNTIME_ERROR"},
		{"panic", func(w *world) func() {
			return w.fake.OnCall(func(_ context.Context, c runtimetest.Call) error {
				if c.Method == runtimetest.Prepare {
					panic("boom")
				}
				return nil
			})
		}, "INTERNAL"},
		{"containerd does not answer", func(w *world) func() {
			return w.fake.Fail(runtimetest.List, "", errors.New("unavailable"), 0)
		}, "RUNTIME_ERROR"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.running(t, "a")
				old, _ := w.fake.Running("a")
				heal := tt.sabotage(w)
				must(w.set("a", "K", "1"))(t)
				pass(11 * time.Minute) // beyond every deadline, and many attempts
				now, ok := w.fake.Running("a")
				ws := must(w.store.Workspace("a"))(t)
				if !ok || now.ID != old.ID {
					t.Errorf("the old container %s does not run, but %q does", old.ID, now.ID)
				}
				if s := w.state(t, "a"); s != workspace.StateDegraded {
					t.Errorf("state is %v, want DEGRADED", s)
				}
				if f := ws.Status.Failure; f == nil || f.Reason != tt.reason || f.NextAttempt.IsZero() || !ws.Pending() {
					t.Errorf("failure is %+v, pending %v; want %s and a next attempt, pending", f, ws.Pending(), tt.reason)
				}
				heal()
				must(w.set("a", "K", "2"))(t) // the next good change heals it, at once
				synctest.Wait()
				w.wantSettled(t, "a")
			})
		})
	}
}

func TestContract06_ShortSwitch(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		seen := len(w.fake.Calls())
		must(w.set("a", "K", "1"))(t)
		synctest.Wait()
		calls := w.fake.Calls()[seen:]
		wantMethods(t, calls, runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove)
		for i, c := range calls {
			if c.Method == runtimetest.Stop && calls[i+1].Method != runtimetest.Start {
				t.Errorf("%v comes between the old one's end and the new one's start", calls[i+1].Method)
			}
		}
		launches := w.fake.Launches("")
		if last := launches[len(launches)-1]; !last.Armed {
			t.Errorf("generation %d was not what the standby was armed with", last.Instance.Generation)
		}
	})
}

func TestContract07_FailureKeepsItPending(t *testing.T) {
	t.Run("retried with a growing wait", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			heal := w.fake.Fail(runtimetest.EnsureImage, "", errPull, 0)
			before := w.sup.Cycles()
			must(w.set("a", "K", "1"))(t)
			var waits []time.Duration
			for range 12 {
				synctest.Wait()
				f := must(w.store.Workspace("a"))(t).Status.Failure
				wait := time.Until(f.NextAttempt)
				if f.Attempt != len(waits)+1 || f.Generation != 2 || wait <= 0 || wait > 90*time.Second {
					t.Fatalf("attempt %d of generation %d, next in %v", f.Attempt, f.Generation, wait)
				}
				waits = append(waits, wait)
				<-time.After(wait)
			}
			synctest.Wait()
			if waits[11] < 30*time.Second || waits[0] > 750*time.Millisecond {
				t.Errorf("the waits are %v, want them to grow from half a second to about a minute", waits)
			}
			if n := w.sup.Cycles() - before; n != 13 {
				t.Errorf("%d cycles, want 13", n)
			}
			heal()
			pass(2 * time.Minute)
			w.wantSettled(t, "a")
			// The next failure waits as little as the first.
			defer w.fake.Fail(runtimetest.EnsureImage, "", errPull, 1)()
			must(w.set("a", "K", "2"))(t)
			synctest.Wait()
			if f := must(w.store.Workspace("a"))(t).Status.Failure; f == nil || f.Attempt != 1 {
				t.Errorf("failure %+v, want attempt 1", f)
			}
			pass(time.Second)
			w.wantSettled(t, "a")
		})
	})
	t.Run("what an older spec can't start with is not held against the newer one", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			prepared := w.fake.Count(runtimetest.Prepare, "a")
			w.fake.OnCall(func(_ context.Context, c runtimetest.Call) error {
				if c.Method != runtimetest.Arm || c.Generation != 2 {
					return nil
				}
				// Mended while it is tried.
				must(w.edit("a", func(e *store.Editable) { e.Spec.Args = []string{"fewer"} }))(t)
				return &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge, Message: "too much", Permanent: true}
			})
			must(w.edit("a", func(e *store.Editable) { e.Spec.Args = []string{"many"} }))(t)
			synctest.Wait() // and no time passes
			if got := w.wantSettled(t, "a"); got.Generation != 3 || got.Status.Failure != nil {
				t.Errorf("generation %d, failure %+v", got.Generation, got.Status.Failure)
			}
			if n := w.fake.Count(runtimetest.Prepare, "a") - prepared; n != 2 {
				t.Errorf("%d standbys, want one of each spec", n)
			}
		})
	})
	t.Run("a new change cuts the wait short", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			w.fake.Fail(runtimetest.EnsureImage, "", errPull, 8)
			must(w.set("a", "K", "1"))(t)
			pass(time.Minute) // the wait is long by now
			begun := time.Now()
			for w.fake.Count(runtimetest.EnsureImage, "") < 10 {
				must(w.store.RestartWorkspace(context.Background(), "a", store.Options{}))(t)
				synctest.Wait()
			}
			if d := time.Since(begun); d != 0 {
				t.Errorf("the changes waited %v", d)
			}
			w.wantSettled(t, "a")
		})
	})
	t.Run("a panic is a failed cycle, wherever", func(t *testing.T) {
		for _, at := range []runtimetest.Method{runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove, runtimetest.List} {
			t.Run(string(at), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.running(t, "a")
					n := 0
					w.fake.OnCall(func(_ context.Context, c runtimetest.Call) error {
						if c.Method == at && n < 3 {
							n++
							panic("boom")
						}
						return nil
					})
					must(w.set("a", "K", "1"))(t)
					pass(10 * time.Minute)
					w.wantSettled(t, "a")
					if w.sup.Panics() != 3 {
						t.Errorf("%d panics counted, want 3", w.sup.Panics())
					}
				})
			})
		}
	})
	t.Run("the record can't be written", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			full := func() error { return store.ErrDiskFull }
			must(w.set("a", "K", "1"))(t)
			synctest.Wait()
			w.fault.update.Store(&full)
			must(w.set("a", "K", "2"))(t)
			pass(time.Hour)
			if n := w.sup.Cycles(); n > 200 {
				t.Errorf("%d cycles in an hour: a tight loop", n)
			}
			if _, ok := w.fake.Running("a"); !ok {
				t.Error("the container does not run")
			}
			w.fault.update.Store(nil)
			pass(2 * time.Minute)
			w.wantSettled(t, "a")
		})
	})
}

// Whatever wants something of a workspace at the same time, one hand does it.
func TestContract09_OneEntryPoint(t *testing.T) {
	ctx := context.Background()
	inWorld(t, func(t *testing.T, w *world) {
		var mu sync.Mutex
		hands := make(map[string]int)
		count := func(by int) runtimetest.Hook {
			return func(_ context.Context, c runtimetest.Call) error {
				switch c.Method {
				case runtimetest.Prepare, runtimetest.Arm, runtimetest.Start, runtimetest.Stop, runtimetest.Remove, runtimetest.RemoveWorkspace:
					mu.Lock()
					defer mu.Unlock()
					if hands[c.WorkspaceID] += by; hands[c.WorkspaceID] > 1 {
						t.Errorf("%s while another call has the workspace", c.Method)
					}
				}
				return nil
			}
		}
		w.fake.OnCall(count(1))
		w.fake.AfterCall(count(-1))
		w.running(t, "a")
		var callers sync.WaitGroup
		for i := range 20 {
			callers.Go(func() {
				_, _ = w.set("a", "K", fmt.Sprint(i))
				_, _ = w.store.RestartWorkspace(ctx, "a", store.Options{})
				if in, ok := w.fake.Running("a"); ok && i%3 == 0 {
					w.fake.Exit(in.ID, runtime.Exit{Known: true})
				}
				if i%5 == 0 {
					_, _ = w.store.StopWorkspace(ctx, "a", store.Options{})
					_, _ = w.store.StartWorkspace(ctx, "a", store.Options{})
				}
				_, _ = w.edit("a", func(e *store.Editable) { e.Spec.Image = fmt.Sprint("image", i) })
			})
		}
		callers.Wait()
		pass(10 * time.Minute)
		w.wantSettled(t, "a")
		must(w.store.DeleteWorkspace(ctx, "a", false, store.Options{}))(t)
		synctest.Wait()
		if in := w.fake.Instances(); len(in) > 0 {
			t.Errorf("left over: %v", in)
		}
	})
}

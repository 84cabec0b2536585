package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime/runtimetest"
)

func TestContract08_CrashSafe(t *testing.T) {
	for _, at := range []runtimetest.Method{
		runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Remove, runtimetest.List,
	} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,after=%v", at, after), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.running(t, "a")
					w.running(t, "bystander")
					bystander, _ := w.fake.Running("bystander")
					hold := w.fake.Hold
					if after {
						hold = w.fake.HoldAfter
					}
					gate := hold(at, "")
					must(w.set("a", "K", "1"))(t)
					held(t, gate)
					must(w.set("a", "L", "1"))(t)
					if err := w.crash(); err != nil {
						t.Fatal(err)
					}
					gate.Release()
					if err := w.boot(); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if at == runtimetest.Stop && after {
						w.wantSettled(t, "a") // at once: nothing has failed
					}
					pass(time.Minute)
					if ws := w.wantSettled(t, "a"); ws.Status.LastExit != nil {
						t.Errorf("last exit %+v, but the container did not end by itself", ws.Status.LastExit)
					}
					w.wantSettled(t, "bystander")
					if now, _ := w.fake.Running("bystander"); now.ID != bystander.ID {
						t.Error("a workspace whose generation ran was restarted at boot")
					}
				})
			})
		}
	}
	t.Run("started and not recorded is adopted", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			gate := w.fake.HoldAfter(runtimetest.Start, "a")
			must(w.set("a", "K", "1"))(t)
			held(t, gate)
			if err := w.crash(); err != nil {
				t.Fatal(err)
			}
			gate.Release()
			started, _ := w.fake.Running("a")
			if err := w.boot(); err != nil {
				t.Fatal(err)
			}
			pass(time.Minute)
			w.wantSettled(t, "a")
			if now, _ := w.fake.Running("a"); now.ID != started.ID {
				t.Errorf("%s was replaced by %s, want it adopted", started.ID, now.ID)
			}
		})
	})
	t.Run("a change after the shutdown began is made after the next boot", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.running(t, "a")
			if err := w.sup.Drain(context.Background()); err != nil {
				t.Fatal(err)
			}
			cycles := w.sup.Cycles()
			must(w.set("a", "K", "1"))(t)
			synctest.Wait()
			if w.sup.Cycles() != cycles {
				t.Error("a cycle began while draining")
			}
			if err := w.shutdown(); err != nil {
				t.Fatal(err)
			}
			if err := w.boot(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			w.wantSettled(t, "a")
		})
	})
}

func TestDrainWaitsForTheCycleInFlight(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		gate := w.fake.Hold(runtimetest.Prepare, "a")
		must(w.set("a", "K", "1"))(t)
		held(t, gate)
		drained := make(chan error, 1)
		go func() { drained <- w.sup.Drain(context.Background()) }()
		synctest.Wait()
		select {
		case err := <-drained:
			t.Fatalf("drained with a cycle in flight: %v", err)
		default:
		}
		gate.Release()
		if err := <-drained; err != nil {
			t.Fatal(err)
		}
		w.wantSettled(t, "a")
	})
	for _, at := range []runtimetest.Method{runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start} {
		t.Run("no longer than its deadline, in "+string(at), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.running(t, "a")
				gate := w.fake.Hold(at, "")
				must(w.set("a", "K", "1"))(t)
				held(t, gate)
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				if err := w.sup.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatalf("Drain = %v, want its deadline", err)
				}
				w.stop()
				w.ended.Wait() // the effect in flight is interrupted
				if err := w.store.Close(); err != nil {
					t.Fatal(err)
				}
				w.fake.Crash() // with the process end its standbys
				if err := w.boot(); err != nil {
					t.Fatal(err)
				}
				gate.Release()
				pass(time.Minute)
				w.wantSettled(t, "a")
			})
		})
	}
}

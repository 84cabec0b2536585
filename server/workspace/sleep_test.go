package workspace_test

import (
	"context"
	"errors"
	"log/slog"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// actorGoroutines counts the goroutines of actors that there are.
func actorGoroutines() int {
	stacks := make([]byte, 1<<20)
	return strings.Count(string(stacks[:goruntime.Stack(stacks, true)]), "(*actor).run(")
}

// An actor has a goroutine while it has something to do, or waits for a time, and
// none else; the end of its container is noticed all the same.
func TestActorSleeps(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		w.running(t, "b")
		must(w.store.StopWorkspace(context.Background(), "b", store.Options{}))(t)
		synctest.Wait()
		if n := actorGoroutines(); n != 0 {
			t.Errorf("one runs and one is stopped: %d goroutines", n)
		}
		gate := w.fake.Hold(runtimetest.Prepare, "a")
		must(w.set("a", "K", "1"))(t)
		held(t, gate)
		if n := actorGoroutines(); n != 1 {
			t.Errorf("in a cycle: %d goroutines", n)
		}
		gate.Release()
		synctest.Wait()
		w.wantSettled(t, "a")
		in, _ := w.fake.Running("a")
		w.fake.Exit(in.ID, runtime.Exit{Code: 3, Known: true})
		synctest.Wait()
		if s := w.state(t, "a"); s != workspace.StateBackoff {
			t.Errorf("after its end: %v", s)
		}
		if n := actorGoroutines(); n != 1 {
			t.Errorf("in a backoff: %d goroutines", n)
		}
		pass(time.Minute)
		w.wantSettled(t, "a")
		if n := actorGoroutines(); n != 0 {
			t.Errorf("it runs again: %d goroutines", n)
		}
	})
}

// The boot asks once what is there, and looks away from no end meanwhile.
func TestBootListsOnce(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		w.running(t, "b")
		if err := w.crash(); err != nil {
			t.Fatal(err)
		}
		lists := w.fake.Count(runtimetest.List, "")
		gate := w.fake.Hold(runtimetest.Watch, "a")
		if err := w.boot(); err != nil {
			t.Fatal(err)
		}
		held(t, gate)
		if n := w.fake.Count(runtimetest.List, "") - lists; n != 1 {
			t.Errorf("%d lists at boot, want 1", n)
		}
		in, _ := w.fake.Running("a")
		w.fake.Exit(in.ID, runtime.Exit{Code: 3, Known: true})
		gate.Release()
		synctest.Wait()
		if ws := must(w.store.Workspace("a"))(t); ws.Status.LastExit == nil || ws.Status.LastExit.Code != 3 {
			t.Errorf("last exit %+v, want code 3", ws.Status.LastExit)
		}
	})
}

// versions is a store with one workspace, which changes all the time or is not
// there, and a runtime in which nothing is.
type versions struct {
	workspace.Store
	workspace.Runtime
	newest, seen atomic.Int64
	gone         bool
}

func (v *versions) Workspace(id string) (store.Workspace, error) {
	v.seen.Store(v.newest.Load())
	if v.gone {
		return store.Workspace{}, store.ErrNotFound
	}
	return store.Workspace{ID: id, UID: "uid", Parked: true}, nil
}

func (*versions) ListWorkspaces(string, int, func(*store.Workspace) bool) ([]store.Workspace, bool, error) {
	return nil, false, nil
}

func (*versions) List(context.Context, string) ([]runtime.Instance, error) { return nil, nil }

// However kicks fall together with an actor's falling asleep, or with its being
// forgotten: what was committed before the last one is read.
func TestContract01_KickOfASleeper(t *testing.T) {
	for _, gone := range []bool{false, true} {
		v := &versions{gone: gone}
		sup := workspace.New(workspace.Config{Store: v, Runtime: v, Logger: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		var ended sync.WaitGroup
		ended.Go(func() {
			if err := sup.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		change := []store.Change{{ID: "a", Desired: true}}
		give := time.After(20 * time.Second)
		seen := func(n int64) bool {
			for v.seen.Load() < n {
				select {
				case <-give:
					t.Errorf("gone=%v: change %d was not read, %d was", gone, n, v.seen.Load())
					return false
				default:
					goruntime.Gosched()
				}
			}
			return true
		}
		for v.seen.Load() == 0 { // until the supervisor runs
			v.newest.Store(1)
			sup.OnCommit(change)
			goruntime.Gosched()
		}
		for round := range 20_000 {
			n := v.newest.Add(1)
			sup.OnCommit(change)
			for range round % 50 { // the next one comes a bit later each time
				if v.seen.Load() >= n {
					break
				}
			}
			if round%3 == 0 && !seen(n) {
				break
			}
		}
		seen(v.newest.Load())
		cancel()
		ended.Wait()
	}
}

func TestBackoffWaits(t *testing.T) {
	inConfiguredWorld(t, func(w *world) {
		w.cfg.Backoff = workspace.Backoff{Initial: time.Second, Max: 5 * time.Second}
	}, func(t *testing.T, w *world) {
		w.fake.Fail(runtimetest.Prepare, "", errPull, 0)
		must(w.create("a"))(t)
		for attempt, want := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 5 * time.Second, 5 * time.Second} {
			synctest.Wait()
			f := must(w.store.Workspace("a"))(t).Status.Failure
			if f == nil || f.Attempt != attempt+1 {
				t.Fatalf("failure %+v, want attempt %d", f, attempt+1)
			}
			wait := f.NextAttempt.Sub(f.Time)
			if wait < want/2 || wait > want*3/2+time.Millisecond {
				t.Errorf("attempt %d waits %v, want %v or up to a half less or more", f.Attempt, wait, want)
			}
			pass(wait)
		}
	})
}

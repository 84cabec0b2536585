package workspace_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/store"
)

// orphan makes an instance of a workspace that the store does not know.
func (w *world) orphan(t *testing.T, id, uid string, start bool) runtime.Instance {
	t.Helper()
	ctx := context.Background()
	if _, err := w.fake.EnsureImage(ctx, "good"); err != nil {
		t.Fatal(err)
	}
	in := must(w.fake.Prepare(ctx, runtime.Spec{WorkspaceID: id, WorkspaceUID: uid, Generation: 1, Image: "good"}))(t)
	if start {
		in = must(w.fake.Start(ctx, in.ID, runtime.Launch{Generation: 1}))(t)
	}
	return in
}

func (w *world) sweep() error { return w.sup.Sweep(context.Background()) }

// logged collects a world's log.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func logging(l *logged) func(*world) {
	return func(w *world) { w.cfg.Logger = slog.New(slog.NewTextHandler(l, nil)) }
}

// TestSweepOrphans: what carries our label and is no workspace's goes, and what
// is one's stays as it is.
func TestSweepOrphans(t *testing.T) {
	var log logged
	inConfiguredWorld(t, logging(&log), func(t *testing.T, w *world) {
		before := w.running(t, "a")
		w.running(t, "b")
		w.orphan(t, "gone", "uid-1", true)
		w.orphan(t, "gone", "uid-1", false)
		w.orphan(t, "a", "uid-of-an-earlier-a", true)
		starts := len(w.fake.Launches(""))
		if err := w.sweep(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		after := w.wantSettled(t, "a")
		w.wantSettled(t, "b")
		if n := len(w.fake.Instances()); n != 2 {
			t.Errorf("%d instances are left, want 2", n)
		}
		if after.Status.Running.InstanceID != before.Status.Running.InstanceID || len(w.fake.Launches("")) != starts {
			t.Error("a workspace's own container was restarted")
		}
		if n := w.sup.Orphans(); n != 3 || log.count("belongs to no workspace") != 3 {
			t.Errorf("%d orphans are counted, %d told of", n, log.count("belongs to no workspace"))
		}
		calls := len(w.fake.Calls())
		if err := w.sweep(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if got := methods(w.fake.Calls()[calls:]); len(got) != 1 || got[0] != string(runtimetest.Foreign) {
			t.Errorf("a sweep of what is in order calls %v", got)
		}
	})
}

// TestSweepLeavesOthersAlone: what is another daemon's is counted, once.
func TestSweepLeavesOthersAlone(t *testing.T) {
	var log logged
	inConfiguredWorld(t, logging(&log), func(t *testing.T, w *world) {
		w.fake.SetForeign("other", 3)
		w.fake.SetForeign("", 1)
		orphan := w.orphan(t, "x", "uid-x", true) // can't be, and is left alone all the same
		for range 3 {
			if err := w.sweep(); err != nil {
				t.Error(err)
			}
		}
		if in, ok := w.fake.Running("x"); !ok || in.ID != orphan.ID {
			t.Error("a new database has removed what it can't know")
		}
		if n := log.count("left alone"); n != 2 {
			t.Errorf("told %d times, want once for each", n)
		}
		if n := log.count("the database is new: the sweep removes nothing"); n != 1 {
			t.Errorf("told %d times that the database is new", n)
		}
		w.running(t, "a")
		w.fake.SetForeign("other", 0)
		if err := w.sweep(); err != nil {
			t.Error(err)
		}
		if n := log.count("database is new"); n != 1 {
			t.Errorf("a database that was used is called new")
		}
	})
}

// TestSweepGoesOn: what can't be removed, or asked for, keeps nothing else from
// being swept; the error says so, and the next sweep does the rest.
func TestSweepGoesOn(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		errStuck := errors.New("stuck")
		first := w.orphan(t, "x", "uid-x", true)
		w.orphan(t, "y", "uid-y", true)
		heal := []func(){
			w.fake.Fail(runtimetest.Remove, first.ID, errStuck, 0),
			w.fake.Fail(runtimetest.Foreign, "", errStuck, 0),
		}
		if err := w.sweep(); !errors.Is(err, errStuck) || strings.Count(err.Error(), "stuck") != 2 {
			t.Errorf("error %v", err)
		}
		if _, ok := w.fake.Running("y"); ok || len(w.fake.Instances()) != 2 {
			t.Errorf("left are %v", w.fake.Instances())
		}
		for _, h := range heal {
			h()
		}
		gate := w.fake.Hold(runtimetest.Remove, first.ID)
		begun := time.Now()
		if err := w.sweep(); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > time.Minute {
			t.Errorf("a removal that hangs: %v after %v", err, time.Since(begun))
		}
		gate.Release()
		if err := w.sweep(); err != nil || len(w.fake.Instances()) != 1 {
			t.Errorf("%v, left are %v", err, w.fake.Instances())
		}
	})
}

// TestSweepKicks: what a workspace should not have is its actor's to remove: the
// sweep makes it look, also one that has no actor.
func TestSweepKicks(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		ws := w.running(t, "parked")
		must(w.store.StopWorkspace(context.Background(), "parked", store.Options{}))(t)
		synctest.Wait()
		running := w.running(t, "running")
		w.reboot(t) // the parked one has no actor now
		w.orphan(t, "parked", ws.UID, true)
		w.orphan(t, "running", running.UID, false)
		synctest.Wait()
		if n := len(w.fake.Instances()); n != 3 {
			t.Fatalf("%d instances", n)
		}
		if err := w.sweep(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		w.wantSettled(t, "parked")
		w.wantSettled(t, "running")
		if n := w.sup.Orphans(); n != 0 {
			t.Errorf("%d orphans are counted: they were workspaces' own", n)
		}
	})
}

// TestSweepGoesByTheUID: what has lost its label is not an orphan for that.
func TestSweepGoesByTheUID(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		ws := w.running(t, "a")
		w.running(t, "b")
		must(w.store.StopWorkspace(context.Background(), "a", store.Options{}))(t)
		synctest.Wait()
		w.orphan(t, "", ws.UID, false)
		w.orphan(t, "b", ws.UID, false)
		if err := w.sweep(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		w.wantSettled(t, "a") // whose actor has removed them
		w.wantSettled(t, "b")
		if n := w.sup.Orphans(); n != 0 {
			t.Errorf("%d orphans are counted", n)
		}
	})
}

// TestSweepAndDeletion: a deletion in flight is its actor's.
func TestSweepAndDeletion(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		gate := w.fake.Hold(runtimetest.Remove, "a")
		must(w.store.DeleteWorkspace(context.Background(), "a", false, store.Options{}))(t)
		held(t, gate)
		if err := w.sweep(); err != nil {
			t.Error(err)
		}
		gate.Release()
		pass(time.Minute)
		if _, err := w.store.Workspace("a"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("it is still there: %v", err)
		}
		if n := w.sup.Orphans(); n != 0 || len(w.fake.Instances()) > 0 {
			t.Errorf("%d orphans, %v left", n, w.fake.Instances())
		}
	})
}

// TestSweepPanics: a panic in a removal is the caller's to recover, and no end of
// the process; the others are removed.
func TestSweepPanics(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.running(t, "a")
		first := w.orphan(t, "x", "uid-x", true)
		w.orphan(t, "y", "uid-y", true)
		heal := w.fake.OnCall(func(_ context.Context, c runtimetest.Call) error {
			if c.Method == runtimetest.Remove && c.InstanceID == first.ID {
				panic("injected")
			}
			return nil
		})
		func() {
			defer func() {
				if p := recover(); p != "injected" {
					t.Errorf("recovered %v", p)
				}
			}()
			_ = w.sweep()
		}()
		heal()
		if _, ok := w.fake.Running("y"); ok {
			t.Error("the other one is left")
		}
		if err := w.sweep(); err != nil || len(w.fake.Instances()) != 1 {
			t.Errorf("%v, left are %v", err, w.fake.Instances())
		}
	})
}

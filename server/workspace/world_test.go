package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
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
	"github.com/workspaced/workspaced/store/seal"
)

// world is a daemon without its API: a real store, the Fake, the actors. It is
// made inside a synctest bubble. Its methods return errors instead of failing a
// test, so that property tests can use it too.
type world struct {
	dir  string
	fake *runtimetest.Fake
	cfg  workspace.Config // Store and Runtime are set at boot

	store *store.Store
	fault faults
	sup   *workspace.Supervisor
	hub   *workspace.Hub
	stop  context.CancelFunc
	ended sync.WaitGroup
}

// faults stands between actors and store.
type faults struct {
	*store.Store
	snapshot atomic.Pointer[func(n int64) error] // before the n-th Snapshot
	reads    atomic.Int64
	update   atomic.Pointer[func() error]
	gone     atomic.Pointer[func()] // after a record was not found
}

func (f *faults) Workspace(id string) (store.Workspace, error) {
	ws, err := f.Store.Workspace(id)
	if hook := f.gone.Load(); hook != nil && errors.Is(err, store.ErrNotFound) {
		(*hook)()
	}
	return ws, err
}

func (f *faults) Snapshot(id string) (store.Snapshot, error) {
	n := f.reads.Add(1)
	if hook := f.snapshot.Load(); hook != nil {
		if err := (*hook)(n); err != nil {
			return store.Snapshot{}, err
		}
	}
	return f.Store.Snapshot(id)
}

func (f *faults) UpdateStatus(ctx context.Context, id, uid string, edit func(store.Workspace, *store.Status)) (store.Workspace, error) {
	if hook := f.update.Load(); hook != nil {
		if err := (*hook)(); err != nil {
			return store.Workspace{}, err
		}
	}
	return f.Store.UpdateStatus(ctx, id, uid, edit)
}

func (f *faults) FinishDeletion(ctx context.Context, id, uid string) error {
	if hook := f.update.Load(); hook != nil {
		if err := (*hook)(); err != nil {
			return err
		}
	}
	return f.Store.FinishDeletion(ctx, id, uid)
}

// boot starts a daemon on what is there.
func (w *world) boot() error {
	kek, err := seal.LoadOrCreate(filepath.Join(w.dir, "key"))
	if err != nil {
		return err
	}
	hub := workspace.NewHub()
	var sup *workspace.Supervisor
	st, err := store.Open(store.Config{
		Path: filepath.Join(w.dir, "db"),
		KEK:  kek,
		OnCommit: func(c []store.Change) {
			hub.OnCommit(c)
			sup.OnCommit(c)
		},
	})
	if err != nil {
		return err
	}
	w.store, w.hub = st, hub
	w.fault.Store = st
	cfg := w.cfg
	cfg.Store, cfg.Runtime = &w.fault, w.fake.Daemon()
	sup = workspace.New(cfg)
	w.sup = sup
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	w.ended.Go(func() { _ = sup.Run(ctx) })
	w.ended.Go(func() { _ = hub.Run(ctx, func() {}) })
	return nil
}

// shutdown ends the daemon in good order.
func (w *world) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	drainErr := w.sup.Drain(ctx)
	w.stop()
	w.ended.Wait()
	return errors.Join(drainErr, w.store.Close())
}

// crash ends the daemon as kill -9 would, as far as a process can do that to a
// part of itself: what it does from now on has no effect.
func (w *world) crash() error {
	w.kill()
	return w.bury()
}

// kill is the first half of crash: from now on the daemon has no effect.
func (w *world) kill() {
	w.fake.Crash()
	dead := func() error { return errors.New("crashed") }
	w.fault.update.Store(&dead)
}

func (w *world) bury() error {
	w.stop()
	w.ended.Wait()
	w.fault.update.Store(nil)
	return w.store.Close()
}

func (w *world) create(id string) (store.Result, error) {
	return w.store.CreateWorkspace(context.Background(), store.NewWorkspace{ID: id, Spec: store.Spec{Image: "good", Command: []string{"serve"}}}, store.Options{})
}

func (w *world) set(id, key, value string) (store.Result, error) {
	return w.store.UpdateSecrets(context.Background(), store.Scope{WorkspaceID: id}, store.SecretsUpdate{
		Set: []store.SecretValue{{Key: key, Value: seal.New([]byte(value))}},
	}, store.Options{})
}

// setFile sets a secret that is a file: for the container that runs if it is live.
func (w *world) setFile(id, key, value string, live bool) (store.Result, error) {
	return w.store.UpdateSecrets(context.Background(), store.Scope{WorkspaceID: id}, store.SecretsUpdate{
		Set: []store.SecretValue{{Key: key, Value: seal.New([]byte(value)), Delivery: store.DeliveryFiles}}, Live: live,
	}, store.Options{})
}

func (w *world) unset(id, key string) (store.Result, error) {
	return w.store.UpdateSecrets(context.Background(), store.Scope{WorkspaceID: id}, store.SecretsUpdate{Delete: []string{key}}, store.Options{})
}

func (w *world) edit(id string, edit func(*store.Editable)) (store.Result, error) {
	return w.store.UpdateWorkspace(context.Background(), id, func(e *store.Editable) error {
		edit(e)
		return nil
	}, store.Options{})
}

// env returns what the running container of the workspace was started with.
func (w *world) env(id string) map[string]string {
	in, ok := w.fake.Running(id)
	if !ok {
		return nil
	}
	env := make(map[string]string)
	for _, kv := range w.fake.Env(in.ID) {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return env
}

// settled checks what must hold once nothing is left to do: the container that
// runs has the record's generation and all of the values, and nothing else is
// there.
func (w *world) settled(id string) error {
	sn, err := w.store.Snapshot(id)
	if err != nil {
		return err
	}
	ws := sn.Workspace
	var ids []string
	for _, in := range w.fake.Instances() {
		if in.WorkspaceUID == ws.UID {
			ids = append(ids, in.ID+" "+in.Phase.String())
		}
	}
	if ws.Parked {
		if len(ids) > 0 || ws.Status.Running != nil {
			return fmt.Errorf("%s is parked and has %v, on record %+v", id, ids, ws.Status.Running)
		}
		return nil
	}
	if ws.End() != "" && !ws.Pending() {
		if len(ids) > 0 {
			return fmt.Errorf("%s is at its end and has %v", id, ids)
		}
		return nil
	}
	in, ok := w.fake.Running(id)
	if !ok || len(ids) != 1 {
		return fmt.Errorf("%s has %v, want one running; status %+v failure %+v", id, ids, ws.Status, ws.Status.Failure)
	}
	st := ws.Status
	if st.ObservedGeneration != ws.Generation || in.Generation != ws.Generation || st.Running == nil ||
		st.Running.InstanceID != in.ID || st.Failure != nil || st.StartingGeneration != 0 || !ws.PendingSince.IsZero() {
		return fmt.Errorf("%s is at generation %d, container %s at %d, status %+v", id, ws.Generation, in.ID, in.Generation, st)
	}
	started := w.startedWith(in.ID)
	if started < ws.StartGeneration() {
		return fmt.Errorf("%s was started with generation %d, and only a new container can have %d", id, started, ws.StartGeneration())
	}
	want, files := map[string]string{
		"WORKSPACE_ID": id, "WORKSPACE_UID": ws.UID, "WORKSPACE_GENERATION": fmt.Sprint(started),
	}, make(map[string]string)
	for k, v := range ws.Spec.Env {
		want[k] = v
	}
	for _, s := range sn.Secrets {
		if s.File(&ws.Spec) {
			files[s.Key] = s.Value.Reveal()
		} else {
			want[s.Key] = s.Value.Reveal()
		}
		if st.Running.SecretVersions[s.Key] != s.Version {
			return fmt.Errorf("%s: version of %s on record is %d, want %d", id, s.Key, st.Running.SecretVersions[s.Key], s.Version)
		}
	}
	if ws.Model != "" {
		for _, k := range ws.Spec.ModelVars() {
			want[k] = ws.Model
		}
	}
	got := w.env(id)
	for k, v := range want {
		if got[k] != v {
			return fmt.Errorf("%s: %s is %q in the container, want %q", id, k, got[k], v)
		}
	}
	if len(got) != len(want) {
		return fmt.Errorf("%s: the container has %d variables, want %d: %v", id, len(got), len(want), got)
	}
	if got := w.fake.Files(in.ID); !maps.Equal(got, files) {
		return fmt.Errorf("%s: the container has the files %v, want %v", id, got, files)
	}
	if n := len(st.Running.SecretVersions); n != len(sn.Secrets) && ws.Model == "" {
		return fmt.Errorf("%s: %d versions on record, want %d", id, n, len(sn.Secrets))
	}
	if v := w.fake.Violations(); len(v) > 0 {
		return fmt.Errorf("violations: %v", v)
	}
	return nil
}

// startedWith returns the generation that the container was started with.
func (w *world) startedWith(id string) int64 {
	for _, l := range w.fake.Launches("") {
		if l.Instance.ID == id {
			return l.Instance.Generation
		}
	}
	return 0
}

// inWorld runs a test in a bubble with a fresh world, and shuts it down.
func inWorld(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	inConfiguredWorld(t, func(*world) {}, test)
}

func inConfiguredWorld(t *testing.T, configure func(*world), test func(t *testing.T, w *world)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := &world{
			dir:  dir,
			fake: runtimetest.NewFake(runtimetest.AllowAnyImage()),
			cfg:  workspace.Config{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))},
		}
		configure(w)
		if err := w.boot(); err != nil {
			t.Fatal(err)
		}
		defer func() { // also after t.Fatal: a bubble ends only with its goroutines
			if err := w.shutdown(); err != nil {
				t.Error(err)
			}
			if v := w.fake.Violations(); len(v) > 0 {
				t.Errorf("violations: %v", v)
			}
		}()
		test(t, w)
	})
}

// pass lets the bubble's time pass, and everything come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// running creates a workspace and waits until it runs.
func (w *world) running(t *testing.T, id string) store.Workspace {
	t.Helper()
	must(w.create(id))(t)
	synctest.Wait()
	return w.wantSettled(t, id)
}

func (w *world) wantSettled(t *testing.T, id string) store.Workspace {
	t.Helper()
	if err := w.settled(id); err != nil {
		t.Fatal(err)
	}
	return must(w.store.Workspace(id))(t)
}

// held waits until a call is held at the gate.
func held(t *testing.T, g *runtimetest.Gate) {
	t.Helper()
	synctest.Wait()
	if g.Held() == 0 {
		t.Fatal("nothing is held at the gate")
	}
}

func (w *world) state(t *testing.T, id string) workspace.State {
	t.Helper()
	ws := must(w.store.Workspace(id))(t)
	s, _ := workspace.StateOf(&ws)
	return s
}

func methods(calls []runtimetest.Call) []string {
	var names []string
	for _, c := range calls {
		if c.Method != runtimetest.List && c.Method != runtimetest.Watch {
			names = append(names, string(c.Method))
		}
	}
	return names
}

func wantMethods(t *testing.T, calls []runtimetest.Call, want ...runtimetest.Method) {
	t.Helper()
	var names []string
	for _, m := range want {
		names = append(names, string(m))
	}
	if got := methods(calls); !slices.Equal(got, names) {
		t.Errorf("calls are %v, want %v", got, names)
	}
}

var errPull = &runtime.Error{Reason: runtime.ReasonImagePullFailed, Message: "registry refused"}

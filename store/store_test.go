package store

import (
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/store/seal"
)

// clock is a clock that tests set; each look is a microsecond later.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(time.Microsecond)
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// recorder records what OnCommit is told.
type recorder struct {
	mu      sync.Mutex
	changes []Change
}

func (r *recorder) OnCommit(changes []Change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes = append(r.changes, changes...)
}

// take returns what was recorded since the last take.
func (r *recorder) take() []Change {
	r.mu.Lock()
	defer r.mu.Unlock()
	changes := r.changes
	r.changes = nil
	return changes
}

// testT is what tests and rapid's properties have in common.
type testT interface {
	Helper()
	Error(args ...any)
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// harness is a store that can be closed and opened again.
type harness struct {
	*Store
	t      testT
	cfg    Config
	clock  *clock
	record *recorder
	// around does the steps when it is set, which is before the first change.
	around aroundFunc
}

type aroundFunc = func(ctx context.Context, step string, do func(context.Context) error) error

func newHarness(t testing.TB) *harness {
	t.Helper()
	dir := t.TempDir()
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{t: t, clock: newClock(), record: &recorder{}}
	h.cfg = Config{
		Path: filepath.Join(dir, "workspaced.db"), KEK: kek,
		OnCommit: h.record.OnCommit, Now: h.clock.Now,
		Around: func(ctx context.Context, step string, do func(context.Context) error) error {
			if h.around != nil {
				return h.around(ctx, step, do)
			}
			return do(ctx)
		},
	}
	h.open()
	t.Cleanup(func() { _ = h.Store.Close() })
	return h
}

func (h *harness) open() {
	h.t.Helper()
	s, err := Open(h.cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Store = s
}

func (h *harness) close() {
	h.t.Helper()
	if err := h.Close(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) reopen() {
	h.t.Helper()
	h.close()
	h.open()
}

// must returns a function's result and fails the test on an error.
func must[T any](v T, err error) func(testT) T {
	return func(t testT) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func value(key, v string) SecretValue { return SecretValue{Key: key, Value: seal.New([]byte(v))} }

func set(kv ...string) SecretsUpdate {
	var u SecretsUpdate
	for i := 0; i < len(kv); i += 2 {
		u.Set = append(u.Set, value(kv[i], kv[i+1]))
	}
	return u
}

// as is set with a delivery.
func as(d Delivery, kv ...string) SecretsUpdate {
	u := set(kv...)
	for i := range u.Set {
		u.Set[i].Delivery = d
	}
	return u
}

// rotated is set of files, for containers that run.
func rotated(kv ...string) SecretsUpdate {
	u := as(DeliveryFiles, kv...)
	u.Live = true
	return u
}

func in(id string) Scope { return Scope{WorkspaceID: id} }

var ctx = context.Background()

func (h *harness) create(id string, secrets ...SecretValue) Workspace {
	h.t.Helper()
	r := must(h.CreateWorkspace(ctx, NewWorkspace{ID: id, Spec: Spec{Image: "img"}, Secrets: secrets}, Options{}))(h.t)
	return r.Workspace
}

// values returns a snapshot's secrets.
func (h *harness) values(id string) map[string]string {
	h.t.Helper()
	values := map[string]string{}
	for _, s := range must(h.Snapshot(id))(h.t).Secrets {
		values[s.Key] = s.Value.Reveal()
	}
	return values
}

func TestStore_SurvivesReopen(t *testing.T) {
	h := newHarness(t)
	created := h.create("a", value("K", "v1"))
	must(h.UpdateSecrets(ctx, Scope{}, set("G", "g1"), Options{}))(t)
	r := must(h.UpdateSecrets(ctx, in("a"), set("K", "v2"), Options{}))(t)
	instance := h.InstanceUID()

	h.reopen()

	if h.InstanceUID() != instance {
		t.Error("another instance uid")
	}
	if diff := cmp.Diff(r.Workspace, must(h.Workspace("a"))(t)); diff != "" {
		t.Error(diff)
	}
	if r.Workspace.UID != created.UID || r.Workspace.Generation != 3 {
		t.Errorf("got uid %s generation %d", r.Workspace.UID, r.Workspace.Generation)
	}
	if diff := cmp.Diff(map[string]string{"K": "v2", "G": "g1"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	if h.Revision() != r.Workspace.Revision {
		t.Errorf("revision %d, want %d", h.Revision(), r.Workspace.Revision)
	}
}

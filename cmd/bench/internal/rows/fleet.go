package rows

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

const fleetTimeout = time.Minute

// fleet is a supervisor over a store and a runtime that hold nothing: what a
// workspace is follows from its number. So what is measured is the actors'.
type fleet struct {
	size   int
	parked bool                               // all are, else all run and have been for a while
	slow   func(ctx context.Context, n int64) // called in the n-th read of a record; may be nil

	supervisor *workspace.Supervisor
	cancel     context.CancelFunc
	ended      chan error
	reads      atomic.Int64 // of records, by actors
	looks      atomic.Int64 // at the containers of one workspace
	watched    atomic.Int64 // containers whose end is watched

	mu      sync.Mutex
	watches map[string]func(runtime.Exit) // what any runtime has to keep
}

// start starts the supervisor, which adopts what runs; close ends it.
func (f *fleet) start(ctx context.Context) {
	f.ended, f.watches = make(chan error, 1), make(map[string]func(runtime.Exit))
	f.supervisor = workspace.New(workspace.Config{Store: f, Runtime: f, Logger: slog.New(slog.DiscardHandler)})
	ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go func() { f.ended <- f.supervisor.Run(ctx) }()
}

func (f *fleet) close() error {
	f.cancel()
	return <-f.ended
}

// kicks are what a commit tells of each workspace.
func (f *fleet) kicks() []store.Change {
	kicks := make([]store.Change, f.size)
	for i := range kicks {
		kicks[i] = store.Change{ID: f.id(i), Desired: true}
	}
	return kicks
}

// reach kicks all until each actor has read its record: kicks that come before the
// supervisor runs are for nobody.
func (f *fleet) reach(ctx context.Context) error {
	kicks := f.kicks()
	for f.reads.Load() == 0 {
		f.supervisor.OnCommit(kicks[:1])
		if err := pause(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	f.supervisor.OnCommit(kicks[1:])
	return await(ctx, "reads", &f.reads, f.size)
}

// await waits until the count is reached.
func await(ctx context.Context, what string, count *atomic.Int64, n int) error {
	ctx, cancel := context.WithTimeout(ctx, fleetTimeout)
	defer cancel()
	for count.Load() < int64(n) {
		if err := pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%d %s of %d: %w", count.Load(), what, n, err)
		}
	}
	return nil
}

func (*fleet) id(i int) string { return fmt.Sprintf("workspace-%06d", i) }

func (f *fleet) record(id string) store.Workspace {
	w := store.Workspace{ID: strings.Clone(id), UID: "uid-of-" + id, Generation: 1, SpecGeneration: 1, Parked: f.parked}
	if !f.parked {
		w.Status.ObservedGeneration, w.Status.Starts = 1, 1
		w.Status.Running = &store.Running{InstanceID: id + "-0123456789ab", PID: 1}
	}
	return w
}

// Workspace is the store's.
func (f *fleet) Workspace(id string) (store.Workspace, error) {
	n := f.reads.Add(1)
	if f.slow != nil {
		f.slow(context.Background(), n)
	}
	return f.record(id), nil
}

// ListWorkspaces is the store's.
func (f *fleet) ListWorkspaces(_ string, _ int, match func(*store.Workspace) bool) (list []store.Workspace, more bool, err error) {
	for i := range f.size {
		if w := f.record(f.id(i)); match(&w) {
			list = append(list, w)
		}
	}
	return list, false, nil
}

var errFleet = errors.New("nothing in a fleet changes")

// Snapshot is the store's.
func (*fleet) Snapshot(string) (store.Snapshot, error) { return store.Snapshot{}, errFleet }

// UpdateStatus is the store's.
func (*fleet) UpdateStatus(context.Context, string, string, func(store.Workspace, *store.Status)) (store.Workspace, error) {
	return store.Workspace{}, errFleet
}

// Commits is the store's.
func (*fleet) Commits() (uint64, bool) { return 0, true }

// Revision is the store's.
func (*fleet) Revision() uint64 { return 1 }

// FinishDeletion is the store's.
func (*fleet) FinishDeletion(context.Context, string, string) error { return errFleet }

// List is the runtime's.
func (f *fleet) List(_ context.Context, uid string) (list []runtime.Instance, err error) {
	if uid != "" {
		f.looks.Add(1)
		return f.instances(strings.TrimPrefix(uid, "uid-of-")), nil
	}
	for i := range f.size {
		list = append(list, f.instances(f.id(i))...)
	}
	return list, nil
}

func (f *fleet) instances(id string) []runtime.Instance {
	if f.parked {
		return nil
	}
	return []runtime.Instance{{
		ID: id + "-0123456789ab", WorkspaceID: id, WorkspaceUID: "uid-of-" + id,
		Phase: runtime.PhaseRunning, PreparedGeneration: 1, Generation: 1, PID: 1,
	}}
}

// Watch is the runtime's.
func (f *fleet) Watch(_ context.Context, id string, ended func(runtime.Exit)) (stop func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watches[id] = ended
	f.watched.Add(1)
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.watches, id)
	}, nil
}

// EnsureImage is the runtime's.
func (*fleet) EnsureImage(context.Context, string) (string, error) { return "", errFleet }

// Prepare is the runtime's.
func (*fleet) Prepare(context.Context, runtime.Spec) (runtime.Instance, error) {
	return runtime.Instance{}, errFleet
}

// Arm is the runtime's.
func (*fleet) Arm(context.Context, string, runtime.Launch) error { return errFleet }

// Start is the runtime's.
func (*fleet) Start(context.Context, string, runtime.Launch) (runtime.Instance, error) {
	return runtime.Instance{}, errFleet
}

// Stop is the runtime's.
func (*fleet) Stop(context.Context, string, syscall.Signal, time.Duration) error { return errFleet }

// Remove is the runtime's.
func (*fleet) Remove(context.Context, string) error { return errFleet }

// Foreign is the runtime's.
func (*fleet) Foreign(context.Context) (map[string]int, error) { return nil, nil }

// Rotate is the runtime's.
func (*fleet) Rotate(context.Context, string, runtime.Rotation) (runtime.Instance, error) {
	return runtime.Instance{}, errFleet
}

// RemoveWorkspace is the runtime's.
func (*fleet) RemoveWorkspace(context.Context, string, string, bool) error { return errFleet }

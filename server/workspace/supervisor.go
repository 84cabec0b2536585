package workspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// Store is what the actors ask of the store.
type Store interface {
	// Workspace returns a record, or an error that is store.ErrNotFound.
	Workspace(id string) (store.Workspace, error)
	// ListWorkspaces returns the records that match, by id; limit 0 is none.
	ListWorkspaces(after string, limit int, match func(*store.Workspace) bool) ([]store.Workspace, bool, error)
	// Snapshot opens what a container is started from.
	Snapshot(id string) (store.Snapshot, error)
	// Commits counts commits, of any workspace and of global secrets, before anybody
	// can read what they commit; settled is false while one is under way.
	Commits() (n uint64, settled bool)
	// UpdateStatus edits a workspace's status in one transaction.
	UpdateStatus(ctx context.Context, id, uid string, edit func(store.Workspace, *store.Status)) (store.Workspace, error)
	// Revision counts what was ever stored.
	Revision() uint64
	// FinishDeletion removes a record for good.
	FinishDeletion(ctx context.Context, id, uid string) error
}

// Backoff says how long a workspace waits after a failure.
type Backoff struct {
	// Initial is the first wait, doubled each time up to Max; each is varied by
	// up to a half. Defaults: 500 ms and 1 minute.
	Initial, Max time.Duration
	// Reset is how long a container must have run for its end to count as the
	// first one. Default: 30 s.
	Reset time.Duration
}

// wait is how long to wait after n failures in a row.
func (b Backoff) wait(n int) time.Duration {
	if n <= 0 {
		return 0
	}
	wait := b.Initial
	for ; n > 1 && wait < b.Max; n-- {
		wait *= 2
	}
	wait = min(wait, b.Max)
	return wait/2 + rand.N(wait+1)
}

// Deadlines bound the steps of a cycle.
type Deadlines struct {
	Store       time.Duration // one transaction; default 30 s
	List        time.Duration // asking the runtime what is there; default 10 s
	Pull        time.Duration // fetching and unpacking an image; default 10 min
	Prepare     time.Duration // making a standby; default 1 min
	Start       time.Duration // from the go-ahead to the command; default 15 s
	Stop        time.Duration // beyond the workspace's own grace; default 15 s
	Remove      time.Duration // clean-up of one container; default 30 s
	RemoveRetry time.Duration // longest pause after a clean-up that failed; default 30 s
	WaitRetry   time.Duration // pause after a container could not be watched; default 1 s
	Sweep       time.Duration // one Sweep; default 1 min
}

// Config is what a Supervisor needs.
type Config struct {
	Store   Store
	Runtime Runtime
	// Logger gets what the actors do; default slog.Default().
	Logger *slog.Logger
	// MaxConcurrentCycles is how many workspaces make a container at once;
	// default 4.
	MaxConcurrentCycles int
	// SlotLend is how long a cycle may count against that limit; default 5 s.
	SlotLend  time.Duration
	Backoff   Backoff
	Deadlines Deadlines
	// Now is the clock of what is recorded; default time.Now.
	Now func() time.Time
	// Around does the steps that Steps names; tests make them fail. Default: it
	// calls do.
	Around func(ctx context.Context, step string, do func(context.Context) error) error
}

func (c *Config) setDefaults() {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Around == nil {
		c.Around = func(ctx context.Context, _ string, do func(context.Context) error) error { return do(ctx) }
	}
	if c.MaxConcurrentCycles <= 0 {
		c.MaxConcurrentCycles = 4
	}
	d := &c.Deadlines
	for _, v := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.SlotLend, 5 * time.Second},
		{&c.Backoff.Initial, 500 * time.Millisecond},
		{&c.Backoff.Max, time.Minute},
		{&c.Backoff.Reset, 30 * time.Second},
		{&d.Store, 30 * time.Second},
		{&d.List, 10 * time.Second},
		{&d.Pull, 10 * time.Minute},
		{&d.Prepare, time.Minute},
		{&d.Start, 15 * time.Second},
		{&d.Stop, 15 * time.Second},
		{&d.Remove, 30 * time.Second},
		{&d.RemoveRetry, 30 * time.Second},
		{&d.WaitRetry, time.Second},
		{&d.Sweep, time.Minute},
	} {
		if *v.field <= 0 {
			*v.field = v.value
		}
	}
}

// Supervisor owns the actors, one a workspace. OnCommit is the only way to reach
// them: give it to the store.
type Supervisor struct {
	cfg      Config
	limit    *limit // of standbys that are made at once
	rollout  *limit // of workspaces that a fleet's change replaces at once
	busy     gauge
	draining atomic.Bool
	cycles   atomic.Int64   // begun
	panics   atomic.Int64   // recovered
	orphans  atomic.Int64   // removed
	foreign  map[string]int // as last seen by Sweep

	mu     sync.Mutex
	actors registry // found without mu, changed with it
	// spawn starts an actor's goroutine; nil before Run. What is committed then, or
	// after Run's end, is found at the next boot.
	spawn func(*actor)
}

// New returns a supervisor that does nothing before Run.
func New(cfg Config) *Supervisor {
	cfg.setDefaults()
	s := &Supervisor{
		cfg:     cfg,
		limit:   newLimit(cfg.MaxConcurrentCycles),
		rollout: newLimit(cfg.MaxConcurrentCycles),
	}
	s.actors.init()
	return s
}

func (s *Supervisor) now() time.Time { return s.cfg.Now() }

// Cycles returns how many cycles were begun since the supervisor was made.
func (s *Supervisor) Cycles() int64 { return s.cycles.Load() }

// Panics returns how many panics were recovered since the supervisor was made.
func (s *Supervisor) Panics() int64 { return s.panics.Load() }

// Orphans returns how many containers were removed because they belonged to no
// workspace.
func (s *Supervisor) Orphans() int64 { return s.orphans.Load() }

// maxWait is the longest wait that anything asks for, jitter included.
func (s *Supervisor) maxWait() time.Duration {
	return max(s.cfg.Backoff.Max*2, s.cfg.Deadlines.RemoveRetry)
}

// OnCommit is called by the store after each commit, before the callers get
// their answers. It never blocks.
func (s *Supervisor) OnCommit(changes []store.Change) {
	for i := range changes {
		c := &changes[i]
		if !c.Desired && !c.Interrupt {
			continue
		}
		// As a rule it is enough to leave the token.
		if a := s.actors.find(c.ID); a == nil || c.Interrupt || a.hint() != awake {
			s.reach(c.ID, c.Interrupt)
		}
	}
}

// reach kicks the workspace's actor, whether it has a goroutine, has none, or is
// not there yet, and before that ends the effect in flight if interrupt is set.
func (s *Supervisor) reach(id string, interrupt bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spawn == nil {
		return
	}
	a := s.actors.find(id)
	if a == nil {
		a = newActor(s, id)
		s.actors.add(a)
	}
	if interrupt {
		a.interrupt()
	}
	a.hint()
	s.rouse(a)
}

// start kicks the workspace's actor; one that is new need not list its containers.
func (s *Supervisor) start(id string, first *listed) {
	s.mu.Lock()
	if s.actors.find(id) == nil {
		a := newActor(s, id)
		a.first = first
		s.actors.add(a)
	}
	s.mu.Unlock()
	s.reach(id, false)
}

// wake kicks an actor that is not retired.
func (s *Supervisor) wake(a *actor) {
	if a.hint() == awake {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rouse(a)
}

// rouse starts the goroutine of an actor that sleeps. The lock is held.
func (s *Supervisor) rouse(a *actor) {
	if a.life.CompareAndSwap(asleep, awake) {
		s.spawn(a)
	}
}

// retire forgets an actor whose workspace is gone, unless it was kicked since:
// then there is a new workspace of that id.
func (s *Supervisor) retire(a *actor) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.life.Store(retired)
	if a.kicked() {
		a.life.Store(awake)
		return false
	}
	s.actors.remove(a)
	return true
}

// Run boots: it starts the actors of the workspaces that need one, which adopt
// what runs. Then it runs until ctx ends, and returns when every actor has.
func (s *Supervisor) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	s.mu.Lock()
	if s.spawn != nil {
		s.mu.Unlock()
		return errors.New("supervisor: runs already")
	}
	s.spawn = func(a *actor) { wg.Go(func() { a.run(ctx) }) }
	s.mu.Unlock()

	err := s.boot(ctx)
	if err == nil {
		<-ctx.Done()
	}
	// From here on nothing is spawned, so that the wait has an end.
	s.mu.Lock()
	s.spawn = func(*actor) {}
	s.mu.Unlock()
	cancel() // also after a boot that failed
	wg.Wait()
	s.mu.Lock()
	var all []*actor
	s.actors.each(func(a *actor) { all = append(all, a) })
	s.mu.Unlock()
	for _, a := range all {
		a.unwatch() // no goroutine of theirs is left
	}
	return err
}

// boot kicks what has something to do or to watch. A workspace that is parked
// with nothing left of a container needs no actor.
func (s *Supervisor) boot(ctx context.Context) error {
	lctx, cancel := context.WithTimeout(ctx, s.cfg.Deadlines.List)
	defer cancel()
	byUID := make(map[string][]runtime.Instance)
	instances, err := s.cfg.Runtime.List(lctx, "")
	if err != nil {
		// Each actor asks for its own and retries; unknown is not gone.
		s.cfg.Logger.WarnContext(ctx, "can't list the containers at start", "error", err)
	}
	for _, in := range instances {
		byUID[in.WorkspaceUID] = append(byUID[in.WorkspaceUID], in)
	}
	ws, _, listErr := s.cfg.Store.ListWorkspaces("", 0, func(w *store.Workspace) bool {
		return err != nil || !w.Parked || w.Deleting != nil || unsettled(view{ws: w}) || len(byUID[w.UID]) > 0
	})
	if listErr != nil {
		return fmt.Errorf("boot: %w", listErr)
	}
	for i := range ws {
		if err != nil {
			s.reach(ws[i].ID, false)
		} else {
			s.start(ws[i].ID, &listed{ws[i].UID, byUID[ws[i].UID]})
		}
	}
	s.cfg.Logger.InfoContext(ctx, "supervisor started", "actors", len(ws), "containers", len(instances))
	return nil
}

// Drain begins no new cycle and waits until those in flight have ended, or ctx
// has. What is pending stands on disk. Cancel Run's context after it.
func (s *Supervisor) Drain(ctx context.Context) error {
	s.draining.Store(true)
	return s.busy.wait(ctx)
}

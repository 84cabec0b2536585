package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/servertest/linear"
)

const (
	// clients work at once; one more repeats its calls until they are answered.
	clients = 4
	// clientPauses in a round keep its history small enough to be checked in seconds.
	clientPauses = 200
	// clockSlack is how much the history's clock, which only goes forward, may
	// differ from the containers'.
	clockSlack = time.Millisecond
)

// Issue item 3, end to end: concurrent clients change secrets and look at them
// while the daemon is killed at random moments. One order of all changes explains
// what every caller was told and with what every container was started.
func TestContract01_Linearizable(t *testing.T) {
	// Rounds: a history of any length would take any time to check, and now and
	// then a short one does too.
	round := 5 * time.Second
	left := max(soakTime(), round)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	decided := 0
	for n := 0; !t.Failed() && (left > 0 || decided == 0 && n < 4); n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			s := newFleet(t, 5*time.Minute, lab.Options{OwnContainerd: true})
			r := s.linearRound(n, round, random)
			if r.check() {
				decided++
			}
			if !r.enough {
				round *= 2 // a busy machine: as many calls and kills, in twice the time
			}
		})
		left -= round
	}
	if decided == 0 {
		t.Error("no history could be checked in time")
	}
}

// linearRound is a round: new workspaces, and a history.
type linearRound struct {
	*fleet
	history  *linear.History
	duration time.Duration
	names    []string
	keys     []string
	values   func() string
	enough   bool // happened for the check to mean anything
	// alive is held for reading during a call, so that who kills the daemon knows
	// when all of them have been told.
	alive sync.RWMutex
}

// linearRound makes a history.
func (s *fleet) linearRound(n int, duration time.Duration, random *rand.Rand) *linearRound {
	s.t.Helper()
	r := &linearRound{fleet: s, history: linear.NewHistory(), duration: duration}
	for i := range 3 {
		r.names = append(r.names, fmt.Sprintf("l%d-%d", n, i))
		r.keys = append(r.keys, fmt.Sprintf("K%d_%d", n, i)) // other keys than the round before, for global ones stay
	}
	var values int
	var mu sync.Mutex
	r.values = func() string {
		mu.Lock()
		defer mu.Unlock()
		values++
		return strconv.Itoa(values)
	}
	for _, name := range r.names {
		r.create(name)
	}

	ctx, cancel := context.WithTimeout(s.ctx, duration)
	defer cancel()
	var group errgroup.Group
	for i := range clients + 1 {
		own := rand.New(rand.NewPCG(random.Uint64(), 0))
		group.Go(func() error { r.client(ctx, i, own); return nil })
	}
	kills := r.killer(ctx, random)
	_ = group.Wait() // they return nothing
	r.history.Barrier()

	r.settle()
	launches := 0
	for i, name := range r.names {
		launches += r.recordLaunches(200+i, name)
	}
	r.enough = kills > 0 && launches >= 2*len(r.names)
	s.t.Logf("round %d: %v, %d kills, %d operations, %d of them launches", n, duration, kills, len(r.history.Entries()), launches)
	for _, name := range r.names {
		s.asked[name] = &asked{exists: true}
		s.remove(name)
		delete(s.asked, name)
	}
	for _, name := range r.names {
		s.gone(s.id(name))
	}
	s.verify() // that nothing is left
	return r
}

// check checks the history; decided is false where that would take too long, or
// too little happened.
func (r *linearRound) check() (decided bool) {
	r.t.Helper()
	err := r.history.Check(linear.Options{Timeout: 30 * time.Second, AllLaunches: true})
	if err != nil && !errors.Is(err, linear.ErrUndecided) {
		r.t.Error(err)
	}
	return err == nil && r.enough
}

// settle waits until every workspace is what was asked for, and looks.
func (r *linearRound) settle() {
	r.t.Helper()
	c := &linear.Client{API: r.fleet.client(), History: r.history, ID: 100}
	for _, name := range r.names {
		w := r.until(r.id(name), "settled", func(w *workspacev1.Workspace) bool { return !w.Reconciling })
		if !w.Parked {
			r.inside(r.id(name), w.ObservedGeneration) // it has written its journal
		}
		for _, kind := range []linear.Kind{linear.List, linear.Get} {
			if _, err := c.Do(r.ctx, linear.Op{Kind: kind, Workspace: r.id(name)}); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

// create makes a workspace, as a linear.Client does, but for its spec.
func (r *linearRound) create(name string) {
	r.t.Helper()
	call := r.history.Begin(99, linear.Op{Kind: linear.Create, Workspace: r.id(name)})
	resp, err := r.fleet.client().CreateWorkspace(r.ctx, &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: r.id(name), Workspace: &workspacev1.Workspace{Spec: r.fleetSpec(name)},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	call.End(linear.Result{Generation: resp.Generation, Changed: true})
}

// client does operations until ctx ends. The last one repeats those that are not
// answered, over the daemon's deaths, and the others don't.
func (r *linearRound) client(ctx context.Context, i int, random *rand.Rand) {
	c := &linear.Client{API: r.fleet.client(), History: r.history, ID: i}
	repeats := i == clients
	if repeats {
		c.Retry = 20 * time.Millisecond
	}
	tick := time.NewTicker(r.duration / clientPauses)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		op := r.operation(random)
		timeout := 5 * time.Second
		if op.Kind == linear.Wait {
			timeout = time.Second // a stopped workspace lets it wait
		}
		call, cancel := context.WithTimeout(r.ctx, timeout)
		if !repeats {
			r.alive.RLock()
		}
		_, _ = c.Do(call, op) // the history has it
		if !repeats {
			r.alive.RUnlock()
		}
		cancel()
	}
}

// operation is any.
func (r *linearRound) operation(random *rand.Rand) linear.Op {
	op := linear.Op{Workspace: r.id(r.names[random.IntN(len(r.names))])}
	key := func() string { return r.keys[random.IntN(len(r.keys))] }
	if random.IntN(30) == 0 {
		op.Workspace = "" // all of them: the costliest to check
	}
	switch n := random.IntN(100); {
	case n < 35:
		op.Kind, op.Set = linear.Set, map[string]string{key(): r.values()}
		op.NextStart = random.IntN(5) == 0
	case n < 45:
		op.Kind, op.Set = linear.Batch, map[string]string{r.keys[0]: r.values(), r.keys[1]: r.values()}
		op.Delete = []string{r.keys[2]}
	case n < 55:
		op.Kind, op.Delete = linear.Delete, []string{key()}
	case n < 70 || op.Workspace == "":
		op.Kind = linear.List
	case n < 80:
		op.Kind = linear.Get
	case n < 87:
		op.Kind = linear.Wait
	case n < 90:
		op.Kind = linear.Restart
	case n < 94:
		op.Kind = linear.Stop
	default:
		op.Kind = linear.Start
	}
	return op
}

// killer kills the daemon until ctx ends, and leaves it running. It returns how
// often.
func (r *linearRound) killer(ctx context.Context, random *rand.Rand) (kills int) {
	r.t.Helper()
	for {
		moment := time.NewTimer(r.duration/50 + time.Duration(random.Int64N(int64(r.duration*2/5))))
		select {
		case <-moment.C:
		case <-ctx.Done():
			moment.Stop()
			return kills
		}
		kills++
		if err := r.Daemon.Kill(); err != nil {
			r.t.Error(err)
		}
		r.alive.Lock()
		r.history.Barrier()
		err := r.Daemon.Start(r.ctx)
		r.alive.Unlock()
		if err != nil {
			r.t.Error(err)
			return kills
		}
	}
}

// recordLaunches adds the containers of a workspace to the history. Its values
// were read after the container before had been told to end, or, where that was
// killed, after it had started.
func (r *linearRound) recordLaunches(client int, name string) (launches int) {
	r.t.Helper()
	var earliest int64
	for _, entry := range r.journal(name) {
		at := r.history.At(entry.Time)
		if !entry.Ends {
			if !entry.Alone {
				r.t.Errorf("%s: two containers ran at once", name)
			}
			generation, err := strconv.ParseInt(entry.Env["WORKSPACE_GENERATION"], 10, 64)
			if err != nil {
				r.t.Fatal(err)
			}
			launches++
			r.history.Record(linear.Entry{
				Client: client, Op: linear.Op{Kind: linear.Launch, Workspace: r.id(name)},
				Result: linear.Result{Generation: generation, Env: entry.Env},
				Call:   earliest, Return: at + int64(clockSlack),
			})
		}
		earliest = at - int64(clockSlack)
	}
	return launches
}

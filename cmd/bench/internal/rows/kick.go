package rows

import (
	"context"
	"errors"
	"math/rand/v2"
	goruntime "runtime"
	"sync"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	"github.com/workspaced/workspaced/store"
)

var kickRow = Row{
	Name:  "kick",
	What:  "what a commit costs that tells an actor, which has not looked yet, to look",
	Limit: time.Minute,
	Run: func(ctx context.Context, env *Env) (_ []measure.Result, err error) {
		r, err := env.startRivals(ctx)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, r.Close()) }()
		return kick(ctx, kickSize{rounds: 25, actors: 1000, goroutines: 16, ops: 1_000_000}, r.workqueueAdd, nil)
	},
}

type kickSize struct{ rounds, actors, goroutines, ops int }

// kick kicks actors that have a token already: each is held in the read of its
// record. workqueue adds to client-go's workqueue a key that waits there already,
// from so many goroutines, so often in all, and returns the ns of each. step, which
// may be nil, is done beside each of our kicks.
func kick(ctx context.Context, size kickSize, workqueue func(goroutines, ops int) (float64, error), step func()) (_ []measure.Result, err error) {
	release := make(chan struct{})
	f := &fleet{size: size.actors, parked: true, slow: func(context.Context, int64) { <-release }}
	f.start(ctx)
	defer func() {
		close(release)
		err = errors.Join(err, f.close())
	}()
	if err := f.reach(ctx); err != nil {
		return nil, err
	}
	kicks := f.kicks()
	f.supervisor.OnCommit(kicks) // the token that stays
	rand.Shuffle(len(kicks), func(i, j int) { kicks[i], kicks[j] = kicks[j], kicks[i] })

	flags := make([]flag, len(kicks))
	ours := func(goroutines int, kicks []store.Change) func() error {
		return inParallel(goroutines, size.ops, func(ops int) {
			for i := 0; ops > 0; ops-- {
				f.supervisor.OnCommit(kicks[i : i+1])
				if step != nil {
					step()
				}
				if i++; i == len(kicks) {
					i = 0
				}
			}
		})
	}
	marks := func(goroutines, flagged int) func() error {
		return inParallel(goroutines, size.ops, func(ops int) {
			for i := 0; ops > 0; ops-- {
				flags[i].set()
				if i++; i == flagged {
					i = 0
				}
			}
		})
	}
	timed := func(into *measure.Samples, do func() error) func() error {
		return func() error {
			begin := time.Now()
			if err := do(); err != nil {
				return err
			}
			*into = append(*into, float64(time.Since(begin))/float64(size.ops))
			return nil
		}
	}
	counted := func(into *measure.Samples, do func() error) func() error {
		return func() error {
			var before, after goruntime.MemStats
			goruntime.ReadMemStats(&before)
			err := do()
			goruntime.ReadMemStats(&after)
			*into = append(*into, float64((after.Mallocs-before.Mallocs)/uint64(size.ops)))
			return err
		}
	}
	rival := func(into *measure.Samples, goroutines int) func() error {
		return func() error {
			ns, err := workqueue(goroutines, size.ops)
			*into = append(*into, ns)
			return err
		}
	}
	var one, oneFlag, all, allFlags, crowd, crowdFlag, queue, crowdQueue, allocs, flagAllocs measure.Samples
	err = measure.Alternate(ctx, size.rounds,
		timed(&one, ours(1, kicks[:1])), timed(&oneFlag, marks(1, 1)), rival(&queue, 1),
		timed(&all, ours(1, kicks)), timed(&allFlags, marks(1, len(flags))),
		timed(&crowd, ours(size.goroutines, kicks[:1])), timed(&crowdFlag, marks(size.goroutines, 1)), rival(&crowdQueue, size.goroutines),
		counted(&allocs, ours(1, kicks)), counted(&flagAllocs, marks(1, len(flags))),
	)
	if err != nil {
		return nil, err
	}
	return []measure.Result{
		measure.Compare("kick/coalesced", "ns", one, "a mutex and a flag", oneFlag, measure.MedianAtMost(10)),
		measure.Compare("kick/1000 actors", "ns", all, "1000 mutexes and flags", allFlags, measure.MedianAtMost(30)),
		measure.Compare("kick/allocations", "1", allocs, "a mutex and a flag", flagAllocs, measure.MedianAtMost(0)),
		measure.Compare("kick/workqueue", "ns", one, "Add of a waiting key to client-go's workqueue", queue),
		measure.Compare("kick/workqueue, 16 goroutines", "ns", crowd, "Add of a waiting key to client-go's workqueue", crowdQueue, measure.RatioAtMost(0.2)),
		measure.Compare("kick/flag, 16 goroutines", "ns", crowd, "a mutex and a flag", crowdFlag),
	}, nil
}

// flag is the least that a kick could be.
type flag struct {
	mu sync.Mutex
	up bool
}

func (f *flag) set() {
	f.mu.Lock()
	f.up = true
	f.mu.Unlock()
}

// inParallel shares ops operations out to so many goroutines.
func inParallel(goroutines, ops int, do func(ops int)) func() error {
	return func() error {
		if goroutines == 1 {
			do(ops)
			return nil
		}
		var group sync.WaitGroup
		for range goroutines {
			group.Go(func() { do(ops / goroutines) })
		}
		group.Wait()
		return nil
	}
}

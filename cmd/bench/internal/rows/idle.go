package rows

import (
	"context"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

var idleRow = Row{
	Name:  "idle",
	What:  "what workspaces cost with which nothing happens",
	Limit: 4 * time.Minute,
	Run: func(ctx context.Context, env *Env) (all []measure.Result, err error) {
		for _, part := range idleParts {
			results, err := part(ctx, env)
			all = append(all, results...)
			if err != nil {
				return all, err
			}
		}
		return all, nil
	},
}

var idleParts = []func(context.Context, *Env) ([]measure.Result, error){
	func(ctx context.Context, _ *Env) ([]measure.Result, error) {
		return idleMemory(ctx, idleSize{rounds: 3, workspaces: 100_000}, nil)
	},
	func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return adopt(ctx, env, adoptSize{rounds: 5, containers: 200}, nil)
	},
	startStopped,
}

type idleSize struct{ rounds, workspaces int }

// idleMemory measures what one workspace takes: its actor, with all that the
// supervisor and the runtime's watch need for it. The store's and the runtime's own
// memory does not count: they hold nothing. Beside it stands a goroutine that waits
// for a channel of its own, the least that an actor with a goroutine could be.
// keep, which may be nil, returns what is to be held for each workspace as well.
func idleMemory(ctx context.Context, size idleSize, keep func() any) ([]measure.Result, error) {
	var stopped, running, bare footprints
	side := func(into *footprints, begin func() (end func() error, err error)) func() error {
		return func() error {
			before := footprintNow()
			end, err := begin()
			if err != nil {
				return err
			}
			into.add(before, footprintNow(), size.workspaces)
			return end()
		}
	}
	fleetSide := func(parked bool) func() (func() error, error) {
		return func() (func() error, error) {
			f := &fleet{size: size.workspaces, parked: parked}
			before := goruntime.NumGoroutine()
			f.start(ctx)
			var err error
			if parked {
				err = f.reach(ctx) // else none has an actor at all
			} else {
				err = await(ctx, "watches", &f.watched, size.workspaces)
			}
			if err = errors.Join(err, calm(ctx, before)); err != nil {
				return nil, errors.Join(err, f.close())
			}
			var kept []any
			if keep != nil {
				for range size.workspaces {
					kept = append(kept, keep())
				}
			}
			return func() error {
				goruntime.KeepAlive(kept)
				return f.close()
			}, nil
		}
	}
	err := measure.Alternate(ctx, size.rounds,
		side(&stopped, fleetSide(true)),
		side(&running, fleetSide(false)),
		side(&bare, func() (func() error, error) {
			end := make([]chan struct{}, size.workspaces)
			for i := range end {
				end[i] = make(chan struct{})
				go func() { <-end[i] }()
			}
			return func() error {
				for _, c := range end {
					close(c)
				}
				return nil
			}, nil
		}),
	)
	if err != nil {
		return nil, err
	}
	const goroutine = "a goroutine that waits for a channel"
	return []measure.Result{
		measure.Compare("idle/stopped, heap and stacks", "KB", stopped.heap, goroutine, bare.heap, measure.MedianAtMost(4)),
		measure.Compare("idle/stopped, resident", "KB", stopped.rss, goroutine, bare.rss, measure.MedianAtMost(4)),
		measure.Compare("idle/running, heap and stacks", "KB", running.heap, goroutine, bare.heap, measure.MedianAtMost(4)),
		measure.Compare("idle/running, resident", "KB", running.rss, goroutine, bare.rss, measure.MedianAtMost(4)),
	}, nil
}

// calm waits until goroutines that have something to do are done with it: until
// their number is what it was, or no longer falls.
func calm(ctx context.Context, before int) error {
	for last, same := 0, 0; same < 50; {
		n := goruntime.NumGoroutine()
		if n <= before+1 { // the supervisor's
			return nil
		}
		if same++; n != last {
			last, same = n, 0
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// footprint is what this process takes, in bytes.
type footprint struct{ heap, rss float64 }

// footprints are what one of many things takes, in KB.
type footprints struct{ heap, rss measure.Samples }

func (f *footprints) add(before, after footprint, n int) {
	f.heap = append(f.heap, (after.heap-before.heap)/1024/float64(n))
	f.rss = append(f.rss, (after.rss-before.rss)/1024/float64(n))
}

// footprintNow measures once nothing that could be given back is left.
func footprintNow() (f footprint) {
	goruntime.GC() // what finalizers and pools keep goes with the second
	debug.FreeOSMemory()
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(samples)
	for _, s := range samples {
		f.heap += float64(s.Value.Uint64())
	}
	var total, resident float64
	if b, err := os.ReadFile("/proc/self/statm"); err == nil {
		_, _ = fmt.Sscan(string(b), &total, &resident) // always two numbers
	}
	f.rss = resident * float64(os.Getpagesize())
	return f
}

package rows

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

var throughputRow = Row{
	Name:  "throughput",
	What:  "cycles a second while 200 workspaces run, by how many are made at once",
	Limit: 5 * time.Minute,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return throughput(ctx, env, throughputSize{workspaces: 200, secrets: 3, rounds: 2, atOnce: []int{1, 2, 4, 8, 16}, cycles: 8}, nil)
	},
}

// throughputSize: each rate is that of so many cycles, and of half as many again
// as are made at once at least.
type throughputSize struct {
	workspaces, secrets, rounds int
	atOnce                      []int
	cycles                      int
}

// throughput changes several workspaces together, so many of which get their new
// container at once, and has as many callers of containerd's client replace bare
// containers.
func throughput(ctx context.Context, env *Env, size throughputSize, around aroundFunc) (_ []measure.Result, err error) {
	m, err := startMachine(ctx, env, around)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close(ctx)) }()
	var ids []string
	for i := range size.workspaces {
		ids = append(ids, fmt.Sprintf("w-%d", i))
	}
	err = forAll(ids, 4, func(id string) error { return m.create(ctx, id, size.secrets) })
	if err != nil {
		return nil, err
	}
	env.logf("%d workspaces run", len(ids))
	bares := &bareFleet{}
	defer func() { err = errors.Join(err, bares.close(ctx)) }()

	var results []measure.Result
	next := 0
	for _, n := range size.atOnce {
		if err := m.limit(ctx, n); err != nil {
			return results, err
		}
		if err := bares.grow(ctx, m, ids[0], n, size.secrets); err != nil {
			return results, err
		}
		cycles := max(size.cycles, n+n/2)
		var ours, bare measure.Samples
		rate := func(into *measure.Samples, do func() error) func() error {
			return func() error {
				begin := time.Now()
				err := do()
				*into = append(*into, float64(cycles)/time.Since(begin).Seconds())
				return err
			}
		}
		err := measure.Alternate(ctx, size.rounds,
			rate(&ours, func() error {
				var chosen []string
				for range cycles {
					chosen = append(chosen, ids[next%len(ids)])
					next++
				}
				return forAll(chosen, cycles, func(id string) error { return m.restart(ctx, id) })
			}),
			rate(&bare, func() error { return bares.replace(ctx, cycles) }),
		)
		if err != nil {
			return results, err
		}
		env.logf("%d at once: %.1f a second, the client %.1f", n, ours.Median(), bare.Median())
		results = append(results, measure.Compare(fmt.Sprintf("throughput/at-%d", n), "1/s",
			ours, fmt.Sprintf("containerd's client, %d at once", n), bare, measure.RatioAtLeast(1)))
	}
	return results, nil
}

// forAll calls f for each, so many at once, and returns the first error.
func forAll[T any](all []T, atOnce int, f func(T) error) error {
	var group errgroup.Group
	group.SetLimit(atOnce)
	for _, one := range all {
		group.Go(func() error { return f(one) })
	}
	return group.Wait()
}

// bareFleet are bare containers, each with a caller of its own.
type bareFleet struct{ all []*bare }

// grow makes it n containers, like that of the workspace.
func (f *bareFleet) grow(ctx context.Context, m *machine, workspace string, n, secrets int) error {
	for len(f.all) < n {
		b, err := m.newBare(ctx, workspace, fmt.Sprintf("bare-%d", len(f.all)), secrets)
		if err != nil {
			return err
		}
		f.all = append(f.all, b)
	}
	return nil
}

// replace replaces so many, all callers at once, none of whom waits for another.
func (f *bareFleet) replace(ctx context.Context, cycles int) error {
	todo := make(chan struct{}, cycles)
	for range cycles {
		todo <- struct{}{}
	}
	close(todo)
	return forAll(f.all, len(f.all), func(b *bare) error {
		for range todo {
			if err := b.replace(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

func (f *bareFleet) close(ctx context.Context) error {
	return forAll(f.all, len(f.all)+1, func(b *bare) error { return b.close(ctx) })
}

package sim

import (
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"runtime/debug"
	"strings"
	"testing"
	"testing/synctest"
)

// Run runs one seed, in a bubble of its own, with its files below dir, which it
// removes. What it finds is in the report, as a Failure.
func Run(t *testing.T, seed uint64, dir string) *Report {
	t.Helper()
	p := draw(seed)
	return inWorld(t, p, dir, func(here string) (*world, func() error, error) {
		s, err := newScene(p, here)
		if err != nil {
			return nil, nil, err
		}
		return s.world, s.play, nil
	})
}

// inWorld makes a world in a bubble, plays in it, and shuts it down.
func inWorld(t *testing.T, p *plan, dir string, create func(dir string) (*world, func() error, error)) *Report {
	t.Helper()
	here, err := os.MkdirTemp(dir, fmt.Sprintf("seed-%d-", p.seed))
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(here)
	var w *world
	err = bubble(t, func() (err error) {
		var play func() error
		if w, play, err = create(here); err != nil {
			return err
		}
		err = guard(play)
		return errors.Join(err, w.end())
	})
	if w == nil {
		t.Fatal(err)
	}
	if err = errors.Join(err, w.failure()); err != nil {
		w.report.Failures = append(w.report.Failures, Failure{
			Seed: p.seed, Problem: err.Error(), Log: p.String() + "\n" + w.journal.String(),
		})
	}
	return w.report
}

// guard turns a panic of the simulation itself into an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// bubble runs f in a bubble. Goroutines that are left at its end are an error.
func bubble(t *testing.T, f func() error) (err error) {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			err = errors.Join(err, fmt.Errorf("%v\n%s", p, bubbled()))
		}
	}()
	var failed error
	synctest.Test(t, func(*testing.T) { failed = f() })
	return failed
}

// bubbled returns the stacks of the goroutines that are left in bubbles.
func bubbled() string {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:goruntime.Stack(stacks, true)]
	var left []string
	for g := range strings.SplitSeq(string(stacks), "\n\n") {
		if header, _, _ := strings.Cut(g, "\n"); strings.Contains(header, "synctest bubble") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

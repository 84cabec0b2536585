package loop_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/server/loop"
)

var errTest = errors.New("the disk is on strike")

// buffer is a log for many goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// group makes a group in a bubble. end ends the context of its loops and waits for
// them; the bubble fails if one is left.
func group(t *testing.T) (g *loop.Group, ctx context.Context, log *buffer, end func()) {
	t.Helper()
	log = &buffer{}
	g = loop.New(slog.New(slog.NewTextHandler(log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	return g, ctx, log, func() {
		cancel()
		g.Wait()
	}
}

// only returns the status of the one loop that there is.
func only(t *testing.T, g *loop.Group) loop.Status {
	t.Helper()
	all := g.Status()
	if len(all) != 1 {
		t.Fatalf("%d loops, want 1", len(all))
	}
	return all[0]
}

// times are when something happened, for many goroutines.
type times struct {
	mu sync.Mutex
	at []time.Time
}

func (l *times) add() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at = append(l.at, time.Now())
}

// take returns and forgets them.
func (l *times) take() []time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.at
	l.at = nil
	return at
}

// pass lets time pass, and whatever it brings about come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestEveryMakesRounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, log, end := group(t)
		var rounds times
		start := time.Now()
		g.Every(ctx, "sweep", time.Minute, 10*time.Second, func(ctx context.Context) error {
			rounds.add()
			if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) != 10*time.Second {
				t.Errorf("the round's deadline is in %v", time.Until(deadline))
			}
			<-time.After(time.Second)
			return nil
		})
		pass(3 * time.Minute)
		s := only(t, g)
		end()
		var at []time.Duration
		for _, round := range rounds.take() {
			at = append(at, round.Sub(start))
		}
		if diff := cmp.Diff([]time.Duration{0, 61 * time.Second, 122 * time.Second}, at); diff != "" {
			t.Error(diff)
		}
		if s.Name != "sweep" || s.LastBeat.Sub(start) != 123*time.Second || s.Restarts != 0 || s.LastError != nil || s.Stale || s.Hangs {
			t.Errorf("status %+v", s)
		}
		if log.String() != "" {
			t.Errorf("log:\n%s", log)
		}
	})
}

// A round that fails or panics is made again, soon at first, never later than the
// interval; a good one heals it.
func TestEveryRestarts(t *testing.T) {
	for name, fail := range map[string]func() error{
		"error": func() error { return errTest },
		"panic": func() error { panic(errTest) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, ctx, log, end := group(t)
				defer end()
				var rounds times
				var broken atomic.Bool
				broken.Store(true)
				g.Every(ctx, "logs", 5*time.Second, time.Second, func(context.Context) error {
					rounds.add()
					if broken.Load() {
						return fail()
					}
					return nil
				})
				pass(2 * time.Minute)
				at := rounds.take()
				if gap := at[1].Sub(at[0]); gap > 300*time.Millisecond {
					t.Errorf("the first wait is %v", gap)
				}
				for i := range at[1:] {
					if gap := at[i+1].Sub(at[i]); gap < 100*time.Millisecond || gap > 5*time.Second {
						t.Errorf("wait %d is %v", i, gap)
					}
				}
				s := only(t, g)
				panics := uint64(0)
				if name == "panic" {
					panics = s.Restarts
				}
				if int(s.Restarts) != len(at) || s.Panics != panics || !strings.Contains(s.LastError.Error(), errTest.Error()) ||
					!s.LastErrorTime.Equal(at[len(at)-1]) || !s.LastBeat.IsZero() || !s.Stale || s.Hangs {
					t.Errorf("broken, %d rounds: %+v", len(at), s)
				}
				if name == "panic" && !strings.Contains(log.String(), "loop_test.go") {
					t.Errorf("the log has no stack:\n%s", log)
				}

				broken.Store(false)
				pass(20 * time.Second)
				s = only(t, g)
				if s.Stale || s.LastBeat.IsZero() || s.LastError == nil {
					t.Errorf("healed: %+v", s)
				}
				if strings.Count(log.String(), "works again") != 1 {
					t.Errorf("log:\n%s", log)
				}
				// The next failure is a first one.
				broken.Store(true)
				rounds.take()
				pass(6 * time.Second)
				if at = rounds.take(); len(at) < 2 || at[1].Sub(at[0]) > 300*time.Millisecond {
					t.Errorf("after healing the waits begin with %v", at)
				}
			})
		})
	}
}

// A round that ignores its deadline is seen: stale, and hanging.
func TestEveryHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, _, end := group(t)
		release := make(chan struct{})
		g.Every(ctx, "store", 10*time.Second, 5*time.Second, func(context.Context) error {
			<-release
			return nil
		})
		for _, tt := range []struct {
			pass         time.Duration
			stale, hangs bool
		}{
			{34 * time.Second, false, false},
			{2 * time.Second, true, true}, // 3*10+5, and 5+30
		} {
			pass(tt.pass)
			if s := only(t, g); s.Stale != tt.stale || s.Hangs != tt.hangs {
				t.Errorf("after %v more: %+v", tt.pass, s)
			}
		}
		close(release)
		synctest.Wait()
		if s := only(t, g); s.Stale || s.Hangs {
			t.Errorf("released: %+v", s)
		}
		end()
	})
}

// A round's context ends with its deadline; that is a failure like any other.
func TestEveryRoundEndsWithItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, _, end := group(t)
		defer end()
		g.Every(ctx, "sweep", time.Minute, time.Second, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		pass(1001 * time.Millisecond)
		if s := only(t, g); s.Restarts != 1 || !errors.Is(s.LastError, context.DeadlineExceeded) || s.Hangs {
			t.Errorf("%+v", s)
		}
	})
}

// The end of the context ends the round in flight, which is no failure.
func TestLoopsEndWithTheirContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, log, end := group(t)
		early, endEarly := context.WithCancel(ctx)
		wait := func(ctx context.Context) error {
			<-ctx.Done()
			return errTest
		}
		g.Every(ctx, "round", time.Hour, time.Hour, wait)
		g.Every(ctx, "between", time.Hour, time.Hour, func(context.Context) error { return nil })
		g.Run(ctx, "long", time.Second, func(ctx context.Context, _ func()) error { return wait(ctx) })
		g.Run(ctx, "waits", 0, func(context.Context, func()) error { return errTest })
		g.Run(early, "early", time.Second, func(ctx context.Context, _ func()) error { return wait(ctx) })
		synctest.Wait()
		endEarly()
		pass(time.Minute)
		for _, s := range g.Status() {
			if want := s.Name == "long" || s.Name == "waits"; s.Stale != want {
				t.Errorf("%s: stale is %v", s.Name, s.Stale)
			}
		}
		before := strings.Count(log.String(), "failed")
		end()
		if n := strings.Count(log.String(), "failed"); n != before {
			t.Errorf("an end on purpose was logged as a failure:\n%s", log)
		}
		for _, s := range g.Status() {
			if s.Stale || s.Hangs {
				t.Errorf("ended: %+v", s)
			}
		}
	})
}

func TestRunRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, _, end := group(t)
		defer end()
		ends := make(chan error)
		var runs times
		g.Run(ctx, "containerd", time.Minute, func(ctx context.Context, beat func()) error {
			runs.add()
			beat()
			select {
			case err := <-ends:
				if err != nil && err.Error() == "panic" {
					panic(err)
				}
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		pass(0)
		if n := len(runs.take()); n != 1 {
			t.Fatalf("%d runs at once", n)
		}
		var last time.Time
		for _, err := range []error{errTest, nil, errors.New("panic")} {
			began := time.Now()
			ends <- err
			pass(2 * time.Second)
			at := runs.take()
			if len(at) != 1 || at[0].Sub(began) < 100*time.Millisecond {
				t.Fatalf("ended with %v at %v it runs again at %v", err, began, at)
			}
			last = at[0]
		}
		s := only(t, g)
		if s.Restarts != 3 || s.Panics != 1 || s.LastError == nil || !s.LastBeat.Equal(last) || s.Stale {
			t.Errorf("%+v", s)
		}
		pass(time.Minute)
		if s := only(t, g); !s.Stale {
			t.Errorf("without a heartbeat: %+v", s)
		}
		// It ran well for a while: this is a first failure again.
		began := time.Now()
		ends <- errTest
		pass(time.Second)
		if at := runs.take(); len(at) != 1 || at[0].Sub(began) > 300*time.Millisecond {
			t.Errorf("after a steady run that ended at %v it runs again at %v", began, at)
		}
	})
}

// A loop that has no heartbeat is stale while it does not run.
func TestRunWithoutHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, _, end := group(t)
		defer end()
		fail := make(chan error)
		g.Run(ctx, "hub", 0, func(ctx context.Context, _ func()) error {
			select {
			case err := <-fail:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		pass(time.Hour)
		if s := only(t, g); s.Stale || s.Hangs {
			t.Errorf("it runs: %+v", s)
		}
		fail <- errTest
		synctest.Wait()
		if s := only(t, g); !s.Stale {
			t.Errorf("it does not run: %+v", s)
		}
		pass(time.Second)
		if s := only(t, g); s.Stale {
			t.Errorf("it runs again: %+v", s)
		}
	})
}

func TestNamesAreUnique(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ctx, _, end := group(t)
		defer end()
		idle := func(ctx context.Context, _ func()) error {
			<-ctx.Done()
			return nil
		}
		g.Run(ctx, "hub", 0, idle)
		defer func() {
			if recover() == nil {
				t.Error("two loops of one name")
			}
		}()
		g.Run(ctx, "hub", 0, idle)
	})
}

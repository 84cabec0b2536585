package workspace

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// line is who waits at a limit, and the order in which they got through.
type line struct {
	t     *testing.T
	limit *limit
	lend  time.Duration
	mu    sync.Mutex
	order []string
	hold  map[string]func() // release
	wait  sync.WaitGroup
}

func (l *line) join(ctx context.Context, name string, c class) {
	l.joinKicked(ctx, name, c, nil, nil)
}

func (l *line) joinKicked(ctx context.Context, name string, c class, kick <-chan struct{}, still func() bool) {
	l.wait.Go(func() {
		release, err := l.limit.acquire(ctx, c, l.lend, kick, still)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err != nil {
			l.order = append(l.order, name+" gave up")
			return
		}
		l.order = append(l.order, name)
		l.hold[name] = release
	})
	synctest.Wait() // a place in the line
}

func (l *line) release(name string) {
	l.t.Helper()
	l.mu.Lock()
	release := l.hold[name]
	delete(l.hold, name)
	l.mu.Unlock()
	if release == nil {
		l.t.Fatalf("%s has no slot", name)
	}
	release()
	synctest.Wait()
}

func (l *line) want(order ...string) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Equal(l.order, order) {
		l.t.Errorf("order is %v, want %v", l.order, order)
	}
}

func inLine(t *testing.T, slots int, lend time.Duration, test func(t *testing.T, l *line)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := &line{t: t, limit: newLimit(slots), lend: lend, hold: make(map[string]func())}
		test(t, l)
		for len(l.hold) > 0 {
			for name := range l.hold {
				l.release(name)
				break
			}
		}
		l.wait.Wait()
		if l.limit.free != slots || l.limit.waiting[single].Len()+l.limit.waiting[bulk].Len() > 0 {
			t.Errorf("%d of %d slots are free in the end", l.limit.free, slots)
		}
	})
}

func TestLimitIsFair(t *testing.T) {
	inLine(t, 2, time.Hour, func(t *testing.T, l *line) {
		for i := range 5 {
			l.join(t.Context(), fmt.Sprint(i), single)
		}
		l.want("0", "1")
		l.release("1")
		l.release("0")
		l.want("0", "1", "2", "3")
		l.release("2")
		l.want("0", "1", "2", "3", "4")
	})
}

// TestLimitTakesTurns: a change of one workspace overtakes a fleet's, and a
// stream of such changes does not hold up the fleet.
func TestLimitTakesTurns(t *testing.T) {
	inLine(t, 1, time.Hour, func(t *testing.T, l *line) {
		for _, name := range []string{"b1", "b2", "b3"} {
			l.join(t.Context(), name, bulk)
		}
		for _, name := range []string{"s1", "s2", "s3", "s4"} {
			l.join(t.Context(), name, single)
		}
		for _, name := range []string{"b1", "s1", "b2", "s2", "b3", "s3"} {
			l.release(name)
		}
		l.want("b1", "s1", "b2", "s2", "b3", "s3", "s4")
	})
}

// TestLimitIsLeft: who is kicked leaves the line without a slot, or keeps its
// place.
func TestLimitIsLeft(t *testing.T) {
	for _, stays := range []bool{true, false} {
		inLine(t, 1, time.Hour, func(t *testing.T, l *line) {
			l.join(t.Context(), "0", single)
			kick := make(chan struct{}, 1)
			l.joinKicked(t.Context(), "1", bulk, kick, func() bool { return stays })
			l.join(t.Context(), "2", bulk)
			kick <- struct{}{}
			synctest.Wait()
			l.release("0")
			if stays {
				l.release("1")
			} else if l.hold["1"] != nil {
				t.Error("who has left has a slot")
			}
			delete(l.hold, "1")
			l.release("2")
			l.want("0", "1", "2") // it left at once, or had its turn
		})
	}
}

// TestLimitGivesUp: who goes away takes no slot along, whether it was still in
// line or had its slot in the same moment.
func TestLimitGivesUp(t *testing.T) {
	inLine(t, 1, time.Hour, func(t *testing.T, l *line) {
		ctx, cancel := context.WithCancel(t.Context())
		l.join(ctx, "0", single)
		l.join(ctx, "1", single)
		l.join(t.Context(), "2", bulk)
		cancel()
		synctest.Wait()
		l.want("0", "1 gave up")
		l.release("0")
		l.want("0", "1 gave up", "2")
		if _, err := l.limit.acquire(ctx, single, l.lend, nil, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that has gone gets %v", err)
		}
	})
	inLine(t, 1, time.Hour, func(t *testing.T, l *line) { // granted and gone
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			l.join(t.Context(), "first", single)
			l.join(ctx, "second", single)
			l.mu.Lock()
			release := l.hold["first"]
			delete(l.hold, "first")
			l.mu.Unlock()
			cancel()
			release()
			synctest.Wait()
			if _, got := l.hold["second"]; got {
				l.release("second")
			}
		}
	})
}

// TestLimitLends: who holds a slot for too long goes on without it, and giving
// it back later gives nobody a second one.
func TestLimitLends(t *testing.T) {
	inLine(t, 1, time.Minute, func(t *testing.T, l *line) {
		l.join(t.Context(), "0", single)
		l.join(t.Context(), "1", single)
		l.join(t.Context(), "2", single)
		l.want("0")
		<-time.After(time.Minute) // the bubble's clock
		synctest.Wait()
		l.want("0", "1")
		l.release("0")
		l.want("0", "1")
		l.release("1")
		l.want("0", "1", "2")
	})
}

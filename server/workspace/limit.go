package workspace

import (
	"container/list"
	"context"
	"sync"
	"time"
)

// class is who waits for a slot.
type class int

const (
	// single: one workspace was changed, created, or has nothing that runs.
	single class = iota
	// bulk: one of many that a global secret reaches, whose older container runs.
	bulk
	classes
)

// limit bounds how many do something at once. Within a class it is first come,
// first served; while both wait they take turns, so that a change of one workspace
// does not queue behind a thousand others, nor holds them up. A slot is lent, not
// given: who holds one for longer goes on without it, so that workspaces that hang
// starve nobody.
type limit struct {
	mu      sync.Mutex
	free    int
	waiting [classes]list.List // of chan struct{}, closed when its owner has a slot
	turn    class              // whose turn it is
}

func newLimit(n int) *limit { return &limit{free: n} }

// acquire waits for a slot or for ctx. Whenever kick yields, still says whether to
// go on waiting; if not, release is nil. release may be called once the slot was
// taken back already.
func (l *limit) acquire(ctx context.Context, c class, lend time.Duration, kick <-chan struct{}, still func() bool) (release func(), err error) {
	got, err := l.wait(ctx, c, kick, still)
	if !got {
		return nil, err
	}
	giveBack := sync.OnceFunc(l.release)
	timer := time.AfterFunc(lend, giveBack)
	return func() {
		timer.Stop()
		giveBack()
	}, nil
}

func (l *limit) wait(ctx context.Context, c class, kick <-chan struct{}, still func() bool) (got bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	granted, leave := l.queue(c)
	for {
		select {
		case <-granted:
			return true, nil
		case <-kick:
			if still() {
				continue
			}
			return !leave(), nil // unless it was granted in the same moment
		case <-ctx.Done():
			if !leave() {
				l.release() // granted a moment too late: the next one gets it
			}
			return false, ctx.Err()
		}
	}
}

// queue takes a place in a line. granted is closed when there is a slot; leave
// gives the place up, and reports false when it is too late for that.
func (l *limit) queue(c class) (granted <-chan struct{}, leave func() bool) {
	ready := make(chan struct{})
	l.mu.Lock()
	defer l.mu.Unlock()
	place := l.waiting[c].PushBack(ready)
	if l.free > 0 { // so nobody else waits
		l.free--
		l.hand()
	}
	return ready, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		select {
		case <-ready:
			return false
		default:
			l.waiting[c].Remove(place)
			return true
		}
	}
}

func (l *limit) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hand()
}

// hand gives a slot to the next in line. The lock is held.
func (l *limit) hand() {
	for range classes {
		queue := &l.waiting[l.turn]
		l.turn = (l.turn + 1) % classes
		if first := queue.Front(); first != nil {
			close(queue.Remove(first).(chan struct{}))
			return
		}
	}
	l.free++
}

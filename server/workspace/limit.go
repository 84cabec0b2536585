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

// limit bounds how many workspaces make a container at once. Within a class it
// is first come, first served; while both wait they take turns, so that a change
// of one workspace does not queue behind a thousand others, nor holds them up.
// A slot is lent, not given: who holds one for longer than lend goes on without
// it, so that workspaces that hang starve nobody.
type limit struct {
	lend time.Duration

	mu      sync.Mutex
	free    int
	waiting [classes]list.List // of chan struct{}, closed when its owner has a slot
	turn    class              // whose turn it is
}

func newLimit(n int, lend time.Duration) *limit { return &limit{free: n, lend: lend} }

// acquire waits for a slot or for ctx. Whenever kick yields, anew says in which
// line to wait from now on; a place in the same one is kept. release may be called
// once the slot was taken back already.
func (l *limit) acquire(ctx context.Context, c class, kick <-chan struct{}, anew func() class) (release func(), err error) {
	if err := l.wait(ctx, c, kick, anew); err != nil {
		return nil, err
	}
	giveBack := sync.OnceFunc(l.release)
	timer := time.AfterFunc(l.lend, giveBack)
	return func() {
		timer.Stop()
		giveBack()
	}, nil
}

func (l *limit) wait(ctx context.Context, c class, kick <-chan struct{}, anew func() class) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	granted, leave := l.queue(c)
	for {
		select {
		case <-granted:
			return nil
		case <-kick:
			if now := anew(); now != c {
				if !leave() {
					return nil // granted in the same moment
				}
				c = now
				granted, leave = l.queue(c)
			}
		case <-ctx.Done():
			if !leave() {
				l.release() // granted a moment too late: the next one gets it
			}
			return ctx.Err()
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

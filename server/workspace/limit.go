package workspace

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// limit bounds how many workspaces make a container at once. It is fair: first
// come, first served. A slot is lent, not given: who holds one for longer than
// lend goes on without it, so that workspaces that hang starve nobody.
type limit struct {
	slots *semaphore.Weighted
	lend  time.Duration
}

func newLimit(n int, lend time.Duration) *limit {
	return &limit{slots: semaphore.NewWeighted(int64(n)), lend: lend}
}

// acquire waits for a slot or for ctx. release may be called once the slot was
// taken back already.
func (l *limit) acquire(ctx context.Context) (release func(), err error) {
	if err := l.slots.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	giveBack := sync.OnceFunc(func() { l.slots.Release(1) })
	timer := time.AfterFunc(l.lend, giveBack)
	return func() {
		timer.Stop()
		giveBack()
	}, nil
}

// gauge counts who is busy, and tells when nobody is.
type gauge struct {
	mu   sync.Mutex
	n    int
	idle chan struct{} // closed and dropped when n falls to 0; nil when nobody waits
}

func (g *gauge) enter() {
	g.mu.Lock()
	g.n++
	g.mu.Unlock()
}

func (g *gauge) leave() {
	g.mu.Lock()
	g.n--
	if g.n == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
	g.mu.Unlock()
}

// wait returns once nobody was busy for a moment, or ctx has ended.
func (g *gauge) wait(ctx context.Context) error {
	g.mu.Lock()
	if g.n == 0 {
		g.mu.Unlock()
		return nil
	}
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	idle := g.idle
	g.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

package workspace

import (
	"context"
	"sync"
	"time"

	"github.com/workspaced/workspaced/store"
)

// Hub tells watchers that something was committed. It carries no events: a hint
// makes the watcher read the store, whose change feed is the truth. So a slow
// watcher costs nobody anything, and none can fall behind what it must see.
type Hub struct {
	wake chan struct{} // size 1

	mu      sync.Mutex
	all     map[*watcher]struct{}
	byID    map[string]map[*watcher]struct{}
	pending map[string]struct{} // ids with byID watchers, changed since the last round
	changed bool                // anything changed since the last round
}

type watcher struct{ hint chan struct{} }

// NewHub returns a hub; Run delivers its hints.
func NewHub() *Hub {
	return &Hub{
		wake:    make(chan struct{}, 1),
		all:     make(map[*watcher]struct{}),
		byID:    make(map[string]map[*watcher]struct{}),
		pending: make(map[string]struct{}),
	}
}

// OnCommit takes note of what was committed. It is called on the store's writer
// and leaves the fan-out to Run, which sleeps on when nobody watches.
func (h *Hub) OnCommit(changes []store.Change) {
	if h.note(changes) {
		signal(h.wake)
	}
}

// note reports whether there is somebody to be told.
func (h *Hub) note(changes []store.Change) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.changed = h.changed || len(changes) > 0 && len(h.all) > 0
	for _, c := range changes {
		if _, ok := h.byID[c.ID]; ok {
			h.pending[c.ID] = struct{}{}
		}
	}
	return h.changed || len(h.pending) > 0
}

// HubBeat is the longest time between two heartbeats of a hub that works.
const HubBeat = 10 * time.Second

// Run delivers hints until ctx ends, and calls beat when it has done so and every
// HubBeat. Its caller owns the goroutine, and may call it again after a panic:
// it begins with what was noted before.
func (h *Hub) Run(ctx context.Context, beat func()) error {
	tick := time.NewTicker(HubBeat)
	defer tick.Stop()
	for {
		h.round()
		beat()
		select {
		case <-ctx.Done():
			return nil
		case <-h.wake:
		case <-tick.C:
		}
	}
}

// round delivers the hints of what was noted since the last one.
func (h *Hub) round() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.changed {
		for w := range h.all {
			signal(w.hint)
		}
	}
	for id := range h.pending {
		for w := range h.byID[id] {
			signal(w.hint)
		}
	}
	clear(h.pending)
	h.changed = false
}

// Watch returns a channel of size 1 that gets a hint after each commit that
// changed the workspace id, or any workspace when id is empty. Watch first, then
// read, then wait: nothing is missed. stop must be called.
func (h *Hub) Watch(id string) (hint <-chan struct{}, stop func()) {
	w := &watcher{hint: make(chan struct{}, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if id == "" {
		h.all[w] = struct{}{}
		return w.hint, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			delete(h.all, w)
		}
	}
	if h.byID[id] == nil {
		h.byID[id] = make(map[*watcher]struct{})
	}
	h.byID[id][w] = struct{}{}
	return w.hint, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.byID[id], w)
		if len(h.byID[id]) == 0 {
			delete(h.byID, id)
			delete(h.pending, id)
		}
	}
}

// signal sends without blocking: a hint that is there already is enough.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

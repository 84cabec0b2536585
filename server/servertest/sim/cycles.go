package sim

import (
	"sync"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

// cycles sees the actors' cycles, by their calls of the runtime: when the values
// that a container is started with can have been read.
type cycles struct {
	now func() int64

	mu    sync.Mutex
	byUID map[string]*cycle
}

// cycle is what was seen of a workspace's.
type cycle struct {
	called, listed moment           // the ends of its actor's last call, and of its last List
	starting       int64            // when its last Start or Rotate was called
	last           runtime.Instance // with the generation that it has by now
	taken          int64            // the newest generation that any has taken in
}

// moment is when a call ended: what its actor reads after it is not older.
type moment struct {
	at    int64
	floor int64 // the generation that somebody had been told of by then
}

// window is when the values of a launch were read: after from, and before to.
type window struct {
	from moment
	to   int64
}

func newCycles(now func() int64) *cycles { return &cycles{now: now, byUID: make(map[string]*cycle)} }

// of returns a workspace's cycle. The lock is held.
func (c *cycles) of(uid string) *cycle {
	if c.byUID[uid] == nil {
		c.byUID[uid] = &cycle{}
	}
	return c.byUID[uid]
}

// before notes that a call begins.
func (c *cycles) before(call runtimetest.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if call.Method == runtimetest.Start || call.Method == runtimetest.Rotate {
		c.of(call.WorkspaceUID).starting = c.now()
	}
}

// after notes that a call has had its effect.
func (c *cycles) after(call runtimetest.Call, floor int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch call.Method {
	case runtimetest.List, runtimetest.Prepare, runtimetest.Stop:
		cy := c.of(call.WorkspaceUID)
		cy.called = moment{c.now(), floor}
		if call.Method == runtimetest.List {
			cy.listed = cy.called
		}
	}
}

// launched notes a launch, and returns when its values were read and what was
// launched before. Values that are read late are read after the old container's
// end; where such a read may have failed, those from the beginning of the pass may
// have had to do.
func (c *cycles) launched(in runtime.Instance, late bool) (read window, before runtime.Instance) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cy := c.of(in.WorkspaceUID)
	read = window{cy.called, cy.starting}
	if !late {
		read.from = cy.listed
	}
	before, cy.last = cy.last, in
	return read, before
}

// rotated notes that an instance has taken in a generation as it runs, and returns
// when that was read.
func (c *cycles) rotated(call runtimetest.Call) (read window) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cy := c.of(call.WorkspaceUID)
	cy.taken = max(cy.taken, call.Generation)
	if cy.last.ID == call.InstanceID {
		cy.last.Generation = max(cy.last.Generation, call.Generation)
	}
	return window{cy.called, cy.starting}
}

// taken returns the newest generation that a container has taken in as it ran.
func (c *cycles) taken(uid string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.of(uid).taken
}

// last returns what was launched last for a workspace.
func (c *cycles) last(uid string) runtime.Instance {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.of(uid).last
}

package runtimetest

import (
	"context"
	"slices"
	"sync"
)

// Call is one call of a Fake's method.
type Call struct {
	Method Method
	// WorkspaceID and WorkspaceUID are empty where the call names no workspace and
	// no instance of one: EnsureImage, and List of all.
	WorkspaceID, WorkspaceUID string
	// InstanceID is empty where the call names none; Prepare's is filled in for
	// AfterCall and in the log.
	InstanceID string
	// Image is EnsureImage's and Prepare's.
	Image string
	// Generation is Prepare's, Arm's, Start's and Rotate's.
	Generation int64
	// Done and Err are set in the log of calls only: whether the call has returned,
	// and what.
	Done bool
	Err  error
}

// is reports whether the call is one of the method ("" is any) that concerns the
// target: a workspace's id or uid, an instance's id, an image; "" is any.
func (c Call) is(method Method, target string) bool {
	if method != "" && c.Method != method {
		return false
	}
	switch target {
	case "", c.WorkspaceID, c.WorkspaceUID, c.InstanceID, c.Image:
		return true
	}
	return false
}

// A Hook runs in each call. Its context ends when the caller's does or the
// daemon crashes. It may block; an error that it returns is what the call
// returns.
type Hook func(ctx context.Context, c Call) error

// hooks are run in the order in which they were added.
type hooks struct {
	mu   sync.Mutex
	next int
	list []numberedHook
}

type numberedHook struct {
	number int
	hook   Hook
}

// add adds a hook and returns what removes it.
func (h *hooks) add(hook Hook) (remove func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	number := h.next
	h.list = append(h.list, numberedHook{number, hook})
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.list = slices.DeleteFunc(h.list, func(n numberedHook) bool { return n.number == number })
	}
}

func (h *hooks) run(ctx context.Context, c Call) error {
	h.mu.Lock()
	list := slices.Clone(h.list)
	h.mu.Unlock()
	for _, n := range list {
		if err := n.hook(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// OnCall adds a hook that runs before a call has its effect: an error that it
// returns fails the call without one, and blocking in it holds the call. It may
// panic. The returned func removes the hook.
func (f *Fake) OnCall(hook Hook) (remove func()) { return f.before.add(hook) }

// AfterCall adds a hook that runs after a call has had its effect and before it
// returns: an error that it returns is an answer that was lost on the way. What
// workspace.Runtime promises of a call that failed still holds: Prepare leaves a
// remnant, and what Start started has been killed. A Crash in the meantime
// leaves everything as the effect made it. It does not run in calls that failed.
func (f *Fake) AfterCall(hook Hook) (remove func()) { return f.after.add(hook) }

// Fail makes the next times calls of the method that concern the target (an id
// or uid of a workspace, the id of an instance, an image; "": any) fail with err
// before they have an effect; times <= 0 is all of them. The returned func ends
// it.
func (f *Fake) Fail(method Method, target string, err error, times int) (heal func()) {
	return f.before.add(failing(method, target, err, times))
}

// FailAfter is Fail after the effect: the answer is lost. See AfterCall.
func (f *Fake) FailAfter(method Method, target string, err error, times int) (heal func()) {
	return f.after.add(failing(method, target, err, times))
}

func failing(method Method, target string, err error, times int) Hook {
	var mu sync.Mutex
	failed := 0
	return func(_ context.Context, c Call) error {
		if !c.is(method, target) {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if times > 0 && failed >= times {
			return nil
		}
		failed++
		return err
	}
}

// Hold holds every call of the method that concerns the target (see Fail) before
// it has an effect, until the gate is released or the call's context ends.
func (f *Fake) Hold(method Method, target string) *Gate { return hold(&f.before, method, target) }

// HoldAfter is Hold after the effect.
func (f *Fake) HoldAfter(method Method, target string) *Gate { return hold(&f.after, method, target) }

func hold(h *hooks, method Method, target string) *Gate {
	g := &Gate{changed: make(chan struct{})}
	g.remove = h.add(func(ctx context.Context, c Call) error {
		if !c.is(method, target) {
			return nil
		}
		return g.pass(ctx)
	})
	return g
}

// Gate holds calls.
type Gate struct {
	remove func()

	mu       sync.Mutex
	held     []chan struct{} // oldest first
	arrived  int
	released bool
	changed  chan struct{} // closed and replaced when a call arrives
}

func (g *Gate) pass(ctx context.Context) error {
	g.mu.Lock()
	if g.released {
		g.mu.Unlock()
		return nil
	}
	open := make(chan struct{})
	g.held = append(g.held, open)
	g.arrived++
	close(g.changed)
	g.changed = make(chan struct{})
	g.mu.Unlock()

	select {
	case <-open:
		return nil
	case <-ctx.Done():
		g.mu.Lock()
		g.held = slices.DeleteFunc(g.held, func(c chan struct{}) bool { return c == open })
		g.mu.Unlock()
		return ctx.Err()
	}
}

// Wait returns once a call is held, or with the context's error.
func (g *Gate) Wait(ctx context.Context) error {
	for {
		g.mu.Lock()
		held, changed := len(g.held), g.changed
		g.mu.Unlock()
		if held > 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Held returns how many calls are held now.
func (g *Gate) Held() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.held)
}

// Arrived returns how many calls have been held so far.
func (g *Gate) Arrived() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.arrived
}

// Step lets the call go that has been held longest, and reports whether there
// was one. Later ones are held as before.
func (g *Gate) Step() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.held) == 0 {
		return false
	}
	close(g.held[0])
	g.held = g.held[1:]
	return true
}

// Release lets all calls go and holds no more. It may be called again.
func (g *Gate) Release() {
	g.remove()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.released = true
	for _, open := range g.held {
		close(open)
	}
	g.held = nil
}

package sim

import (
	"fmt"
	"math"
	"slices"
	"sync"
)

// ledger knows what was asked for and what was answered, and so what may be.
//
// Everything that can be set is a register, named by scope and key. Many may
// write one at once, and of some writes nobody knows whether they were done, so
// that a ledger can't say what a register's value is. But it can say what it may
// be: the value of a write that had begun, and that no acknowledged one has
// certainly overwritten.
type ledger struct {
	mu        sync.Mutex
	registers map[string][]*write
	counters  map[string]*counter
	bumps     map[string]*bumps // by stable workspace
}

// write is one value for one register.
type write struct {
	value      string // "": absent
	begin, end int64  // end is infinite as long as it may still take effect
	state      writeState
	next       bool // applied at the next start only
}

type writeState int

const (
	open    writeState = iota // its caller waits
	acked                     // it was done, or the value was there already
	unknown                   // its caller was not told
	perhaps                   // likewise, but it can't take effect any more
)

const infinite = math.MaxInt64

// counter is what only grows: a generation, a version.
type counter struct {
	floor int64          // what somebody was told
	given map[int64]bool // to one change each
}

// bumps are the changes that made a generation of a workspace, or may have.
type bumps struct{ must, may int64 }

func newLedger() *ledger {
	return &ledger{registers: make(map[string][]*write), counters: make(map[string]*counter), bumps: make(map[string]*bumps)}
}

// Names of registers.
func secretRegister(scope, key string) string { return scope + "/" + key }
func fieldRegister(ws, field string) string   { return ws + ":" + field }
func generationCounter(uid string) string     { return "generation of " + uid }
func versionCounter(scope, key string) string { return "version of " + secretRegister(scope, key) }

// begin notes a write whose caller now waits.
func (l *ledger) begin(register, value string, now int64, next bool) *write {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := &write{value: value, begin: now, end: infinite, next: next}
	l.registers[register] = append(l.registers[register], w)
	return w
}

// refused forgets a write that certainly was not done.
func (l *ledger) refused(register string, w *write) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.registers[register] = slices.DeleteFunc(l.registers[register], func(o *write) bool { return o == w })
}

func (l *ledger) ended(w *write, s writeState, now int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.state = s
	if s == acked || s == perhaps {
		w.end = now
	}
}

// barrier says that no write of unknown outcome can take effect any more.
func (l *ledger) barrier(now int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, writes := range l.registers {
		for _, w := range writes {
			if w.state == unknown && w.end == infinite {
				w.end = now
			}
		}
	}
}

// possible returns the writes whose value the register may have at some moment
// from lo to hi, but for one.
func (l *ledger) possible(register string, lo, hi int64, but *write) (list []*write) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.registers[register]
	for _, w := range all {
		overwritten := slices.ContainsFunc(all, func(o *write) bool {
			return o.state == acked && o.begin > w.end && o.end < lo
		})
		if w != but && w.begin <= hi && !overwritten {
			list = append(list, w)
		}
	}
	return list
}

// mayBe reports whether the register may have the value.
func (l *ledger) mayBe(register, value string, lo, hi int64, but *write) bool {
	return slices.ContainsFunc(l.possible(register, lo, hi, but), func(w *write) bool { return w.value == value })
}

// mayDiffer reports whether the register may have another value.
func (l *ledger) mayDiffer(register, value string, lo, hi int64, but *write) bool {
	return slices.ContainsFunc(l.possible(register, lo, hi, but), func(w *write) bool { return w.value != value })
}

// describe lists what the register may be.
func (l *ledger) describe(register string, lo, hi int64) string {
	var values []string
	for _, w := range l.possible(register, lo, hi, nil) {
		values = append(values, fmt.Sprintf("%q", w.value))
	}
	slices.Sort(values)
	return fmt.Sprintf("%s may be %v", register, slices.Compact(values))
}

// everNext reports whether the register was ever written for the next start only.
// That a later write changed nothing says nothing of what runs.
func (l *ledger) everNext(register string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.registers[register], func(w *write) bool { return w.next })
}

// floor returns what a counter is at least.
func (l *ledger) floor(name string) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.counters[name]; c != nil {
		return c.floor
	}
	return 0
}

// told takes what somebody was told of a counter: at least floor, which is what
// it was when they asked, and if the answer is to a change that counted, a number
// of its own.
func (l *ledger) told(name string, value, floor int64, counted bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.counters[name]
	if c == nil {
		c = &counter{given: make(map[int64]bool)}
		l.counters[name] = c
	}
	c.floor = max(c.floor, value)
	switch {
	case value < floor:
		return fmt.Errorf("%s went back from %d to %d", name, floor, value)
	case !counted:
		return nil
	case value == floor:
		return fmt.Errorf("%s is still %d after a change", name, value)
	case c.given[value]:
		return fmt.Errorf("%s is %d after two different changes", name, value)
	}
	c.given[value] = true
	return nil
}

// bumped notes that a change made a generation of the workspace, or may have.
func (l *ledger) bumped(ws string, must bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.bumps[ws]
	if b == nil {
		b = &bumps{}
		l.bumps[ws] = b
	}
	if must {
		b.must++
	} else {
		b.may++
	}
}

// generations returns the least and the greatest generation that the workspace
// can have once no call is under way.
func (l *ledger) generations(ws string) (least, most int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.bumps[ws]
	if b == nil {
		b = &bumps{}
	}
	return 1 + b.must, 1 + b.must + b.may
}

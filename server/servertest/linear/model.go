package linear

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
)

// state is what one order of the operations so far has made. It is never
// changed: a step makes another one.
type state struct {
	global     scope
	workspaces map[string]*workspace
	// time is when the newest of the operations so far was called: whatever was
	// called later has yet to come.
	time int64
}

// scope is a set of secrets by key.
type scope map[string]secret

// secret is a key that was ever set.
type secret struct {
	value   string
	version int64
	deleted bool // and goes on counting when it is set again
	staged  bool // its last change waits for the next start
}

type workspace struct {
	own        scope
	generation int64
	parked     bool
	// observed is the newest observed generation that anybody was told.
	observed int64
	// launched are the generations that containers were started with, in order.
	launched []int64
}

func (s scope) has(key string) bool {
	row, known := s[key]
	return known && !row.deleted
}

// versions are those of the keys that are there.
func (s scope) versions() map[string]int64 {
	v := make(map[string]int64)
	for key, row := range s {
		if !row.deleted {
			v[key] = row.version
		}
	}
	return v
}

// update returns the scope after a change, and the keys that it changed.
func (s scope) update(op *Op) (after scope, changed []string) {
	after = s
	edit := func(key string, row secret) {
		if len(changed) == 0 {
			after = maps.Clone(s)
			if after == nil {
				after = scope{}
			}
		}
		changed = append(changed, key)
		after[key] = row
	}
	for _, key := range op.Delete {
		if s.has(key) || s[key].staged && !op.NextStart {
			edit(key, secret{version: s[key].version, deleted: true, staged: op.NextStart})
		}
	}
	for key, value := range op.Set {
		row := s[key]
		switch {
		case !s.has(key) || row.value != value:
			edit(key, secret{value: value, version: row.version + 1, staged: op.NextStart})
		case row.staged && !op.NextStart:
			row.staged = false
			edit(key, row)
		}
	}
	return after, changed
}

// with returns the state with one workspace replaced.
func (s *state) with(id string, w *workspace) *state {
	next := *s
	next.workspaces = maps.Clone(s.workspaces)
	if next.workspaces == nil {
		next.workspaces = make(map[string]*workspace)
	}
	next.workspaces[id] = w
	return &next
}

// apply does a change: what comes after it, and what its caller is told. The
// state is the same one when nothing changes.
func (s *state) apply(op *Op) (next *state, told Result) {
	if op.Workspace == "" {
		return s.applyGlobal(op)
	}
	old := s.workspaces[op.Workspace]
	if op.Kind == Create {
		if old != nil {
			return s, Result{Outcome: Exists}
		}
		own, _ := scope(nil).update(op)
		return s.with(op.Workspace, &workspace{own: own, generation: 1}), Result{Generation: 1, Changed: true}
	}
	if old == nil {
		return s, Result{Outcome: NotFound}
	}
	w := *old
	told = Result{Changed: true}
	switch op.Kind {
	case Restart:
		if w.parked {
			return s, Result{Outcome: Parked}
		}
		w.generation++
	case Stop:
		told.Changed = !w.parked
		w.parked = true
	case Start:
		told.Changed = w.parked
		if w.parked {
			w.parked = false
			w.generation++
		}
	default:
		if refused := w.own.refuses(op); refused != Done {
			return s, Result{Outcome: refused}
		}
		own, changed := w.own.update(op)
		w.own = own
		told.Changed = len(changed) > 0
		if told.Changed && !op.NextStart {
			w.generation++
			told.Affected = 1
		}
		told.Versions = versionsOf(own, op.Set)
	}
	told.Generation = w.generation
	if !told.Changed {
		return s, told
	}
	return s.with(op.Workspace, &w), told
}

func (s *state) applyGlobal(op *Op) (next *state, told Result) {
	if refused := s.global.refuses(op); refused != Done {
		return s, Result{Outcome: refused}
	}
	global, changed := s.global.update(op)
	told = Result{Changed: len(changed) > 0, Versions: versionsOf(global, op.Set)}
	if !told.Changed {
		return s, told
	}
	next = &state{global: global, workspaces: s.workspaces, time: s.time}
	if op.NextStart {
		return next, told
	}
	next.workspaces = maps.Clone(s.workspaces)
	for id, w := range s.workspaces {
		// Those that have one of their own don't see it.
		if slices.ContainsFunc(changed, func(key string) bool { return !w.own.has(key) }) {
			affected := *w
			affected.generation++
			next.workspaces[id] = &affected
			told.Affected++
		}
	}
	return next, told
}

// refuses says why a change of secrets is not done.
func (s scope) refuses(op *Op) Outcome {
	for _, key := range op.Delete {
		if op.Kind == Delete && !s.has(key) && (!s[key].staged || op.NextStart) && !op.AllowMissing {
			return NotFound
		}
		if op.IfVersion != 0 && (!s.has(key) || s[key].version != op.IfVersion) {
			return Mismatch
		}
	}
	for key := range op.Set {
		if op.IfVersion != 0 && (!s.has(key) || s[key].version != op.IfVersion) {
			return Mismatch
		}
	}
	return Done
}

func versionsOf(s scope, set map[string]string) map[string]int64 {
	v := make(map[string]int64)
	for key := range set {
		v[key] = s[key].version
	}
	return v
}

func (r *Result) equal(o *Result) bool {
	return r.Outcome == o.Outcome && r.Generation == o.Generation && r.Changed == o.Changed &&
		r.Affected == o.Affected && maps.Equal(r.Versions, o.Versions)
}

// look checks what somebody who changes nothing was told, and returns what is
// known then.
func (m *model) look(s *state, op *Op, r *Result) (next *state, ok bool) {
	sc, w := s.global, (*workspace)(nil)
	if op.Workspace != "" {
		if w = s.workspaces[op.Workspace]; w == nil {
			return s, r.Outcome == NotFound
		}
		sc = w.own
	}
	switch op.Kind {
	case List:
		// Global secrets that nobody here has touched are others'.
		told := maps.Clone(r.Versions)
		maps.DeleteFunc(told, func(key string, _ int64) bool { return op.Workspace == "" && !m.keys[key] })
		return s, r.Outcome == Done && maps.Equal(told, sc.versions())
	case Secret:
		if r.Outcome == NotFound {
			return s, !sc.has(op.Key)
		}
		return s, r.Outcome == Done && sc.has(op.Key) && r.Versions[op.Key] == sc[op.Key].version
	case Get, Wait:
		switch r.Outcome {
		case Parked:
			return s, w.parked
		case Ahead:
			return s, w.generation < op.Generation
		case Done:
		default:
			return s, false
		}
		if r.Generation != w.generation || r.Parked != w.parked || !m.mayObserve(w, r.Observed) {
			return s, false
		}
		if op.Kind == Wait && r.Observed < op.Generation {
			return s, false
		}
		if r.Observed == w.observed {
			return s, true
		}
		now := *w
		now.observed = r.Observed
		return s.with(op.Workspace, &now), true
	case Launch:
		if w.parked || r.Generation != w.generation || !m.sees(s, w, r.Env) {
			return s, false
		}
		now := *w
		now.launched = append(slices.Clip(w.launched), r.Generation)
		return s.with(op.Workspace, &now), true
	}
	return s, false
}

// mayObserve reports whether the observed generation can be this one now: it
// never goes back, is never newer than the newest, and a container was started
// with it.
func (m *model) mayObserve(w *workspace, observed int64) bool {
	if observed < w.observed || observed > w.generation {
		return false
	}
	return observed == 0 || !m.allLaunches || slices.Contains(w.launched, observed)
}

// sees reports whether a container that is started now has this environment: of
// all keys of the history those that are set, with their newest values.
func (m *model) sees(s *state, w *workspace, env map[string]string) bool {
	for key := range m.keys {
		value, set := env[key]
		row, own := w.own[key]
		if !own || row.deleted {
			row, own = s.global[key]
		}
		if want := own && !row.deleted; set != want || value != row.value {
			return false
		}
	}
	return true
}

// model is what the checker walks over.
type model struct {
	keys        map[string]bool // all that occur in the history
	allLaunches bool
	// told are the generations that somebody was told of a workspace, by the time of
	// the call, each the least of those from then on.
	told map[string][]tellings
}

type tellings struct{ call, least int64 }

func newModel(entries []Entry, o Options) *model {
	m := &model{keys: keysOf(entries), allLaunches: o.AllLaunches, told: make(map[string][]tellings)}
	for _, e := range slices.Backward(entries) { // they are in order of their calls
		id := e.Op.Workspace
		if id == "" || e.Result.Outcome != Done || e.Op.Kind == List || e.Op.Kind == Secret {
			continue
		}
		least := e.Result.Generation
		if n := len(m.told[id]); n > 0 {
			least = min(least, m.told[id][n-1].least)
		}
		m.told[id] = append(m.told[id], tellings{e.Call, least})
	}
	return m
}

// fits reports whether nobody is told of an older generation than there is now
// who has yet to call. It makes the search short: what is unknown is not tried
// where it can't have happened.
func (m *model) fits(s *state) bool {
	for id, w := range s.workspaces {
		told := m.told[id] // latest first
		n, _ := slices.BinarySearchFunc(told, s.time, func(t tellings, time int64) int { return cmp.Compare(time, t.call) })
		if n > 0 && told[n-1].least < w.generation {
			return false
		}
	}
	return true
}

// step returns what comes of an operation with this result, or nil when it can't
// have come about.
//
// An operation of unknown outcome takes effect here, unless its time is over. One
// that never did comes after all others: nobody looks any more.
func (m *model) step(s *state, e *Entry) *state {
	var next *state
	switch {
	case e.Result.Outcome == Unknown && s.time > e.Return:
		next = s
	case e.Op.Kind.changes():
		var told Result
		if next, told = s.apply(&e.Op); e.Result.Outcome != Unknown && !told.equal(&e.Result) {
			return nil
		}
	default:
		var ok bool
		if next, ok = m.look(s, &e.Op, &e.Result); !ok {
			return nil
		}
	}
	if e.Call > next.time {
		later := *next
		later.time = e.Call
		next = &later
	}
	if !m.fits(next) {
		return nil
	}
	return next
}

// equal leaves out the time: it is compared for the same operations only.
func (s *state) equal(o *state) bool {
	if s == o {
		return true
	}
	return maps.Equal(s.global, o.global) && maps.EqualFunc(s.workspaces, o.workspaces, func(a, b *workspace) bool {
		return a == b || a.generation == b.generation && a.parked == b.parked && a.observed == b.observed &&
			maps.Equal(a.own, b.own) && slices.Equal(a.launched, b.launched)
	})
}

var seed = maphash.MakeSeed()

// hash is of the part that tells most states apart.
func (s *state) hash() (sum uint64) {
	for key, row := range s.global {
		sum += maphash.Comparable(seed, [3]any{"", key, row})
	}
	for id, w := range s.workspaces {
		sum += maphash.Comparable(seed, [4]any{id, w.generation, w.observed, len(w.launched)})
		for key, row := range w.own {
			sum += maphash.Comparable(seed, [3]any{id, key, row})
		}
	}
	return sum
}

func (s *state) String() string {
	var b strings.Builder
	write := func(sc scope) {
		for _, key := range slices.Sorted(maps.Keys(sc)) {
			if row := sc[key]; row.deleted {
				fmt.Fprintf(&b, " -%s@%d", key, row.version)
			} else {
				fmt.Fprintf(&b, " %s=%s@%d", key, row.value, row.version)
			}
		}
	}
	if len(s.global) > 0 {
		b.WriteString("global:")
		write(s.global)
		b.WriteString("; ")
	}
	for _, id := range slices.Sorted(maps.Keys(s.workspaces)) {
		w := s.workspaces[id]
		fmt.Fprintf(&b, "%s: generation %d, told observed %d, launched %v", id, w.generation, w.observed, w.launched)
		if w.parked {
			b.WriteString(", parked")
		}
		write(w.own)
		b.WriteString("; ")
	}
	return strings.TrimSuffix(b.String(), "; ")
}

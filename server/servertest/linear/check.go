package linear

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// Options say how to check.
type Options struct {
	// Timeout bounds the search; 0: none. Check returns ErrUndecided after it.
	Timeout time.Duration
	// AllLaunches: every container that was started is in the history. Then
	// nobody may have been told of an observed generation that none was started
	// with.
	AllLaunches bool
}

// ErrUndecided: the search took longer than it may.
var ErrUndecided = errors.New("linear: undecided, the search took too long")

// Violation is the error of a history that no order explains.
type Violation struct {
	// Entries are the whole history.
	Entries []Entry
	// Explained is the longest order that was found, which is not complete.
	Explained []Entry
	// State is what holds after it.
	State string
	// Next are those of which one would have to come next, and none can.
	Next []Entry

	model porcupine.Model
	info  porcupine.LinearizationInfo
}

func (v *Violation) Error() string {
	var b strings.Builder
	b.WriteString("linear: no order explains the history. One explains so much of it:\n")
	for _, e := range v.Explained {
		fmt.Fprintf(&b, "  %s\n", e)
	}
	fmt.Fprintf(&b, "which makes\n  %s\n", v.State)
	b.WriteString("and none of these can come next (or it could, and one that was called later tells of an older generation):\n")
	for _, e := range v.Next {
		fmt.Fprintf(&b, "  %s\n", e)
	}
	fmt.Fprintf(&b, "The history has %d operations:\n", len(v.Entries))
	for _, e := range v.Entries {
		fmt.Fprintf(&b, "  %s\n", e)
	}
	return b.String()
}

// Visualize writes an HTML page that shows the history.
func (v *Violation) Visualize(path string) error {
	return porcupine.VisualizePath(v.model, v.info, path)
}

// Check returns nil when one order of the operations explains all that was
// recorded, a *Violation when none does, or ErrUndecided. Nothing may be
// recorded meanwhile. It must not be called inside a bubble of testing/synctest.
func (h *History) Check(o Options) error {
	entries := h.Entries()
	m := newModel(entries, o)
	pm := m.porcupine()
	ops := operations(entries)
	switch porcupine.CheckOperationsTimeout(pm, ops, o.Timeout) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return ErrUndecided
	}
	// Again, for the explanation.
	_, info := porcupine.CheckOperationsVerbose(pm, ops, o.Timeout)
	return m.explain(entries, pm, info)
}

func operations(entries []Entry) []porcupine.Operation {
	// One of unknown outcome may come last; the visualization wants an end that can
	// be drawn.
	end := int64(0)
	for i := range entries {
		if end = max(end, entries[i].Call+1); entries[i].Return != math.MaxInt64 {
			end = max(end, entries[i].Return+1)
		}
	}
	ops := make([]porcupine.Operation, len(entries))
	for i := range entries {
		e := &entries[i]
		ops[i] = porcupine.Operation{ClientId: e.Client, Input: e, Call: e.Call, Output: e, Return: e.Return}
		if e.Result.Outcome == Unknown {
			ops[i].Return = end
		}
	}
	return ops
}

func keysOf(entries []Entry) map[string]bool {
	keys := make(map[string]bool)
	for i := range entries {
		for key := range entries[i].Op.Set {
			keys[key] = true
		}
		for _, key := range entries[i].Op.Delete {
			keys[key] = true
		}
	}
	return keys
}

func (m *model) porcupine() porcupine.Model {
	return porcupine.Model{
		Partition: partition,
		Init:      func() any { return &state{} },
		Step: func(s, in, _ any) (bool, any) {
			next := m.step(s.(*state), in.(*Entry))
			return next != nil, next
		},
		Equal:         func(a, b any) bool { return a.(*state).equal(b.(*state)) },
		Hash:          func(s any) uint64 { return s.(*state).hash() },
		DescribeState: func(s any) string { return s.(*state).String() },
		DescribeOperation: func(in, _ any) string {
			e := in.(*Entry)
			return e.Op.String() + " -> " + e.Result.describe(e.Op.Kind)
		},
	}
}

// partition takes workspaces apart that nothing connects: no operation on global
// secrets.
func partition(ops []porcupine.Operation) [][]porcupine.Operation {
	parts := make(map[string][]porcupine.Operation)
	for _, op := range ops {
		id := op.Input.(*Entry).Op.Workspace
		if id == "" {
			return [][]porcupine.Operation{ops}
		}
		parts[id] = append(parts[id], op)
	}
	var list [][]porcupine.Operation
	for _, id := range slices.Sorted(maps.Keys(parts)) {
		list = append(list, parts[id])
	}
	return list
}

// explain finds out where the longest order ends.
func (m *model) explain(entries []Entry, pm porcupine.Model, info porcupine.LinearizationInfo) error {
	v := &Violation{Entries: entries, model: pm, info: info}
	parts := partition(operations(entries))
	for i, orders := range info.PartialLinearizationsOperations() {
		var longest []porcupine.Operation
		for _, order := range orders {
			if len(order) > len(longest) {
				longest = order
			}
		}
		if len(longest) == len(parts[i]) {
			continue // nothing is wrong with this part
		}
		s := pm.Init()
		done := make(map[*Entry]bool)
		for _, op := range longest {
			e := op.Input.(*Entry)
			_, s = pm.Step(s, e, e)
			done[e] = true
			v.Explained = append(v.Explained, *e)
		}
		v.State = s.(*state).String()
		v.Next = candidates(parts[i], done)
		break
	}
	return v
}

// candidates are the operations that may come next: those that were called
// before the first of the others had returned.
func candidates(ops []porcupine.Operation, done map[*Entry]bool) (next []Entry) {
	first := int64(math.MaxInt64)
	for _, op := range ops {
		if e := op.Input.(*Entry); !done[e] && e.Result.Outcome != Unknown {
			first = min(first, e.Return)
		}
	}
	for _, op := range ops {
		if e := op.Input.(*Entry); !done[e] && e.Call <= first {
			next = append(next, *e)
		}
	}
	return next
}

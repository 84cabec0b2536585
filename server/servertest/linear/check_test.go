package linear

import (
	"errors"
	"math"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type kv = map[string]string

type versionsOfKeys = map[string]int64

// at places an operation in time.
func at(call, end int64, op Op, r Result) Entry {
	return Entry{Client: int(call), Op: op, Result: r, Call: call, Return: end}
}

// changedTo is the answer to a change that made a generation.
func changedTo(generation int64, versions versionsOfKeys) Result {
	return Result{Generation: generation, Changed: true, Affected: 1, Versions: versions}
}

var unknown = Result{Outcome: Unknown}

func setKV(key, value string) Op { return Op{Kind: Set, Workspace: "w", Set: kv{key: value}} }

// created is how every history below begins: generation 1, no secrets.
var created = at(1, 2, Op{Kind: Create, Workspace: "w"}, Result{Generation: 1, Changed: true})

func launch(generation int64, env kv) (Op, Result) {
	return Op{Kind: Launch, Workspace: "w"}, Result{Generation: generation, Env: env}
}

func launched(call, end, generation int64, env kv) Entry {
	op, r := launch(generation, env)
	return at(call, end, op, r)
}

func got(generation, observed int64) Result {
	return Result{Generation: generation, Observed: observed}
}

func TestCheck(t *testing.T) {
	get, list := Op{Kind: Get, Workspace: "w"}, Op{Kind: List, Workspace: "w"}
	set1 := at(10, 20, setKV("K", "v1"), changedTo(2, versionsOfKeys{"K": 1}))
	tests := []struct {
		name    string
		entries []Entry
		options Options
		legal   bool
	}{
		{name: "one after another", legal: true, entries: []Entry{
			set1,
			at(30, 40, list, Result{Versions: versionsOfKeys{"K": 1}}),
			at(50, 60, setKV("K", "v2"), changedTo(3, versionsOfKeys{"K": 2})),
			at(70, 80, Op{Kind: Delete, Workspace: "w", Delete: []string{"K"}}, changedTo(4, nil)),
			at(90, 100, list, Result{}),
			at(110, 120, setKV("K", "v3"), changedTo(5, versionsOfKeys{"K": 3})),
			at(130, 140, get, got(5, 0)),
		}},
		{name: "concurrent calls in either order", legal: true, entries: []Entry{
			at(10, 50, setKV("K", "v1"), changedTo(3, versionsOfKeys{"K": 2})),
			at(20, 40, setKV("K", "v2"), changedTo(2, versionsOfKeys{"K": 1})),
			at(30, 60, get, got(2, 0)),
		}},
		{name: "a list that misses what was acknowledged", entries: []Entry{
			set1, at(30, 40, list, Result{}),
		}},
		{name: "a list of an older version", entries: []Entry{
			set1,
			at(30, 40, setKV("K", "v2"), changedTo(3, versionsOfKeys{"K": 2})),
			at(50, 60, list, Result{Versions: versionsOfKeys{"K": 1}}),
		}},
		{name: "one secret, stale", entries: []Entry{
			set1, at(30, 40, Op{Kind: Secret, Workspace: "w", Key: "K"}, Result{Outcome: NotFound}),
		}},
		{name: "one secret", legal: true, entries: []Entry{
			set1, at(30, 40, Op{Kind: Secret, Workspace: "w", Key: "K"}, Result{Versions: versionsOfKeys{"K": 1}}),
		}},
		{name: "a generation given twice", entries: []Entry{
			set1, at(30, 40, setKV("L", "v"), changedTo(2, versionsOfKeys{"L": 1})),
		}},
		{name: "a generation left out", entries: []Entry{
			set1, at(30, 40, setKV("L", "v"), changedTo(4, versionsOfKeys{"L": 1})),
		}},
		{name: "a version given twice", entries: []Entry{
			set1, at(30, 40, setKV("K", "v2"), changedTo(3, versionsOfKeys{"K": 1})),
		}},
		{name: "a version that begins anew after a deletion", entries: []Entry{
			set1,
			at(30, 40, Op{Kind: Delete, Workspace: "w", Delete: []string{"K"}}, changedTo(3, nil)),
			at(50, 60, setKV("K", "v2"), changedTo(4, versionsOfKeys{"K": 1})),
		}},
		{name: "an equal value is no change", legal: true, entries: []Entry{
			set1, at(30, 40, setKV("K", "v1"), Result{Generation: 2, Versions: versionsOfKeys{"K": 1}}),
		}},
		{name: "an equal value that makes a generation", entries: []Entry{
			set1, at(30, 40, setKV("K", "v1"), changedTo(3, versionsOfKeys{"K": 2})),
		}},

		{name: "unknown and done", legal: true, entries: []Entry{
			at(10, math.MaxInt64, setKV("K", "v1"), unknown), at(30, 40, list, Result{Versions: versionsOfKeys{"K": 1}}),
		}},
		{name: "unknown and not done", legal: true, entries: []Entry{
			at(10, 20, setKV("K", "v1"), unknown), at(30, 40, list, Result{}),
		}},
		{name: "unknown and done later", legal: true, entries: []Entry{
			at(10, math.MaxInt64, setKV("K", "v1"), unknown),
			at(30, 40, list, Result{}),
			at(50, 60, list, Result{Versions: versionsOfKeys{"K": 1}}),
		}},
		{name: "unknown and done after the barrier", entries: []Entry{
			at(10, 20, setKV("K", "v1"), unknown),
			at(30, 40, list, Result{}),
			at(50, 60, list, Result{Versions: versionsOfKeys{"K": 1}}),
		}},
		{name: "unknown and taken back", entries: []Entry{
			at(10, math.MaxInt64, setKV("K", "v1"), unknown),
			at(30, 40, list, Result{Versions: versionsOfKeys{"K": 1}}),
			at(50, 60, list, Result{}),
		}},
		{name: "unknown and done twice", entries: []Entry{
			at(10, math.MaxInt64, setKV("K", "v1"), unknown), at(30, 40, get, got(3, 0)),
		}},

		{name: "a batch is one change", legal: true, entries: []Entry{
			at(10, 20, Op{Kind: Batch, Workspace: "w", Set: kv{"A": "1", "B": "1"}}, changedTo(2, versionsOfKeys{"A": 1, "B": 1})),
			launched(30, 40, 2, kv{"A": "1", "B": "1", "PATH": "any"}),
		}},
		{name: "half a batch", entries: []Entry{
			at(10, 50, Op{Kind: Batch, Workspace: "w", Set: kv{"A": "1", "B": "1"}}, changedTo(2, versionsOfKeys{"A": 1, "B": 1})),
			at(20, 40, list, Result{Versions: versionsOfKeys{"A": 1}}),
		}},
		{name: "a container with half a batch", entries: []Entry{
			at(10, 50, Op{Kind: Batch, Workspace: "w", Set: kv{"A": "1", "B": "1"}}, changedTo(2, versionsOfKeys{"A": 1, "B": 1})),
			launched(20, 40, 1, kv{"A": "1"}),
		}},
		{name: "a container with a stale value", entries: []Entry{
			set1,
			at(30, 40, setKV("K", "v2"), changedTo(3, versionsOfKeys{"K": 2})),
			launched(50, 60, 3, kv{"K": "v1"}),
		}},
		{name: "a container with a value that is newer than its generation", entries: []Entry{
			set1, launched(30, 40, 1, kv{"K": "v1"}),
		}},
		{name: "a container with a secret that was deleted", entries: []Entry{
			set1,
			at(30, 40, Op{Kind: Delete, Workspace: "w", Delete: []string{"K"}}, changedTo(3, nil)),
			launched(50, 60, 3, kv{"K": "v1"}),
		}},
		{name: "a container that read early", entries: []Entry{
			set1, launched(30, 60, 1, kv{}),
		}},
		{name: "a container that read before the call ended", legal: true, entries: []Entry{
			set1, launched(15, 60, 1, kv{}),
		}},
		{name: "values of the next start come with no generation", legal: true, entries: []Entry{
			set1,
			at(30, 40, Op{Kind: Set, Workspace: "w", Set: kv{"K": "v2"}, NextStart: true},
				Result{Generation: 2, Changed: true, Versions: versionsOfKeys{"K": 2}}),
			launched(50, 60, 2, kv{"K": "v2"}),
		}},

		{name: "observed what was started", legal: true, options: Options{AllLaunches: true}, entries: []Entry{
			set1, launched(30, 40, 2, kv{"K": "v1"}), at(35, 60, Op{Kind: Wait, Workspace: "w", Generation: 2}, got(2, 2)),
		}},
		{name: "observed what nobody started", options: Options{AllLaunches: true}, entries: []Entry{
			set1, launched(4, 5, 1, kv{}), at(50, 60, get, got(2, 2)),
		}},
		{name: "observed before it was started", options: Options{AllLaunches: true}, entries: []Entry{
			set1, at(30, 40, get, got(2, 2)), launched(50, 60, 2, kv{"K": "v1"}),
		}},
		{name: "observed goes back", entries: []Entry{
			set1, at(30, 40, get, got(2, 2)), at(50, 60, get, got(2, 1)),
		}},
		{name: "observed is newer than the newest", entries: []Entry{at(30, 40, get, got(1, 2))}},
		{name: "a wait that returns too early", entries: []Entry{
			set1, at(30, 40, Op{Kind: Wait, Workspace: "w", Generation: 2}, got(2, 1)),
		}},
		{name: "a wait for a generation that was lost", entries: []Entry{
			set1, at(30, 40, Op{Kind: Wait, Workspace: "w", Generation: 2}, Result{Outcome: Ahead}),
		}},

		{name: "parked", legal: true, options: Options{AllLaunches: true}, entries: []Entry{
			at(10, 20, Op{Kind: Stop, Workspace: "w"}, Result{Generation: 1, Changed: true}),
			at(30, 40, Op{Kind: Restart, Workspace: "w"}, Result{Outcome: Parked}),
			at(50, 60, Op{Kind: Wait, Workspace: "w", Generation: 1}, Result{Outcome: Parked}),
			at(70, 80, setKV("K", "v"), changedTo(2, versionsOfKeys{"K": 1})),
			at(90, 100, Op{Kind: Start, Workspace: "w"}, Result{Generation: 3, Changed: true}),
			at(110, 120, Op{Kind: Start, Workspace: "w"}, Result{Generation: 3}),
			launched(130, 140, 3, kv{"K": "v"}),
		}},
		{name: "a container of what was parked", entries: []Entry{
			at(10, 20, Op{Kind: Stop, Workspace: "w"}, Result{Generation: 1, Changed: true}), launched(30, 40, 1, kv{}),
		}},

		{name: "global ones reach who has none of its own", legal: true, entries: []Entry{
			at(3, 4, Op{Kind: Create, Workspace: "x", Set: kv{"G": "own"}}, Result{Generation: 1, Changed: true}),
			at(10, 20, Op{Kind: Set, Set: kv{"G": "g"}}, Result{Changed: true, Affected: 1, Versions: versionsOfKeys{"G": 1}}),
			launched(30, 40, 2, kv{"G": "g"}),
			at(50, 60, Op{Kind: Launch, Workspace: "x"}, Result{Generation: 1, Env: kv{"G": "own"}}),
			at(70, 80, Op{Kind: Delete, Workspace: "x", Delete: []string{"G"}}, changedTo(2, nil)),
			at(90, 100, Op{Kind: Launch, Workspace: "x"}, Result{Generation: 2, Env: kv{"G": "g"}}),
			at(110, 120, Op{Kind: Delete, Delete: []string{"G"}}, Result{Changed: true, Affected: 2}),
			at(130, 140, Op{Kind: List}, Result{}),
		}},
		{name: "global ones of others don't matter", legal: true, entries: []Entry{
			at(10, 20, Op{Kind: Set, Set: kv{"G": "g"}}, Result{Changed: true, Affected: 1, Versions: versionsOfKeys{"G": 1}}),
			at(30, 40, Op{Kind: List}, Result{Versions: versionsOfKeys{"G": 1, "OTHER": 7}}),
			launched(50, 60, 2, kv{"G": "g", "OTHER": "o"}),
		}},
		{name: "a list of global ones that misses one", entries: []Entry{
			at(10, 20, Op{Kind: Set, Set: kv{"G": "g"}}, Result{Changed: true, Affected: 1, Versions: versionsOfKeys{"G": 1}}),
			at(30, 40, Op{Kind: List}, Result{Versions: versionsOfKeys{"OTHER": 7}}),
		}},
		{name: "a workspace's own that nobody set", entries: []Entry{
			set1, at(30, 40, list, Result{Versions: versionsOfKeys{"K": 1, "OTHER": 1}}),
		}},
		{name: "a global one that made no generation", entries: []Entry{
			at(10, 20, Op{Kind: Set, Set: kv{"G": "g"}}, Result{Changed: true, Affected: 1, Versions: versionsOfKeys{"G": 1}}),
			at(30, 40, get, got(1, 0)),
		}},
		{name: "a global one that wins over an own one", entries: []Entry{
			set1,
			at(30, 40, Op{Kind: Set, Set: kv{"K": "g"}}, Result{Changed: true, Versions: versionsOfKeys{"K": 1}}),
			launched(50, 60, 2, kv{"K": "g"}),
		}},

		{name: "only if the version is that", legal: true, entries: []Entry{
			set1,
			at(30, 40, Op{Kind: Set, Workspace: "w", Set: kv{"K": "v2"}, IfVersion: 1}, changedTo(3, versionsOfKeys{"K": 2})),
			at(50, 60, Op{Kind: Set, Workspace: "w", Set: kv{"K": "v3"}, IfVersion: 1}, Result{Outcome: Mismatch}),
			at(70, 80, Op{Kind: Delete, Workspace: "w", Delete: []string{"L"}}, Result{Outcome: NotFound}),
			at(90, 100, Op{Kind: Create, Workspace: "w"}, Result{Outcome: Exists}),
		}},
		{name: "two win the same version", entries: []Entry{
			set1,
			at(30, 60, Op{Kind: Set, Workspace: "w", Set: kv{"K": "v2"}, IfVersion: 1}, changedTo(3, versionsOfKeys{"K": 2})),
			at(40, 70, Op{Kind: Set, Workspace: "w", Set: kv{"K": "v3"}, IfVersion: 1}, changedTo(4, versionsOfKeys{"K": 3})),
		}},
		{name: "a mismatch that is none", entries: []Entry{
			set1, at(30, 40, Op{Kind: Set, Workspace: "w", Set: kv{"K": "v2"}, IfVersion: 1}, Result{Outcome: Mismatch}),
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := NewHistory()
			for _, e := range append([]Entry{created}, tt.entries...) {
				h.Record(e)
				if e.Result.Outcome == Unknown { // Record gives it no end: these tests choose one
					h.entries[len(h.entries)-1].Return = e.Return
				}
			}
			err := h.Check(tt.options)
			violation, illegal := errors.AsType[*Violation](err)
			if illegal == tt.legal {
				t.Fatalf("legal is %t, got %v", tt.legal, err)
			}
			if illegal && (len(violation.Next) == 0 || !strings.Contains(err.Error(), violation.Next[0].String())) {
				t.Errorf("the error does not say what is wrong: %v", err)
			}
		})
	}
}

func TestHistoryBarrier(t *testing.T) {
	h := NewHistory()
	before := h.Begin(0, setKV("K", "v1"))
	open := h.Begin(1, setKV("L", "v1"))
	before.End(unknown)
	h.Barrier()
	now := h.Now()
	open.End(unknown) // its caller gave up later: the next barrier is for it
	h.Begin(2, Op{Kind: List, Workspace: "w"}).End(unknown)
	var ends []bool
	for _, e := range h.Entries() {
		ends = append(ends, e.Return < now)
	}
	if diff := cmp.Diff([]bool{true, false}, ends); diff != "" {
		t.Errorf("who can't take effect any more: %s", diff)
	}
	h.Barrier()
	if e := h.Entries()[1]; e.Return == math.MaxInt64 {
		t.Error("the second barrier did not count for what ended before it")
	}
}

// What the caller of a wait for the newest generation knows of exists.
func TestHistoryWaitForTheNewest(t *testing.T) {
	h := NewHistory()
	h.Record(created)
	h.Begin(0, setKV("K", "v1")).End(changedTo(2, versionsOfKeys{"K": 1}))
	h.Begin(0, Op{Kind: Wait, Workspace: "w"}).End(got(2, 1))
	if _, ok := errors.AsType[*Violation](h.Check(Options{})); !ok {
		t.Error("a wait for the newest returned with an older one observed")
	}
}

func TestHistoryTime(t *testing.T) {
	h := NewHistory()
	at := h.At(time.Now())
	if a, b := h.Now(), h.Now(); a < at || b <= a {
		t.Errorf("%d, %d, %d do not come one after another", at, a, b)
	}
}

func TestVisualize(t *testing.T) {
	h := NewHistory()
	h.Record(created)
	h.Record(at(10, 20, Op{Kind: Get, Workspace: "w"}, got(7, 0)))
	h.Begin(0, setKV("K", "v")).End(unknown)
	v, ok := errors.AsType[*Violation](h.Check(Options{}))
	if !ok {
		t.Fatal("not noticed")
	}
	if err := v.Visualize(filepath.Join(t.TempDir(), "history.html")); err != nil {
		t.Error(err)
	}
}

// The search ends in time, and says so.
func TestCheckUndecided(t *testing.T) {
	h := NewHistory()
	h.Record(created)
	for i := range 40 {
		h.Record(at(int64(10+i), math.MaxInt64, setKV(strings.Repeat("K", i+1), "v"), unknown))
	}
	h.Record(at(100, 110, Op{Kind: Get, Workspace: "w"}, got(99, 0)))
	if err := h.Check(Options{Timeout: 10 * time.Millisecond}); !errors.Is(err, ErrUndecided) {
		t.Errorf("got %v", err)
	}
}

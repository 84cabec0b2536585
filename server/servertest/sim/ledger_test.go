package sim

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A register may have each value that was not certainly overwritten, and no other.
func TestLedgerPossible(t *testing.T) {
	type entry struct {
		value      string
		begin, end int64
		state      writeState
	}
	tests := []struct {
		name   string
		writes []entry
		lo, hi int64
		want   []string
	}{
		{"the last of two", []entry{{"a", 1, 2, acked}, {"b", 3, 4, acked}}, 5, 5, []string{"b"}},
		{"either of two that were concurrent", []entry{{"a", 1, 3, acked}, {"b", 2, 4, acked}}, 5, 5, []string{"a", "b"}},
		{"while the second is written", []entry{{"a", 1, 2, acked}, {"b", 3, 6, acked}}, 4, 5, []string{"a", "b"}},
		{"not before it has begun", []entry{{"a", 1, 2, acked}, {"b", 6, 7, acked}}, 3, 5, []string{"a"}},
		{"what has no answer yet", []entry{{"a", 1, 2, acked}, {"b", 3, infinite, open}}, 5, 5, []string{"a", "b"}},
		{"what never got one, as long as it can be done", []entry{{"a", 1, infinite, unknown}, {"b", 3, 4, acked}}, 9, 9, []string{"a", "b"}},
		{"what never got one, and can't be done any more", []entry{{"a", 1, 2, unknown}, {"b", 3, 4, acked}}, 9, 9, []string{"b"}},
		{"what never got one overwrites nothing for certain", []entry{{"a", 1, 2, acked}, {"b", 3, 4, unknown}}, 9, 9, []string{"a", "b"}},
		{"a moment in the past", []entry{{"a", 1, 2, acked}, {"b", 5, 6, acked}}, 3, 3, []string{"a"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLedger()
			for _, e := range tt.writes {
				w := l.begin("r", e.value, e.begin, false)
				w.state, w.end = e.state, e.end
			}
			var got []string
			for _, w := range l.possible("r", tt.lo, tt.hi, nil) {
				got = append(got, w.value)
			}
			slices.Sort(got)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestLedgerOutcomes(t *testing.T) {
	l := newLedger()
	l.ended(l.begin("r", "first", 1, false), acked, 2)
	refused, lost := l.begin("r", "refused", 3, false), l.begin("r", "lost", 4, true)
	l.refused("r", refused)
	l.ended(lost, unknown, 5)
	if l.mayBe("r", "refused", 6, 6, nil) || !l.mayBe("r", "lost", 6, 6, nil) || l.mayBe("r", "lost", 6, 6, lost) {
		t.Error(l.describe("r", 6, 6))
	}
	l.barrier(7)
	l.ended(l.begin("r", "last", 8, false), acked, 9)
	if l.mayBe("r", "lost", 10, 10, nil) || l.mayDiffer("r", "last", 10, 10, nil) || !l.everNext("r") {
		t.Error(l.describe("r", 10, 10))
	}
	// A request that was repeated after the clock had jumped was done once more, or not.
	l.ended(l.begin("r", "again", 11, false), perhaps, 12)
	if !l.mayBe("r", "again", 13, 13, nil) || !l.mayBe("r", "last", 13, 13, nil) {
		t.Error(l.describe("r", 13, 13))
	}
	l.ended(l.begin("r", "over", 14, false), acked, 15)
	if l.mayDiffer("r", "over", 16, 16, nil) {
		t.Error(l.describe("r", 16, 16))
	}
}

func TestLedgerCounters(t *testing.T) {
	l := newLedger()
	steps := []struct {
		value, floor int64
		counted      bool
		want         string // of the error; empty: none
	}{
		{1, 0, true, ""},
		{3, 1, true, ""},
		{2, 1, true, ""}, // concurrent with the one before
		{3, 3, false, ""},
		{2, 3, false, "went back"},
		{3, 3, true, "still 3 after a change"},
		{3, 1, true, "two different changes"},
		{4, 3, true, ""},
	}
	for _, s := range steps {
		err := l.told("c", s.value, s.floor, s.counted)
		if (err == nil) != (s.want == "") || err != nil && !strings.Contains(err.Error(), s.want) {
			t.Errorf("%+v: got %v", s, err)
		}
	}
	if l.floor("c") != 4 || l.floor("other") != 0 {
		t.Errorf("the floor is %d", l.floor("c"))
	}
	l.bumped("w", true)
	l.bumped("w", false)
	if least, most := l.generations("w"); least != 2 || most != 3 {
		t.Errorf("from %d to %d generations", least, most)
	}
}

package measure

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestQuantile(t *testing.T) {
	hundred := make(Samples, 0, 100)
	for i := range 100 {
		hundred = append(hundred, float64(100-i))
	}
	for _, c := range []struct {
		samples     Samples
		median, p95 float64
	}{
		{nil, 0, 0},
		{Samples{7}, 7, 7},
		{Samples{3, 1, 2}, 2, 3},
		{Samples{4, 1, 3, 2}, 2, 4},
		{hundred, 50, 95},
	} {
		if m, p := c.samples.Median(), c.samples.P95(); m != c.median || p != c.p95 {
			t.Errorf("median and p95 of %v = %v, %v, want %v, %v", c.samples, m, p, c.median, c.p95)
		}
	}
}

func TestCompare(t *testing.T) {
	ours, other := Samples{1, 2, 9}, Samples{3, 4, 5}
	for _, c := range []struct {
		goals []Goal
		text  string
		holds bool
	}{
		{nil, "reported", true},
		{[]Goal{MedianAtMost(2)}, "median ≤ 2", true},
		{[]Goal{MedianAtMost(1.9)}, "median ≤ 1.9", false},
		{[]Goal{P95AtMost(9)}, "p95 ≤ 9", true},
		{[]Goal{P95AtMost(8)}, "p95 ≤ 8", false},
		{[]Goal{RatioAtMost(0.5)}, "≤ 0.5 times", true},
		{[]Goal{RatioAtMost(0.025)}, "≤ 1/40", false},
		{[]Goal{RatioAtLeast(0.5)}, "≥ 0.5 times", true},
		{[]Goal{RatioAtLeast(5)}, "≥ 5 times", false},
		{[]Goal{MedianAtMost(2), RatioAtMost(0.1)}, "median ≤ 2, ≤ 1/10", false},
	} {
		want := Result{
			Name: "row/figure", OursMedian: 2, OursP95: 9, Unit: "ms",
			Beside: "another", BesideMedian: 4, Ratio: 0.5, Goal: c.text, Holds: c.holds,
		}
		if diff := cmp.Diff(want, Compare("row/figure", "ms", ours, "another", other, c.goals...)); diff != "" {
			t.Error(diff)
		}
	}
}

// What was not measured holds nothing.
func TestCompareNothing(t *testing.T) {
	if r := Compare("a/b", "ms", nil, "another", Samples{1}, MedianAtMost(2)); r.Holds {
		t.Errorf("without samples of ours: %+v", r)
	}
	if r := Compare("a/b", "ms", Samples{1}, "another", nil, MedianAtMost(2)); r.Holds {
		t.Errorf("without samples of the other: %+v", r)
	}
}

func TestAlternate(t *testing.T) {
	var order []string
	side := func(name string) func() error {
		return func() error { order = append(order, name); return nil }
	}
	if err := Alternate(t.Context(), 3, side("a"), side("b")); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(order, ""); got != "abbaab" {
		t.Errorf("order %s, want abbaab", got)
	}
	broken := errors.New("broken")
	if err := Alternate(t.Context(), 3, func() error { return broken }, side("c")); !errors.Is(err, broken) {
		t.Errorf("a side's error: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Alternate(ctx, 3, side("d")); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
	if got := strings.Join(order, ""); got != "abbaab" {
		t.Errorf("order %s: went on after an error", got)
	}
}

// A step that is slower shows, by as much as it is slower.
func TestTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ours, slowed Samples
		work := func(step time.Duration) func() error {
			return func() error {
				for range 4 {
					time.Sleep(step) // the bubble's clock
				}
				return nil
			}
		}
		err := Alternate(t.Context(), 5,
			Timed(&ours, time.Millisecond, 4, work(2*time.Millisecond)),
			Timed(&slowed, time.Millisecond, 4, work(3*time.Millisecond)))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(ours, slowed); got != "[2 2 2 2 2] [3 3 3 3 3]" {
			t.Errorf("samples %s", got)
		}
	})
}

// Package measure holds what a benchmark's row is made of: samples of two sides
// that were taken in turn in one run, and a result that sets one beside the
// other. Machines are noisy and differ, so no figure stands without its ratio.
package measure

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Samples are the measured values of one side, all in the same unit.
type Samples []float64

// Add adds a duration in the unit of the samples.
func (s *Samples) Add(d, unit time.Duration) { *s = append(*s, float64(d)/float64(unit)) }

// Median returns the middle sample; 0 of none.
func (s Samples) Median() float64 { return s.Quantile(0.5) }

// P95 returns the sample that 95 of 100 do not exceed; 0 of none.
func (s Samples) P95() float64 { return s.Quantile(0.95) }

// Quantile returns the least sample that no less than the fraction q of them does
// not exceed (nearest rank); 0 of none.
func (s Samples) Quantile(q float64) float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	rank := int(q*float64(len(s))+0.999999) - 1
	return sorted[min(max(rank, 0), len(s)-1)]
}

// Result is one line of bench.json: ours beside something else, measured in turn.
type Result struct {
	// Name is `row/figure`.
	Name string `json:"name"`
	// OursMedian and OursP95 are ours, in Unit.
	OursMedian float64 `json:"ours_median"`
	OursP95    float64 `json:"ours_p95"`
	Unit       string  `json:"unit"`
	// Beside says what it was measured beside.
	Beside       string  `json:"beside"`
	BesideMedian float64 `json:"beside_median"`
	// Ratio is OursMedian / BesideMedian. Of a time less is better, of a rate (unit
	// "1/s") more.
	Ratio float64 `json:"ratio"`
	// Goal says what Ratio and figures should be, and Holds whether they are.
	Goal  string `json:"goal"`
	Holds bool   `json:"holds"`
}

// Compare makes a result. It holds when every goal does; without any it reports.
func Compare(name, unit string, ours Samples, beside string, other Samples, goals ...Goal) Result {
	r := Result{
		Name: name, Unit: unit, OursMedian: ours.Median(), OursP95: ours.P95(),
		Beside: beside, BesideMedian: other.Median(), Goal: "reported", Holds: true,
	}
	if r.BesideMedian != 0 {
		r.Ratio = r.OursMedian / r.BesideMedian
	}
	if len(goals) == 0 {
		return r
	}
	var texts []string
	for _, g := range goals {
		texts = append(texts, g.text)
		r.Holds = r.Holds && len(ours) > 0 && len(other) > 0 && g.holds(r)
	}
	r.Goal = strings.Join(texts, ", ")
	return r
}

// Goal is a bound that a result keeps or misses.
type Goal struct {
	text  string
	holds func(Result) bool
}

// MedianAtMost bounds the median, in the result's unit.
func MedianAtMost(limit float64) Goal {
	return Goal{fmt.Sprintf("median ≤ %g", limit), func(r Result) bool { return r.OursMedian <= limit }}
}

// P95AtMost bounds the 95th percentile, in the result's unit.
func P95AtMost(limit float64) Goal {
	return Goal{fmt.Sprintf("p95 ≤ %g", limit), func(r Result) bool { return r.OursP95 <= limit }}
}

// RatioAtMost bounds the ratio from above.
func RatioAtMost(limit float64) Goal {
	text := fmt.Sprintf("≤ %g times", limit)
	if limit < 0.5 {
		text = fmt.Sprintf("≤ 1/%g", 1/limit)
	}
	return Goal{text, func(r Result) bool { return r.Ratio <= limit }}
}

// RatioAtLeast bounds the ratio from below.
func RatioAtLeast(limit float64) Goal {
	return Goal{fmt.Sprintf("≥ %g times", limit), func(r Result) bool { return r.Ratio >= limit }}
}

// Alternate runs the sides in turn, so often, in the other order every other
// time: what disturbs the machine disturbs all of them, and none always comes
// first.
func Alternate(ctx context.Context, rounds int, sides ...func() error) error {
	order := slices.Clone(sides)
	for range rounds {
		for _, side := range order {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := side(); err != nil {
				return err
			}
		}
		slices.Reverse(order)
	}
	return nil
}

// Timed is a side for Alternate that adds how long f took, per operation of n, in
// the unit.
func Timed(into *Samples, unit time.Duration, n int, f func() error) func() error {
	return func() error {
		begin := time.Now()
		if err := f(); err != nil {
			return err
		}
		into.Add(time.Since(begin)/time.Duration(n), unit)
		return nil
	}
}

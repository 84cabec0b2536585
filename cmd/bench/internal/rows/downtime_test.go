package rows

import (
	"context"
	"slices"
	"testing"
	"time"
)

// A step of the switch that takes longer shows in the figure by that much; one
// before it, as long, does not.
func TestDowntimeShowsSlowSteps(t *testing.T) {
	const delay = 300 * time.Millisecond
	around := func(ctx context.Context, step string, do func(context.Context) error) error {
		if slices.Contains([]string{"secrets.late", "image.get"}, step) {
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		}
		return do(ctx)
	}
	results, err := downtime(t.Context(), containerEnv(t), downtimeSize{rounds: 3, secrets: 5}, around)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.BesideMedian <= 0 {
			t.Errorf("%+v: want what was measured on both sides", r)
		}
	}
	// What is left of it is the switch itself.
	slowed := float64(delay / time.Millisecond)
	if got := results[0].OursMedian; got < slowed || got > 1.9*slowed {
		t.Errorf("one step of the switch takes %.0f ms longer, and the figure is %.0f ms", slowed, got)
	}
}

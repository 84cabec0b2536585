package rows

import (
	"context"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// A step of the switch that takes longer shows in the figure by that much; one
// before it does not.
func TestDowntimeShowsSlowSteps(t *testing.T) {
	env := testEnv(t)
	const delay = 150 * time.Millisecond
	slow := func(slowed string) measure.Result {
		t.Helper()
		around := func(ctx context.Context, step string, do func(context.Context) error) error {
			if step == slowed {
				select {
				case <-time.After(delay):
				case <-ctx.Done():
				}
			}
			return do(ctx)
		}
		results, err := downtime(t.Context(), env, downtimeSize{rounds: 2, secrets: 5}, around)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if r.OursMedian <= 0 || r.BesideMedian <= 0 {
				t.Errorf("%+v: want what was measured on both sides", r)
			}
		}
		return results[0]
	}
	within, before := slow("secrets.late"), slow("image.get")
	ms := float64(delay / time.Millisecond)
	if got := within.OursMedian - before.OursMedian; got < 0.7*ms || got > 1.5*ms {
		t.Errorf("a step that takes %v longer shows as %.0f ms", delay, got)
	}
	if within.BesideMedian > before.BesideMedian+ms {
		t.Errorf("beside it: %.0f ms, want no more than the %.0f of before", within.BesideMedian, before.BesideMedian)
	}
}

package rows

import (
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// TestReadShowsASlowStep: what the store takes longer shows in each figure of ours.
func TestReadShowsASlowStep(t *testing.T) {
	const slower = 20 * time.Millisecond
	env := testEnv(t)
	run := func(slow func()) []measure.Result {
		t.Helper()
		results, err := read(t.Context(), env, readSizes{workspaces: 40, page: 10, rounds: 3, calls: 3, slow: slow})
		if err != nil {
			t.Fatal(err)
		}
		return results
	}
	plain, slowed := run(nil), run(func() { <-time.After(slower) })
	for name, by := range map[string]time.Duration{
		"read/get": slower / time.Microsecond, "read/list page 1 of 4": slower / time.Millisecond, "read/list page 4": slower / time.Millisecond,
	} {
		wantSlower(t, name, float64(by), figure(t, plain, name).OursMedian, figure(t, slowed, name).OursMedian)
	}
}

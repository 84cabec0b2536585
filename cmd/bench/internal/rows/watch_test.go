package rows

import (
	"testing"
	"time"
)

// TestWatchShowsASlowStep: a slower step between commit and fan-out shows in what
// the watchers wait.
func TestWatchShowsASlowStep(t *testing.T) {
	const slower = 200 * time.Millisecond
	sizes := watchSizes{watchers: 40, deaf: 4, conns: 4, rounds: 2}
	plain, err := watch(t.Context(), testEnv(t), sizes)
	if err != nil {
		t.Fatal(err)
	}
	sizes.slow = func() { <-time.After(slower) }
	slowed, err := watch(t.Context(), testEnv(t), sizes)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"watch/event to 40", "watch/hint", "watch/event to 36 beside 4"} {
		wantSlower(t, name, float64(slower.Milliseconds()), figure(t, plain, name).OursMedian, figure(t, slowed, name).OursMedian)
	}
}

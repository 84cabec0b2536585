package rows

import (
	"testing"
	"time"
)

// What the start takes longer shows, by about as much.
func TestStartStopped(t *testing.T) {
	env := containerEnv(t)
	const step = 500 * time.Millisecond
	results, err := stoppedStarts(t.Context(), env, startSizes{workspaces: 20, rounds: 2, slow: func() error { <-time.After(step); return nil }})
	if err != nil {
		t.Fatal(err)
	}
	r := results[0]
	if got := r.OursMedian - r.BesideMedian; got < 450 || got > 1000 {
		t.Errorf("with 20 stopped and a step of %v the start takes %.0f ms more: %+v", step, got, r)
	}
}

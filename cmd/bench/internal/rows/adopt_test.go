package rows

import (
	"testing"
	"time"
)

// What the adoption takes longer shows, by about as much.
func TestAdopt(t *testing.T) {
	env := containerEnv(t)
	const step = 500 * time.Millisecond
	results, err := adopt(t.Context(), env, adoptSize{rounds: 2, containers: 4}, func() { <-time.After(step) })
	if err != nil {
		t.Fatal(err)
	}
	r := results[0]
	if got := r.OursMedian - r.BesideMedian; got < 450 || got > 5000 {
		t.Errorf("with 4 containers and a step of %v the start takes %.0f ms more: %+v", step, got, r)
	}
}

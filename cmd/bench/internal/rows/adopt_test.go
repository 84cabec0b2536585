package rows

import (
	"testing"
	"time"
)

// What the adoption takes longer shows. A start takes less without it.
func TestAdopt(t *testing.T) {
	env := containerEnv(t)
	const step = time.Second
	results, err := adopt(t.Context(), env, adoptSize{rounds: 2, containers: 4}, func() { <-time.After(step) })
	if err != nil {
		t.Fatal(err)
	}
	r := results[0]
	if got := r.OursMedian; got < 1000 || got > 6000 {
		t.Errorf("with 4 containers and a step of %v the start takes %.0f ms: %+v", step, got, r)
	}
}

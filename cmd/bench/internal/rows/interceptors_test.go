package rows

import (
	"testing"
	"time"
)

// TestInterceptorsShowASlowStep: a slower step in the chain shows in each figure.
func TestInterceptorsShowASlowStep(t *testing.T) {
	const slower = 20 * time.Millisecond
	sizes := interceptorsSizes{rounds: 3, direct: 3, calls: 3}
	plain, err := interceptors(t.Context(), testEnv(t), sizes)
	if err != nil {
		t.Fatal(err)
	}
	sizes.slow = func() { <-time.After(slower) }
	slowed, err := interceptors(t.Context(), testEnv(t), sizes)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range interceptedCalls {
		for _, name := range []string{"interceptors/" + c.name, "interceptors/" + c.name + " over a socket"} {
			wantSlower(t, name, float64(slower.Microseconds()), figure(t, plain, name).OursMedian, figure(t, slowed, name).OursMedian)
		}
	}
}

package rows

import (
	"testing"
	"time"
)

// A step that is slower makes fewer cycles a second: with one at once, each takes
// longer by as much.
func TestThroughputShowsASlowStep(t *testing.T) {
	const by = 1500 * time.Millisecond
	slow := &slowed{step: "container.create", by: by}
	measured := func() float64 {
		t.Helper()
		size := throughputSize{workspaces: 2, secrets: 1, rounds: 1, atOnce: []int{1}, cycles: 2}
		results, err := throughput(t.Context(), containerEnv(t), size, slow.around)
		if err != nil {
			t.Fatal(err)
		}
		if len(results) != 1 || results[0].Name != "throughput/at-1" || results[0].Ratio <= 0 {
			t.Fatalf("results %+v", results)
		}
		return results[0].OursMedian
	}
	rate := measured()
	slow.on.Store(true)
	if more := 1/measured() - 1/rate; more < 0.75 || more > 4.5 {
		t.Errorf("a step that takes %v longer makes a cycle take %v s longer", by, more)
	}
}

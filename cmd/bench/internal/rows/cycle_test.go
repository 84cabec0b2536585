package rows

import (
	"context"
	"sync/atomic"
	"testing"
	"time"
)

// slowed makes one step take longer, once it is told to.
type slowed struct {
	step string
	by   time.Duration
	on   atomic.Bool
}

func (s *slowed) around(ctx context.Context, step string, do func(context.Context) error) error {
	if step == s.step && s.on.Load() {
		select {
		case <-time.After(s.by):
		case <-ctx.Done():
		}
	}
	return do(ctx)
}

// A step that is slower, and takes more of the processors, makes the cycle's
// figures larger by as much. What else the machine does meanwhile is in neither:
// the processors' time is the test's.
func TestCycleShowsASlowStep(t *testing.T) {
	const by, cpuBy = time.Second, 70 * time.Millisecond
	slow := &slowed{step: "container.create", by: by}
	var busy atomic.Int64
	around := func(ctx context.Context, step string, do func(context.Context) error) error {
		if step == slow.step && slow.on.Load() {
			busy.Add(int64(cpuBy))
		}
		return slow.around(ctx, step, do)
	}
	measured := func() (wall, cpu float64) {
		t.Helper()
		results, err := cycle(t.Context(), containerEnv(t), cycleSize{rounds: 1, block: 2, secrets: 2},
			func() (time.Duration, error) { return time.Duration(busy.Load()), nil }, around)
		if err != nil {
			t.Fatal(err)
		}
		if len(results) != 2 || results[0].Name != "cycle/time" || results[1].Name != "cycle/processor" || results[0].Ratio <= 0 {
			t.Fatalf("results %+v", results)
		}
		return results[0].OursMedian, results[1].OursMedian
	}
	wall, cpu := measured()
	slow.on.Store(true)
	slowWall, slowCPU := measured()
	if more := slowWall - wall; more < 500 || more > 3000 {
		t.Errorf("a step that takes %v longer makes a cycle of %v ms take %v", by, wall, slowWall)
	}
	if cpu != 0 || slowCPU != 70 {
		t.Errorf("a step that takes %v more of the processors makes a cycle of %v ms take %v", cpuBy, cpu, slowCPU)
	}
}

func TestParseBusy(t *testing.T) {
	for stat, want := range map[string]time.Duration{
		"cpu  1 2 4 1000 1000 8 16 0 0 0\ncpu0 5 5 5 5 5 5 5\n": 310 * time.Millisecond,
		"cpu  1 2 4 1000 1000 8 16":                             310 * time.Millisecond,
		"cpu  1 2 4 1000 1000 x 16":                             0,
		"cpu  1 2":                                              0,
		"":                                                      0,
	} {
		if got, err := parseBusy(stat); got != want || (err == nil) != (want != 0) {
			t.Errorf("parseBusy(%q) = %v, %v, want %v", stat, got, err, want)
		}
	}
}

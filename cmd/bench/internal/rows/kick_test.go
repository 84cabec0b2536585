package rows

import (
	"testing"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// A step of the kick that is slower shows, by about as much.
func TestKick(t *testing.T) {
	workqueue := func(int, int) (float64, error) { return 1000, nil }
	run := func(step func()) map[string]measure.Result {
		t.Helper()
		results, err := kick(t.Context(), kickSize{rounds: 5, actors: 100, goroutines: 4, ops: 20_000}, workqueue, step)
		if err != nil {
			t.Fatal(err)
		}
		return byName(results)
	}
	plain := run(nil)
	var f flag
	slow := run(func() {
		for range 100 {
			f.set()
		}
	})
	for _, name := range []string{"kick/coalesced", "kick/1000 actors"} {
		// The step is what stands beside it, a hundred times.
		want := 100 * slow["kick/coalesced"].BesideMedian
		if got := slow[name].OursMedian - plain[name].OursMedian; got < want/3 || got > want*20 {
			t.Errorf("%s: %.0f ns slower, want about %.0f", name, got, want)
		}
	}
	if a := plain["kick/allocations"]; a.OursMedian != 0 {
		t.Errorf("a kick allocates %v times", a.OursMedian)
	}
	if r := plain["kick/workqueue"]; r.BesideMedian != 1000 {
		t.Errorf("the workqueue's is %v ns, want what it said", r.BesideMedian)
	}
}

func byName(results []measure.Result) map[string]measure.Result {
	m := make(map[string]measure.Result)
	for _, r := range results {
		m[r.Name] = r
	}
	return m
}

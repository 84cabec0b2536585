package rows

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// A store that reads more slowly shows in each figure of ours, by as much.
func TestRead_ShowsASlowStep(t *testing.T) {
	dir, err := os.MkdirTemp("", "b") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	run := func(slow func()) []measure.Result {
		results, err := read(t.Context(), &Env{Dir: dir, Log: t.Output()}, readSizes{
			workspaces: 200, page: 50, rounds: 9, gets: 3, lists: 2, slow: slow,
		})
		if err != nil {
			t.Fatal(err)
		}
		return results
	}
	const step = 20 * time.Millisecond
	before := run(nil)
	after := run(func() { <-time.After(step) })
	if len(before) != 7 || len(after) != len(before) {
		t.Fatalf("%d and %d results", len(before), len(after))
	}
	for i := range after {
		unit := time.Millisecond
		if after[i].Unit == "µs" {
			unit = time.Microsecond
		}
		wantSlower(t, after[i].Name, float64(step/unit), before[i].OursMedian, after[i].OursMedian)
	}
}

// A start that takes longer shows by as much, and only on our side.
func TestStartStopped_ShowsASlowStep(t *testing.T) {
	env := containerEnv(t)
	t.Cleanup(func() { _ = os.RemoveAll(env.Dir + "/library-50") }) // it lives as long as the benchmark
	run := func(slow func() error) []measure.Result {
		results, err := stoppedStarts(t.Context(), env, startSizes{workspaces: 50, rounds: 3, slow: slow})
		if err != nil {
			t.Fatal(err)
		}
		return results
	}
	const step = 400 * time.Millisecond
	before := run(nil)
	after := run(func() error { <-time.After(step); return nil })
	for i := range after {
		wantSlower(t, after[i].Name, float64(step/time.Millisecond), before[i].OursMedian, after[i].OursMedian)
		if !strings.HasPrefix(after[i].Name, "idle/start") || after[i].BesideMedian > 2*before[i].BesideMedian+200 {
			t.Errorf("beside %v, and with a slow step of ours %v", before[i], after[i])
		}
	}
}

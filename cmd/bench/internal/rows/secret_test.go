package rows

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// A commit that takes longer shows in the row by as much.
func TestSecret_SlowCommit(t *testing.T) {
	const slower = 20 * time.Millisecond
	slow := func(ctx context.Context, step string, do func(context.Context) error) error {
		if step == "store.commit" {
			<-time.After(slower)
		}
		return do(ctx)
	}
	sizes := secretSizes{rounds: 2, single: 10, many: 40, clients: 8}
	etcd := func(_, _, ops, size int) (measure.Samples, float64, error) {
		if size != secretBytes {
			t.Errorf("a value of %d bytes", size)
		}
		return slices.Repeat(measure.Samples{1}, ops), 1000, nil
	}
	run := func(around aroundFunc) (ms, rate float64) {
		t.Helper()
		results, err := measureSecret(t.Context(), t.TempDir(), around, etcd, sizes)
		if err != nil {
			t.Fatal(err)
		}
		figures := map[string]measure.Result{}
		for _, r := range results {
			if figures[r.Name] = r; r.BesideMedian <= 0 || r.OursMedian <= 0 {
				t.Errorf("%+v", r)
			}
		}
		if len(figures) != 8 {
			t.Errorf("got %v", results)
		}
		return figures["secret/1-client"].OursMedian, figures["secret/8-clients"].OursMedian
	}
	ms, rate := run(nil)
	slowMS, slowRate := run(slow)
	want := float64(slower) / float64(time.Millisecond)
	if got := slowMS - ms; got < want*0.8 || got > want*10 {
		t.Errorf("%v ms after %v ms: %v more, not %v", slowMS, ms, got, want)
	}
	// Each of 8 clients waits for one or two commits a change.
	if limit := 8 / slower.Seconds(); slowRate > limit || slowRate < limit/40 || rate < slowRate {
		t.Errorf("%v a second after %v, want %v at most", slowRate, rate, limit)
	}
}

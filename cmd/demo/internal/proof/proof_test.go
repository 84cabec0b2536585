package proof

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/internal/lab"
)

func TestCheckDowntime(t *testing.T) {
	gaps := func(n int, each time.Duration) lab.Downtime {
		return lab.Downtime{Gaps: slices.Repeat([]time.Duration{each}, n)}
	}
	late := gaps(1, time.Millisecond)
	late.Overlaps = 1
	for name, tt := range map[string]struct {
		down   lab.Downtime
		cycles int64
		took   time.Duration
		want   string // empty: nothing is wrong
	}{
		"good":               {down: gaps(2, 10*time.Millisecond), cycles: 2},
		"nothing happened":   {},
		"none was seen":      {cycles: 1, want: "0 switches were seen from outside, the workspace counts 1"},
		"two in one gap":     {down: gaps(1, time.Millisecond), cycles: 2},
		"two were missed":    {down: gaps(1, time.Millisecond), cycles: 3, want: "1 switches"},
		"one is not counted": {down: gaps(2, time.Millisecond), cycles: 1, want: "2 switches"},
		"slow":               {down: gaps(minMedian, time.Second), cycles: minMedian, took: (2*minMedian - 1) * time.Second, want: "at the median"},
		"slow machine":       {down: gaps(minMedian, time.Second), cycles: minMedian, took: 2 * minMedian * time.Second},
		"slow once":          {down: gaps(1, time.Second), cycles: 1},
		"two at once":        {down: late, cycles: 1, want: "after the new one"},
	} {
		t.Run(name, func(t *testing.T) {
			switch err := checkDowntime(tt.down, tt.cycles, tt.took); {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

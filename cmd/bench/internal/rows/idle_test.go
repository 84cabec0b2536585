package rows

import (
	"testing"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

// What is kept for a workspace shows, by about as much.
func TestIdleMemory(t *testing.T) {
	run := func(keep func() any) map[string]measure.Result {
		t.Helper()
		results, err := idleMemory(t.Context(), idleSize{rounds: 3, workspaces: 2000}, keep)
		if err != nil {
			t.Fatal(err)
		}
		return byName(results)
	}
	plain := run(nil)
	larger := run(func() any { return new([4096]byte) })
	for _, name := range []string{"idle/stopped, heap and stacks", "idle/running, heap and stacks"} {
		if got := larger[name].OursMedian - plain[name].OursMedian; got < 3 || got > 5 {
			t.Errorf("%s: %.1f KB more, want about 4", name, got)
		}
		if plain[name].OursMedian <= 0 {
			t.Errorf("%s: %.1f KB", name, plain[name].OursMedian)
		}
	}
	if bare := plain["idle/stopped, heap and stacks"].BesideMedian; bare < 2 || bare > 8 { // 2, and more under the race detector
		t.Errorf("a goroutine has %.1f KB", bare)
	}
}

package rows

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

func TestMain(m *testing.M) {
	BareServer()
	os.Exit(m.Run())
}

// testEnv is a place for a row in a test.
func testEnv(t *testing.T) *Env {
	t.Helper()
	return &Env{BinDir: os.Getenv("WORKSPACED_BIN_DIR"), Dir: t.TempDir(), Log: t.Output()}
}

// figure returns the result whose name begins with this.
func figure(t *testing.T, results []measure.Result, name string) measure.Result {
	t.Helper()
	i := slices.IndexFunc(results, func(r measure.Result) bool { return strings.HasPrefix(r.Name, name) })
	if i < 0 {
		t.Fatalf("no result %s in %+v", name, results)
	}
	return results[i]
}

// wantSlower checks that a figure shows by how much a step was slowed. Other tests
// run beside, and the machine adds to either.
func wantSlower(t *testing.T, name string, by, plain, slowed float64) {
	t.Helper()
	t.Logf("%s: %.3g, with a step that is slower by %.3g: %.3g", name, plain, by, slowed)
	if got := slowed - plain; got < 0.7*by || got > 3*by {
		t.Errorf("%s: a step that is slower by %g shows as %g", name, by, got)
	}
}

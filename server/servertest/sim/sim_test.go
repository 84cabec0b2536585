package sim

import (
	"flag"
	"fmt"
	"os"
	goruntime "runtime"
	"testing"
	"time"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "run this one seed here, and print its log if it fails")
	seedsFlag = flag.Int("seeds", 0, "run so many seeds")
	firstFlag = flag.Uint64("first", 1, "the first of them")
	soakFlag  = flag.Duration("soak", 0, "run seeds that nobody has run before, for so long")
)

// Seeds of a plain test run, bounded for `make test` with the race detector.
const (
	defaultSeeds  = 120
	defaultLinear = 120
)

func TestSeeds(t *testing.T)  { run(t, defaultSeeds, false) }
func TestLinear(t *testing.T) { run(t, defaultLinear, true) }

func run(t *testing.T, n int, linear bool) {
	if *seedFlag > 0 {
		fail(t, runSeed(t, *seedFlag, fastDir(t), linear), t.Name())
		return
	}
	s := share{First: *firstFlag, N: n, Linear: linear}
	if *seedsFlag > 0 {
		s.N = *seedsFlag
	}
	start := time.Now()
	if *soakFlag > 0 {
		s.First, s.N, s.Until = uint64(start.UnixNano()), 0, start.Add(*soakFlag)
	}
	r := runShares(t, s, goruntime.NumCPU())
	if testing.Verbose() || *soakFlag > 0 || *seedsFlag > 0 {
		r.Write(os.Stdout)
		_, _ = fmt.Printf("%v, first seed %d\n", time.Since(start).Round(time.Millisecond), s.First)
	}
	fail(t, r, t.Name())
	if r.Seeds == 0 || s.N > 0 && r.Seeds < s.N {
		t.Errorf("%d seeds of %d were run", r.Seeds, s.N)
	}
	if linear && len(r.Undecided)*50 > r.Histories {
		t.Errorf("%d of %d histories are undecided", len(r.Undecided), r.Histories)
	}
}
